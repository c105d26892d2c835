"""The teacher that sees the HR image: DSSD's (HFRM, F, SDM), PISR's, and the variants of tables 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from hpcdistill.data.needs import Needs
from hpcdistill.losses.supervision import l1
from hpcdistill.methods.base import (
    Batch,
    Carry,
    Group,
    Method,
    MethodConfig,
    OptimizerSettings,
    Phase,
    Terms,
    constant,
    weigh,
)
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.super_resolution import Network
from hpcdistill.settings import LARGEST_WEIGHT


class PrivilegedTeacherTraining(Method):
    """Equation 13: L = L1(Y, F(G(Y))) + lambda_fre * sum L1(X^k, G^k) + lambda_deg * sum L1(X^k, D^k).

    The sums run over the supervised levels; X^k are crops of the separately down-sampled images.
    """

    class Config(MethodConfig):
        name: Literal["privileged_teacher"] = "privileged_teacher"
        scale: Literal[2, 3, 4] = Field(description="s, the super-resolution factor")
        channels: Literal[1, 3] = Field(1, description="c; 1 = luma, 3 = RGB")
        network: Network = Field("fsrcnn", description="F, the network the student takes over")
        encoder: Literal["hfrm", "pisr", "bicubic"] = Field(
            "hfrm", description="G: what turns HR into F's input (table 1); bicubic = F is fed with the LR image"
        )
        degradation: Literal["sdm", "cnn", "bicubic", "none"] = Field(
            "sdm", description="D: what the super-resolved image is shrunk with (table 2)"
        )
        levels: Literal[0, 1, 2] | None = Field(
            None, description="supervised levels (table 3): 0 = reconstruction only; unset = all there are"
        )
        tie_sdm: bool = Field(False, description="SDM shares HFRM's weights, as equations 4 and 5 can be read")
        weight_fre: float = Field(
            1e-4, ge=0, le=LARGEST_WEIGHT, description="lambda_Fre^T, weight of the encoder's supervision"
        )
        weight_deg: float = Field(
            1e-4, ge=0, le=LARGEST_WEIGHT, description="lambda_Deg^T, weight of the degradation's supervision"
        )
        optimizer: OptimizerSettings = OptimizerSettings()

    version: ClassVar[int] = 1
    weight_fre: Tensor
    weight_deg: Tensor

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.teacher = PrivilegedTeacher(
            config.scale,
            config.channels,
            encoder=config.encoder,
            degradation=config.degradation,
            tie_sdm=config.tie_sdm,
            levels=config.levels,
            network=config.network,
        )
        self.groups = {"teacher": Group(self.teacher, config.optimizer)}
        self.generators = {"teacher": self.teacher}
        self.register_buffer("weight_fre", constant(config.weight_fre), persistent=False)
        self.register_buffer("weight_deg", constant(config.weight_deg), persistent=False)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("teacher", "teacher", self.teacher_loss),)

    @property
    def needs(self) -> Needs:
        scales = {*self.teacher.encoder_scales, *self.teacher.degradation_scales}
        if self.teacher.takes == "lr":
            scales.add(self.config.scale)
        return Needs("lr-hr", self.config.scale, tuple(sorted(scales)), self.config.channels)

    def teacher_loss(self, batch: Batch, carry: Carry) -> Terms:
        """Reconstruction and the deep supervision of both halves (equations 6 to 12)."""
        image = batch["hr"] if self.teacher.takes == "hr" else batch[f"lr{self.config.scale}"]
        output = self.call("teacher", image, supervised=True)
        terms = {"reconstruction": l1(output.sr, batch["hr"])}
        for scale, encoded in zip(self.teacher.encoder_scales, output.encoded, strict=True):
            terms[f"encoder_lr{scale}"] = weigh(self.weight_fre, l1(encoded, batch[f"lr{scale}"]))
        for scale, degraded in zip(self.teacher.degradation_scales, output.degraded, strict=True):
            terms[f"degradation_lr{scale}"] = weigh(self.weight_deg, l1(degraded, batch[f"lr{scale}"]))
        return terms
