"""What the super-resolution methods share: a network F that enlarges LR patches, judged by L1 to the HR patch."""

from __future__ import annotations

from typing import Any

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
)
from hpcdistill.models.sr_network import build_network


class SuperResolution(Method):
    """One student F of the configured network and one phase: L1(Y, F(X)), X the LR patch, Y the HR patch.

    A method adds its terms in `student_loss`; one that trains more than F builds its own group.
    """

    def __init__(self, config: Any, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        self.student = build_network(config.network, config.scale, config.channels, **config.network_form())
        self.groups = {"student": Group(self.student, config.optimizer)}
        self.generators = {"student": self.student}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", "student", self.student_loss),)

    @property
    def needs(self) -> Needs:
        return Needs("lr-hr", self.config.scale, (self.config.scale,), self.config.channels)

    def lr(self, batch: Batch) -> Tensor:
        """X, [B, c, H, W] in [0, 1]."""
        return batch[f"lr{self.config.scale}"]

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """Reconstruction alone."""
        return {"reconstruction": l1(self.call("student", self.lr(batch)), batch["hr"])}
