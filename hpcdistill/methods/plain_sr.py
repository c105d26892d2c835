"""Super-resolution without distillation: FSRCNN*, VDSR* and IDN* of the papers' tables."""

from __future__ import annotations

from typing import Literal

from hpcdistill.methods.sr import SuperResolution, SuperResolutionConfig


class PlainSR(SuperResolution):
    """L = L1(Y, F(X)): the network F alone."""

    class Config(SuperResolutionConfig):
        name: Literal["plain_sr"] = "plain_sr"
