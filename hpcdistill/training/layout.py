"""`train.channels_last`: how networks and images lie in memory; `auto` is what was measured to be faster.

The layout changes the order in which a convolution adds, and so the last bits of a run: with `auto` a run that goes on
keeps the one that its checkpoint names, wherever it goes on. It is no part of a run's identity.
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import torch

from hpcdistill.console import warn
from hpcdistill.methods.base import Method
from hpcdistill.training.config import TrainConfig

Layout = Literal["contiguous", "channels_last"]

FORMATS: Final[dict[str, torch.memory_format]] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def take_layout(config: TrainConfig, method: Method, device: torch.device, started: Layout | None) -> Layout:
    """What `train.channels_last` comes to; `started`: what the run's checkpoint says, None for a run that begins.

    A line warns where a run that goes on is told another one.
    """
    if config.channels_last != "auto":
        asked: Layout = "channels_last" if config.channels_last else "contiguous"
        if started not in (None, asked):
            warn(
                f"train.channels_last={str(config.channels_last).lower()}: this run has been {started} so far; its "
                "last bits will not be those of a run in one layout; leave it out to keep them"
            )
        return asked
    return started or faster_layout(method, device)


def faster_layout(method: Method, device: torch.device) -> Layout:
    """The layout in which all of the method's generators were measured to train faster on such a device.

    A network says so itself (`FASTER_LAYOUT`, by kind of device); contiguous where one says nothing.
    """
    found = {
        cast(dict[str, Any], getattr(network, "FASTER_LAYOUT", {})).get(device.type, "contiguous")
        for network in method.generators.values()
    }
    return "channels_last" if found == {"channels_last"} else "contiguous"
