"""Building a network F by the name that a configuration gives it (`method.network`)."""

from __future__ import annotations

from hpcdistill.models import NETWORKS
from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.models.upsampling import Upsampling


def build_network(name: str, scale: int, channels: int = 1, upsampling: Upsampling = "transposed") -> SRNetwork:
    """A new F in its training form, or with `upsampling` "subpixel" in its inference form; UserError if unknown."""
    network: SRNetwork = NETWORKS[name](scale, channels)
    return network if upsampling == "transposed" else network.deploy().train()
