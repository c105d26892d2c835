"""Adversarial losses on a discriminator's logits: LSGAN (CycleGAN), hinge (Pix2Pix), vanilla (equation 8 as printed).

Means over all logits, in float32 or better whatever they come in. The 0.5 of "0.5 (real + fake)" is the method's.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError, nearest
from hpcdistill.losses import Adversarial


def generator_loss(logits: Tensor, kind: Adversarial) -> Tensor:
    """How far the generated images behind `logits` (any shape) are from being taken for real (0-dim).

    lsgan: (x - 1)^2; hinge: -x; vanilla: -log sigmoid(x), which does not saturate.
    """
    logits = _prepared(logits, kind)
    return -logits.mean() if kind == "hinge" else discriminator_loss(logits, True, kind)


def discriminator_loss(logits: Tensor, real: bool, kind: Adversarial) -> Tensor:
    """How far the discriminator is from the truth on images that are all `real`, or all generated (0-dim).

    lsgan: (x - 1)^2 or x^2; hinge: max(0, 1 - x) or max(0, 1 + x); vanilla: binary cross-entropy of sigmoid(x).
    """
    logits = _prepared(logits, kind)
    if kind == "lsgan":
        return (logits - 1 if real else logits).square().mean()
    towards_real = logits if real else -logits
    return functional.relu(1 - towards_real).mean() if kind == "hinge" else functional.softplus(-towards_real).mean()


def _prepared(logits: Tensor, kind: str) -> Tensor:
    if kind not in get_args(Adversarial):
        raise UserError(f"no adversarial loss is called '{kind}'; {nearest(kind, get_args(Adversarial))}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
