"""What the super-resolution methods share: a network F that enlarges LR patches, judged by L1 to the HR patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hpcdistill.data.needs import Needs
from hpcdistill.losses import fourier, l1, l2
from hpcdistill.methods.base import (
    NO_TEACHERS,
    Batch,
    Carry,
    Group,
    Method,
    Phase,
    Progress,
    Segment,
    Teachers,
    Terms,
)
from hpcdistill.models.sr_network import build_network

Reconstruction = Callable[[Tensor, Tensor], Tensor]  # how far an enlarged image is from the HR one, 0-dim
FINISHES: dict[str, Reconstruction] = {"l2": l2, "fourier": fourier}


class SuperResolution(Method):
    """One student F of the configured network and one phase: L1(Y, F(X)), X the LR patch, Y the HR patch.

    A method adds its terms in `student_loss`; one that trains more than F builds its own group. With `finish` the last
    share of the run is a segment of its own, with another loss in the place of L1.
    """

    def __init__(self, config: Any, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        self.student = build_network(config.network, config.scale, config.channels, **config.network_form())
        self.groups = {"student": Group(self.student, config.optimizer)}
        self.generators = {"student": self.student}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", "student", self.student_loss),)

    def segments(self) -> tuple[Segment, ...]:
        finish = getattr(self.config, "finish", None)
        if finish is None or finish.loss == "none":
            return super().segments()
        loss = partial(self.student_loss, reconstruction=FINISHES[finish.loss])
        last = Segment("finish", (Phase("finish", "student", loss),), share=finish.share)
        return (*super().segments(), last)

    @property
    def needs(self) -> Needs:
        return Needs("lr-hr", self.config.scale, (self.config.scale,), self.config.channels)

    def lr(self, batch: Batch) -> Tensor:
        """X, [B, c, H, W] in [0, 1]."""
        return batch[f"lr{self.config.scale}"]

    def student_loss(
        self, batch: Batch, carry: Carry, progress: Progress, reconstruction: Reconstruction = l1
    ) -> Terms:
        """Reconstruction alone."""
        return {"reconstruction": reconstruction(self.call("student", self.lr(batch)), batch["hr"])}
