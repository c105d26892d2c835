"""The student that learns from a privileged teacher: DSSD's and PISR's second stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.losses import gaussian, l1, laplace
from hpcdistill.methods.base import (
    NO_TEACHERS,
    Batch,
    Carry,
    Group,
    Progress,
    Role,
    Teachers,
    Terms,
    constant,
    weigh,
)
from hpcdistill.methods.sr import Reconstruction, SuperResolution
from hpcdistill.methods.sr_settings import PrivilegedStudentConfig
from hpcdistill.models.privileged import PrivilegedTeacher, VIDEstimator
from hpcdistill.models.sr_network import SRNetwork


class StudentOutput(NamedTuple):
    sr: Tensor  # [B, c, sH, sW]
    mu: Tensor | None  # estimate of the teacher's map; FSRCNN [B, 56, H, W], IDN [B, 64, H, W], VDSR [B, 64, sH, sW]
    b: Tensor | None  # its scale, of the same shape


class StudentWithEstimator(nn.Module):
    """The student and the estimator that trains with it, behind one forward (one DDP wrapper)."""

    def __init__(self, network: SRNetwork, estimator: VIDEstimator | None, layer: str) -> None:
        super().__init__()
        self.network = network
        self.estimator = estimator
        self.layer = layer

    def forward(self, lr: Tensor) -> StudentOutput:
        if self.estimator is None:
            return StudentOutput(self.network(lr), None, None)
        sr, maps = self.network(lr, maps=(self.layer,))
        return StudentOutput(sr, *self.estimator(maps[self.layer]))


class PrivilegedStudent(SuperResolution):
    """Equation 16: L = L1(Y, F(X)) + lambda_s * VID(F's map, the teacher's map), F started from the teacher's F."""

    Config = PrivilegedStudentConfig
    weight_vid: Tensor

    def __init__(self, config: PrivilegedStudentConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        self.layer = config.layer or self.student.DISTILLED
        role = config.roles()["teacher"]
        if role.needed:
            self.teacher = _checked_teacher(role, teachers, config)
            if config.initialise == "teacher":
                self._start_from(self.teacher.network)
        if self.layer not in self.student.map_channels:
            raise UserError(f"method.layer: no layer '{self.layer}'; {nearest(self.layer, self.student.map_channels)}")
        width = self.student.map_channels[self.layer]
        estimator = VIDEstimator(width, config.vid_scale) if config.vid != "none" else None
        module = StudentWithEstimator(self.student, estimator, self.layer)
        self.groups = {"student": Group(module, config.optimizer)}
        self.register_buffer("weight_vid", constant(config.weight_vid), persistent=False)

    def student_loss(
        self, batch: Batch, carry: Carry, progress: Progress, reconstruction: Reconstruction = l1
    ) -> Terms:
        """Reconstruction and distillation; the teacher's pass has no gradients and stops at the distilled layer."""
        lr = self.lr(batch)
        output = self.call("student", lr)
        terms = {"reconstruction": reconstruction(output.sr, batch["hr"])}
        if self.config.vid != "none":
            with torch.no_grad():
                target = self.teacher.features(batch["hr"] if self.teacher.takes == "hr" else lr, self.layer)
            distance = laplace if self.config.vid == "laplace" else gaussian
            terms["vid"] = weigh(self._weight(progress), distance(output.mu, output.b, target))
        return terms

    def _weight(self, progress: Progress) -> Tensor:
        """lambda^S at this step: what the configuration says but for the straight lines at its two ends."""
        weight, share = self.weight_vid, progress.share
        if self.config.vid_warm_up:
            weight = weight * (share / self.config.vid_warm_up).clamp(max=1)
        if self.config.vid_fade:
            weight = weight * ((1 - share) / self.config.vid_fade).clamp(max=1)
        return weight

    def _start_from(self, network: SRNetwork) -> None:
        """Take the weights of the teacher's F; UserError where they would not be the same function here."""
        for key in ("residual", "collapse"):
            its, own = network.arguments.get(key), self.student.arguments.get(key)
            if its != own:
                raise UserError(
                    f"teacher: its {key} is {its}, that of the student, which starts from its weights, is {own}; set "
                    f"method.{key} alike in both configs (teacher.overrides.method.{key}), or method.initialise=random"
                )
        self.student.load_state_dict(network.state_dict())


def _checked_teacher(role: Role, teachers: Teachers, config: PrivilegedStudentConfig) -> PrivilegedTeacher:
    """The teacher as a privileged one of the same F, or a UserError that says what differs."""
    teacher = role.filled("teacher", teachers)
    if not isinstance(teacher, PrivilegedTeacher):
        raise UserError(
            f"teacher: is a {type(teacher).__name__}; a privileged_student needs a privileged_teacher's run"
        )
    its = teacher.arguments["network"]
    if its != config.network:
        raise UserError(
            f"teacher: its network is {its}, the student's is {config.network}; "
            f"set method.network alike in both configs, e.g. teacher.overrides.method.network={config.network}"
        )
    return teacher
