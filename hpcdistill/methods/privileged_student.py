"""The student that learns from a privileged teacher: DSSD's and PISR's second stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError, nearest
from hpcdistill.losses import variational
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
from hpcdistill.models.estimator import VIDEstimator
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher


class StudentOutput(NamedTuple):
    sr: Tensor  # [B, c, sH, sW]
    mu: Tensor | None  # [B, 56, H, W], estimate of the teacher's map
    b: Tensor | None  # [B, 56, H, W], its scale


class StudentWithEstimator(nn.Module):
    """The student and the estimator that trains with it, behind one forward (one DDP wrapper)."""

    def __init__(self, network: FSRCNN, estimator: VIDEstimator | None, layer: str) -> None:
        super().__init__()
        self.network = network
        self.estimator = estimator
        self.layer = layer

    def forward(self, lr: Tensor) -> StudentOutput:
        if self.estimator is None:
            return StudentOutput(self.network(lr), None, None)
        sr, maps = self.network(lr, maps=(self.layer,))
        return StudentOutput(sr, *self.estimator(maps[self.layer]))


class PrivilegedStudent(Method):
    """Equation 16: L = L1(Y, F(X)) + lambda_s * VID(F's map, the teacher's map), F started from the teacher's F."""

    class Config(MethodConfig):
        name: Literal["privileged_student"] = "privileged_student"
        scale: Literal[2, 3, 4] = Field(description="s, the super-resolution factor")
        channels: Literal[1, 3] = Field(1, description="c; 1 = luma, 3 = RGB")
        network: Literal["fsrcnn"] = Field("fsrcnn", description="F")
        initialise: Literal["teacher", "random"] = Field("teacher", description="where the student's weights start")
        vid: Literal["laplace", "gaussian", "none"] = Field(
            "laplace", description="form of the variational information distillation (equation 17: laplace)"
        )
        weight_vid: float = Field(1e-6, ge=0, description="lambda^S, weight of VID")
        layer: str = Field("expanding", description="the distilled layer of F")
        optimizer: OptimizerSettings = OptimizerSettings()

    version: ClassVar[int] = 1
    weight_vid: Tensor

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.student = FSRCNN(config.scale, config.channels)
        teacher = (frozen or {}).get("teacher")
        if self.uses_teacher(config):
            self.teacher = _checked_teacher(teacher, config)
            if config.initialise == "teacher":
                self.student.load_state_dict(self.teacher.network.state_dict())
        if config.layer not in self.student.map_channels:
            raise UserError(
                f"method.layer: no layer '{config.layer}'; {nearest(config.layer, self.student.map_channels)}"
            )
        estimator = VIDEstimator(self.student.map_channels[config.layer]) if config.vid != "none" else None
        module = StudentWithEstimator(self.student, estimator, config.layer)
        self.groups = {"student": Group(module, config.optimizer)}
        self.generators = {"student": self.student}
        self.register_buffer("weight_vid", constant(config.weight_vid), persistent=False)

    @classmethod
    def uses_teacher(cls, config: Config) -> bool:
        return config.initialise == "teacher" or config.vid != "none"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", "student", self.student_loss),)

    @property
    def needs(self) -> Needs:
        return Needs("lr-hr", self.config.scale, (self.config.scale,), self.config.channels)

    def student_loss(self, batch: Batch, carry: Carry) -> Terms:
        """Reconstruction and distillation; the teacher's pass has no gradients and stops at the distilled layer."""
        lr = batch[f"lr{self.config.scale}"]
        output = self.call("student", lr)
        terms = {"reconstruction": l1(output.sr, batch["hr"])}
        if self.config.vid != "none":
            with torch.no_grad():
                target = self.teacher.features(batch["hr"] if self.teacher.takes == "hr" else lr, self.config.layer)
            distance = variational.laplace if self.config.vid == "laplace" else variational.gaussian
            terms["vid"] = weigh(self.weight_vid, distance(output.mu, output.b, target))
        return terms


def _checked_teacher(teacher: nn.Module | None, config: PrivilegedStudent.Config) -> PrivilegedTeacher:
    """The teacher as a privileged one of the same F, scale and channels, or a UserError that says what differs."""
    if teacher is None:
        raise UserError("privileged_student: needs a teacher; name its config under `teacher.config`")
    if not isinstance(teacher, PrivilegedTeacher):
        raise UserError(
            f"teacher: is a {type(teacher).__name__}; a privileged_student needs a privileged_teacher's run"
        )
    for what in ("scale", "channels"):
        if getattr(teacher, what) != getattr(config, what):
            raise UserError(
                f"teacher: its {what} is {getattr(teacher, what)}, the student's is {getattr(config, what)}; "
                f"set method.{what} alike in both configs"
            )
    return teacher.requires_grad_(False).eval()
