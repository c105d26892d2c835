"""Super-resolution without distillation: FSRCNN*, VDSR* and IDN* of the papers' tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from hpcdistill.data.needs import Needs
from hpcdistill.losses.supervision import l1
from hpcdistill.methods.base import Batch, Carry, Group, Method, MethodConfig, OptimizerSettings, Phase, Terms
from hpcdistill.models.super_resolution import Network, build_network


class PlainSR(Method):
    """L = L1(Y, F(X)): the network F alone, X the LR patch, Y the HR patch."""

    class Config(MethodConfig):
        name: Literal["plain_sr"] = "plain_sr"
        scale: Literal[2, 3, 4] = Field(description="s, the super-resolution factor")
        channels: Literal[1, 3] = Field(1, description="c; 1 = luma, 3 = RGB")
        network: Network = Field("fsrcnn", description="F")
        optimizer: OptimizerSettings = OptimizerSettings()

    version: ClassVar[int] = 1

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.student = build_network(config.network, config.scale, config.channels)
        self.groups = {"student": Group(self.student, config.optimizer)}
        self.generators = {"student": self.student}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", "student", self.student_loss),)

    @property
    def needs(self) -> Needs:
        return Needs("lr-hr", self.config.scale, (self.config.scale,), self.config.channels)

    def student_loss(self, batch: Batch, carry: Carry) -> Terms:
        """Reconstruction alone."""
        return {"reconstruction": l1(self.call("student", batch[f"lr{self.config.scale}"]), batch["hr"])}
