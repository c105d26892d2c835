"""Loss terms, each a mean over its elements, in float32 or better whatever it is given; a method weighs them.

What a student is compared with is given detached. Equations are FESD's, unless another paper is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError, nearest

LayerMaps = Mapping[str, Tensor]  # layer -> [B, C, H, W]

ADVERSARIAL = ("lsgan", "hinge", "vanilla")  # CycleGAN's, Pix2Pix's, and equation 8 as printed


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference (0-dim) of two tensors of one shape.

    ValueError when the shapes differ: broadcasting would give a number that means nothing.
    """
    return _difference(image, target).abs().mean()


def l2(image: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference (0-dim) of two tensors of one shape; ValueError when the shapes differ."""
    return _difference(image, target).square().mean()


def fourier(image: Tensor, target: Tensor) -> Tensor:
    """Mean of |Re F| + |Im F| (0-dim), F the orthonormal 2-D Fourier transform of the difference `[B, C, H, W]`.

    The L1 of the transform as image restoration uses it (Cho et al., MIMO-UNet, ICCV 2021, equation 8), over the half
    of the frequencies that a real image has. ValueError when the shapes differ.
    """
    transform = torch.fft.rfft2(_difference(image, target), norm="ortho")
    return torch.view_as_real(transform).abs().sum(-1).mean()


# Perceptual distillation, on VGG16's maps of two images: sums over the layers of mean absolute differences.


def style(maps_student: LayerMaps, maps_teacher: LayerMaps) -> Tensor:
    """Sum over layers of mean |Gram(S) - Gram(T)| (0-dim), equation 10; the same layers in both."""
    distances = []
    for student, teacher in _pairs(maps_student, maps_teacher):
        _check_same_shape(student, teacher)  # the Grams of maps of different sizes would have one shape
        distances.append(l1(gram(student), gram(teacher)))
    return torch.stack(distances).sum()


def feature(maps_student: LayerMaps, maps_teacher: LayerMaps) -> Tensor:
    """Sum over layers of mean |S - T| (0-dim), equation 11; the same layers in both."""
    return torch.stack([l1(student, teacher) for student, teacher in _pairs(maps_student, maps_teacher)]).sum()


def gram(x: Tensor) -> Tensor:
    """The Gram matrix (Gatys et al., CVPR 2016): what a map's channels have in common, wherever it is.

    F F^T / (C H W) of `[B, C, H, W]`, F its `[C, H W]`: `[B, C, C]`, in float32 or better under autocast too.
    """
    channels, height, width = x.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        return flat @ flat.transpose(1, 2) / (channels * height * width)


# Distillation through the teacher's discriminator: for each distilled layer i of the generators, what the teacher's
# frozen networks make of the shifted and projected maps h(f(G_i)).


def dcd(activations_student: LayerMaps, activations_teacher: LayerMaps) -> Tensor:
    """Sum over layers of mean |D_k(h(f(G_i^S))) - D_k(h(f(G_i^T)))| (0-dim), equation 12; D's k-th activations."""
    return feature(activations_student, activations_teacher)


def spectral(logits_student: LayerMaps, logits_teacher: LayerMaps) -> Tensor:
    """Sum over layers of mean |SC(phi(h(f(G_i^S)))) - SC(phi(h(f(G_i^T))))| (0-dim), equation 13; layer -> `[B, 1]`.

    SC's logits of the maps' radial spectra. The equation's outer sum runs over D's layers k, on which nothing in it
    depends: it is a factor 1.
    """
    return feature(logits_student, logits_teacher)


# Adversarial losses on a discriminator's logits of any shape. The 0.5 of "0.5 (real + fake)" is the method's.


def generator_loss(logits: Tensor, kind: str) -> Tensor:
    """How far the generated images behind `logits` are from being taken for real (0-dim); `kind`: `ADVERSARIAL`.

    lsgan: (x - 1)^2; hinge: -x; vanilla: -log sigmoid(x), which does not saturate.
    """
    return -_logits(logits, kind).mean() if kind == "hinge" else discriminator_loss(logits, True, kind)


def discriminator_loss(logits: Tensor, real: bool, kind: str) -> Tensor:
    """How far the discriminator is from the truth on images that are all `real`, or all generated (0-dim).

    lsgan: (x - 1)^2 or x^2; hinge: max(0, 1 - x) or max(0, 1 + x); vanilla: binary cross-entropy of sigmoid(x).
    """
    logits = _logits(logits, kind)
    if kind == "lsgan":
        return (logits - 1 if real else logits).square().mean()
    towards_real = logits if real else -logits
    return functional.relu(1 - towards_real).mean() if kind == "hinge" else functional.softplus(-towards_real).mean()


# Variational information distillation (Ahn et al., CVPR 2019): -log q(teacher's map | student's map).


def laplace(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln(2b) + |t - mu| / b (0-dim): t Laplace with location `mu` and scale `b` > 0, all `[B, C, H, W]`.

    DSSD's equation 17 prints ln b for ln(2b); the constant has no gradient. The target gets none.
    """
    mu, b, target = _estimate(mu, b, target)
    return (torch.log(2 * b) + (target - mu).abs() / b).mean()


def gaussian(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln b + (t - mu)^2 / (2 b^2) + ln(2 pi) / 2 (0-dim): t normal with mean `mu`, deviation `b`."""
    mu, b, target = _estimate(mu, b, target)
    return (torch.log(b) + ((target - mu) / b).square() / 2).mean() + math.log(2 * math.pi) / 2


def _difference(image: Tensor, target: Tensor) -> Tensor:
    """In float32 or better; ValueError when the shapes differ."""
    _check_same_shape(image, target)
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    return image.to(dtype) - target.to(dtype)


def _check_same_shape(first: Tensor, *others: Tensor) -> None:
    """ValueError that shows both shapes unless all tensors have the same one."""
    for other in others:
        if other.shape != first.shape:
            raise ValueError(
                f"a loss compares tensors of one shape, not {list(first.shape)} and {list(other.shape)}; "
                "check the scale and the channels of the network and of the data"
            )


def _pairs(maps_student: LayerMaps, maps_teacher: LayerMaps) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) of each layer; ValueError unless both have the same layers, one at least."""
    if not maps_student or maps_student.keys() != maps_teacher.keys():
        raise ValueError(
            f"the same layers are compared, one at least; the student has {sorted(maps_student)}, "
            f"the teacher {sorted(maps_teacher)}"
        )
    return [(maps_student[name], maps_teacher[name]) for name in maps_student]


def _logits(logits: Tensor, kind: str) -> Tensor:
    if kind not in ADVERSARIAL:
        raise UserError(f"no adversarial loss is called '{kind}'; {nearest(kind, ADVERSARIAL)}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _estimate(mu: Tensor, b: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_shape(mu, b, target)
    dtype = torch.promote_types(mu.dtype, torch.float32)
    return mu.to(dtype), b.to(dtype), target.detach().to(dtype)
