"""The configurations of the super-resolution methods."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from hpcdistill.methods.settings import MethodConfig, OptimizerSettings, Role
from hpcdistill.models import NETWORKS, Network
from hpcdistill.settings import LARGEST_WEIGHT, Section


class CollapseSettings(Section):
    """Layers of F that are trained wide and deployed narrow (`models.collapsible`)."""

    form: Literal["none", "linear", "edge", "bottleneck"] = Field(
        "none", description="linear: SESR's block; edge: ECBSR's; bottleneck: 1x1, k x k, 1x1; none = plain layers"
    )
    width: int = Field(256, gt=0, le=4096, description="channels inside a block of linear or bottleneck")
    repeats: int = Field(1, gt=0, le=64, description="bottleneck: how many are added up")
    skip: bool = Field(True, description="layers of as many channels out as in start near the identity")
    layers: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="the layers, by name (mapping.0.0); unset = all but transposed and grouped ones",
    )


class SuperResolutionConfig(MethodConfig):
    """What every super-resolution method's configuration has."""

    scale: Literal[2, 3, 4] = Field(description="s, the super-resolution factor")
    channels: Literal[1, 3] = Field(1, description="c; 1 = luma, 3 = RGB")
    network: Network = Field("fsrcnn", description="F; a teacher that is started from has the same")
    residual: Literal["none", "bicubic"] | None = Field(
        None,
        description="what F adds to: bicubic = MATLAB's enlargement of its input; unset = F's own (vdsr, idn: bicubic)",
    )
    collapse: CollapseSettings = CollapseSettings()
    first_weights: Literal["own", "pytorch"] = Field(
        "own", description="own = as the network's paper draws them; pytorch = its defaults, which PISR's code takes"
    )
    optimizer: OptimizerSettings = OptimizerSettings()

    @field_validator("residual")
    @classmethod
    def _own_residual_is_the_default(cls, residual: str | None, info: ValidationInfo) -> str | None:
        # One run, one identity, whether it is spelt out or not.
        network = info.data.get("network")
        return None if residual and network and residual == NETWORKS[network].RESIDUAL else residual

    def network_form(self) -> dict[str, Any]:
        """Keyword arguments of `models.sr_network.build_network`: those that are not F's own."""
        form: dict[str, Any] = {"residual": self.residual} if self.residual else {}
        if self.collapse.form != "none":
            form["collapse"] = self.collapse.model_dump(mode="json", exclude_none=True)
        if self.first_weights != "own":
            form["first_weights"] = self.first_weights
        return form


class FinishSettings(Section):
    """The last part of a run, with another reconstruction loss in the place of L1."""

    loss: Literal["none", "l2", "fourier"] = Field(
        "none", description="l2: mean squared difference; fourier: L1 of the Fourier transforms; none = L1 to the end"
    )
    share: float = Field(0.1, gt=0, lt=1, description="the part's share of the run's steps")


class SRStudentConfig(SuperResolutionConfig):
    """What a method that trains F alone has besides."""

    finish: FinishSettings = FinishSettings()


class PlainSRConfig(SRStudentConfig):
    """The network F alone."""

    METHOD: ClassVar[str] = "hpcdistill.methods.plain_sr:PlainSR"

    name: Literal["plain_sr"] = "plain_sr"


class PrivilegedTeacherConfig(SuperResolutionConfig):
    """Defaults are DSSD's teacher."""

    METHOD: ClassVar[str] = "hpcdistill.methods.privileged_teacher:PrivilegedTeacherTraining"
    GENERATORS: ClassVar[tuple[str, ...]] = ("teacher",)

    name: Literal["privileged_teacher"] = "privileged_teacher"
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


class PrivilegedStudentConfig(SRStudentConfig):
    """Defaults are DSSD's student."""

    METHOD: ClassVar[str] = "hpcdistill.methods.privileged_student:PrivilegedStudent"

    name: Literal["privileged_student"] = "privileged_student"
    initialise: Literal["teacher", "random"] = Field("teacher", description="where the student's weights start")
    vid: Literal["laplace", "gaussian", "none"] = Field(
        "laplace", description="form of the variational information distillation (equation 17: laplace)"
    )
    weight_vid: float = Field(1e-6, ge=0, le=LARGEST_WEIGHT, description="lambda^S, weight of VID")
    vid_scale: float = Field(
        0.1,
        gt=0,
        le=LARGEST_WEIGHT,
        description="b = vid_scale * softplus(.); PISR's code has 0.1, equation 18 prints 1",
    )
    vid_warm_up: float = Field(0.0, ge=0, le=1, description="first share of the run, over which lambda^S rises from 0")
    vid_fade: float = Field(0.0, ge=0, le=1, description="last share of the run, over which lambda^S falls to 0")
    layer: str | None = Field(
        None, description="the distilled layer; unset = F's own (fsrcnn: expanding, vdsr: conv19, idn: dblock4)"
    )

    @field_validator("layer")
    @classmethod
    def _own_layer_is_the_default(cls, layer: str | None, info: ValidationInfo) -> str | None:
        # One run, one identity, whether the layer is spelt out (as older runs' config.yaml do) or not.
        network = info.data.get("network")
        return None if layer and network and layer == NETWORKS[network].DISTILLED else layer

    def roles(self) -> dict[str, Role]:
        needed = self.initialise == "teacher" or self.vid != "none"
        return {"teacher": Role(needed, ("lr", "hr"), self.scale, self.channels)}
