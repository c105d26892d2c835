"""What fp16 takes from a loss term's gradient without a word.

fp16's smallest number is 2^-24; half of it and less is rounded to zero. Under autocast the weights and their
gradients are float32, but the gradient has come through the backward passes of fp16 layers: it is lost on the way, in
the gradients of feature maps, which are means over millions of elements. The loss scaler multiplies the SUM of the
terms by one number, which the largest term bounds; a distillation term of weight 1e-6 can lie below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpcdistill.console import warn

WARN_ABOVE: Final = 0.10  # share of a term's gradient that is lost
_LARGEST_SCALE, _SCALE_STEP = 2.0**60, 2.0**6


def lost_share(term: Tensor, parameters: Sequence[Tensor], scale: float) -> float | None:
    """The share of the elements of the term's gradient that are zero with the scaler's `scale`, but need not be.

    Measured, not estimated: the backward pass runs through the graph as autocast has built it, once with `scale` and
    once with the largest scale at which this term's gradient, alone, still fits into fp16; what is zero there too
    (dead units, padding) does not count. The graph is kept. None when the gradient overflows with `scale`: the scaler
    skips such a step. 0 of a term without a gradient.
    """
    if not term.requires_grad:
        return 0.0
    actual = _gradients(term, parameters, scale)
    if not actual:
        return 0.0
    if not _fits(actual):
        return None
    best, largest = actual, max(_LARGEST_SCALE, scale)
    while largest > scale:
        tried = _gradients(term, parameters, largest)
        if _fits(tried):
            best = tried
            break
        largest /= _SCALE_STEP
    there = torch.stack([gradient.count_nonzero() for gradient in best]).sum()
    lost = torch.stack([((a == 0) & (b != 0)).sum() for a, b in zip(actual, best, strict=True)]).sum()
    return (lost / there).item() if there else 0.0


class UnderflowWatch:
    """Measures the terms of a run in fp16 and warns of each that is lost, once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._scaler = accelerator.scaler if accelerator.mixed_precision == "fp16" else None
        self._warned: set[str] = set()

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now: 1 without a scaler. Read back from the device."""
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def measure(self, phase: str, terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """`underflow/<phase>/<term>` -> the lost share of each term's gradient with respect to `parameters`.

        Nothing unless the run is in fp16. NaN for a term whose gradient overflows: left out on one rank alone, it
        would make the ranks' logs disagree.
        """
        if self._scaler is None:
            return {}
        chosen, scale = [parameter for parameter in parameters if parameter.requires_grad], self.scale
        shares = {}
        for name, term in terms.items():
            share = lost_share(term, chosen, scale)
            key = f"{phase}/{name}"
            shares[f"underflow/{key}"] = torch.tensor(math.nan if share is None else share, device=term.device)
            if share is not None and share > WARN_ABOVE and key not in self._warned:
                self._warned.add(key)
                warn(lost_message(key, share, scale))
        return shares


def lost_message(term: str, share: float, scale: float) -> str:
    """One line: what is lost, and what helps."""
    return (
        f"train.precision: fp16 loses {share:.0%} of the gradient of {term} (zero with the loss scale 2^"
        f"{math.log2(scale):.0f}): this term hardly trains; use train.precision=bf16 or fp32, or give it more weight"
    )


def _gradients(term: Tensor, parameters: Sequence[Tensor], scale: float) -> list[Tensor]:
    scaled = term.double() * scale if term.dtype == torch.float64 else term.float() * scale
    found = torch.autograd.grad(scaled, list(parameters), retain_graph=True, allow_unused=True) if parameters else ()
    return [gradient for gradient in found if gradient is not None]


def _fits(gradients: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
