"""The networks F by the name that a configuration gives them (`method.network`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from hpcdistill.errors import UserError, nearest
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.idn import IDN
from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.models.upsampling import Upsampling
from hpcdistill.models.vdsr import VDSR

NETWORKS: dict[str, type[SRNetwork]] = {"fsrcnn": FSRCNN, "vdsr": VDSR, "idn": IDN}


def _known(name: str) -> str:
    if name not in NETWORKS:
        raise ValueError(f"no network '{name}'; {nearest(name, NETWORKS)}")
    return name


Network = Annotated[str, AfterValidator(_known)]  # a configuration's `network`


def build_network(name: str, scale: int, channels: int = 1, upsampling: Upsampling = "transposed") -> SRNetwork:
    """A new F in its training form, or with `upsampling` "subpixel" in its inference form; UserError if unknown."""
    if name not in NETWORKS:
        raise UserError(f"network is '{name}'; {nearest(name, NETWORKS)}")
    network = NETWORKS[name](scale, channels)
    return network if upsampling == "transposed" else network.deploy().train()
