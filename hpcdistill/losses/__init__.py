"""Loss terms, each a mean over its elements; the weights belong to the methods."""

from typing import Literal

Adversarial = Literal["lsgan", "hinge", "vanilla"]  # see `adversarial`
