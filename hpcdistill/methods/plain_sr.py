"""Super-resolution without distillation: FSRCNN*, VDSR* and IDN* of the papers' tables."""

from __future__ import annotations

from hpcdistill.methods.sr import SuperResolution
from hpcdistill.methods.sr_settings import PlainSRConfig


class PlainSR(SuperResolution):
    """L = L1(Y, F(X)): the network F alone."""

    Config = PlainSRConfig
