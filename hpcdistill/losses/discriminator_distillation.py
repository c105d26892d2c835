"""Distillation through the teacher's discriminator: DCD (equation 12) and its spectral counterpart (equation 13).

Both compare, for each distilled layer i of the generators, what the teacher's frozen networks make of the shifted and
projected maps h(f(G_i)): D's k-th activation, and SC's logit of their radial spectrum. Detach the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hpcdistill.losses.perceptual import feature


def dcd(activations_student: Mapping[str, Tensor], activations_teacher: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of mean |D_k(h(f(G_i^S))) - D_k(h(f(G_i^T)))| (0-dim, float32); layer -> `[B, C, H, W]`."""
    return feature(activations_student, activations_teacher)


def spectral(logits_student: Mapping[str, Tensor], logits_teacher: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of mean |SC(phi(h(f(G_i^S)))) - SC(phi(h(f(G_i^T))))| (0-dim, float32); layer -> `[B, 1]`.

    Equation 13's outer sum runs over D's layers k, on which nothing in it depends: it is a factor 1.
    """
    return feature(logits_student, logits_teacher)
