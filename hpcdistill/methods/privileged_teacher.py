"""The teacher that sees the HR image: DSSD's (HFRM, F, SDM), PISR's, and the variants of tables 1 to 3."""

from __future__ import annotations

from torch import Tensor

from hpcdistill.data.needs import Needs
from hpcdistill.losses import l1
from hpcdistill.methods.base import (
    NO_TEACHERS,
    Batch,
    Carry,
    Group,
    Method,
    Phase,
    Progress,
    Teachers,
    Terms,
    constant,
    weigh,
)
from hpcdistill.methods.sr_settings import PrivilegedTeacherConfig
from hpcdistill.models.privileged import PrivilegedTeacher


class PrivilegedTeacherTraining(Method):
    """Equation 13: L = L1(Y, F(G(Y))) + lambda_fre * sum L1(X^k, G^k) + lambda_deg * sum L1(X^k, D^k).

    The sums run over the supervised levels; X^k are crops of the separately down-sampled images.
    """

    Config = PrivilegedTeacherConfig
    weight_fre: Tensor
    weight_deg: Tensor

    def __init__(self, config: PrivilegedTeacherConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        self.teacher = PrivilegedTeacher(
            config.scale,
            config.channels,
            encoder=config.encoder,
            degradation=config.degradation,
            tie_sdm=config.tie_sdm,
            levels=config.levels,
            network=config.network,
            **config.network_form(),
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

    def teacher_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """Reconstruction and the deep supervision of both halves (equations 6 to 12)."""
        image = batch["hr"] if self.teacher.takes == "hr" else batch[f"lr{self.config.scale}"]
        output = self.call("teacher", image, supervised=True)
        terms = {"reconstruction": l1(output.sr, batch["hr"])}
        for scale, encoded in zip(self.teacher.encoder_scales, output.encoded, strict=True):
            terms[f"encoder_lr{scale}"] = weigh(self.weight_fre, l1(encoded, batch[f"lr{scale}"]))
        for scale, degraded in zip(self.teacher.degradation_scales, output.degraded, strict=True):
            terms[f"degradation_lr{scale}"] = weigh(self.weight_deg, l1(degraded, batch[f"lr{scale}"]))
        return terms
