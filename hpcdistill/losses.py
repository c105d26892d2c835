"""Loss terms, each a mean over its elements unless it says otherwise, in float32 or better whatever it is given.

A method weighs them. What a student is compared with is given detached. Equations are FESD's, unless another paper is
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError, nearest
from hpcdistill.ops import own_backward
from hpcdistill.ops.wavelet import haar

LayerMaps = Mapping[str, Tensor]  # layer -> [B, C, H, W]
Distance = Callable[[Tensor, Tensor], Tensor]  # of two tensors of one shape, 0-dim

_WINDOW, _SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian
_C1, _C2 = 0.01**2, 0.03**2

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


def wavelet(image: Tensor, target: Tensor, levels: int, power: int = 1) -> Tensor:
    """Sum over levels of the mean of |difference|^power (0-dim) of the Haar detail bands of two `[B, C, H, W]`.

    Wavelet KD's distance (Zhang et al., CVPR 2022): what differs in the deepest low band does not count. H and W are
    multiples of 2^levels. ValueError for others, and when the shapes differ.
    """
    bands, _ = haar(_difference(image, target), levels)  # the transform is linear: once, of the difference
    return torch.stack([(band.abs() if power == 1 else band.square()).mean() for band in bands]).sum()


# Perceptual distillation, on VGG16's maps of two images: sums over the layers of mean absolute differences.


def style(maps_student: LayerMaps, maps_teacher: LayerMaps, distance: Distance = l1) -> Tensor:
    """Sum over layers of mean |Gram(S) - Gram(T)| (0-dim), equation 10; the same layers in both.

    With `distance` l2 of the mean squared differences, as AutoGAN-Distiller has it (Fu et al., ICML 2020).
    """
    distances = []
    for student, teacher in _pairs(maps_student, maps_teacher):
        _check_same_shape(student, teacher)  # the Grams of maps of different sizes would have one shape
        distances.append(distance(gram(student), gram(teacher)))
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
        products: Tensor = _Products.apply(flat)  # type: ignore[no-untyped-call]
        return products / (channels * height * width)


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


# What OMGD's student has of its teachers' images and maps (Ren et al., ICCV 2021).


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """1 - the mean structural similarity (0-dim) of two `[B, C, H, W]` (Wang et al., 2004), as OMGD takes it.

    11x11 Gaussian window of sigma 1.5 at every pixel, zeros beyond the edges, C1 = 1e-4 and C2 = 9e-4: those of images
    of range 1. On signed images the factors of luminance and of structure can both be negative, so that a negative can
    look alike. (The metric of super-resolution leaves the edges out: `metrics.psnr_ssim`.)
    """
    _check_same_shape(image, target)
    dtype = torch.promote_types(torch.promote_types(image.dtype, target.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        x, y = image.to(dtype), target.to(dtype)
        # The variances enter only as a sum. As matrix products: a convolution may compute in TensorFloat-32, which
        # does not leave a difference of near squares enough digits.
        rows, columns = (_window(side, x) for side in x.shape[2:])
        mean_x, mean_y, squares, product = rows @ torch.stack([x, y, x * x + y * y, x * y]) @ columns
        means, square_means = mean_x * mean_y, mean_x.square() + mean_y.square()
        similarity = (2 * means + _C1) * (2 * (product - means) + _C2)
        similarity = similarity / ((square_means + _C1) * (squares - square_means + _C2))
        distance: Tensor = 1 - similarity.mean()
        return distance


def total_variation(image: Tensor) -> Tensor:
    """Sum of the absolute differences of neighbouring pixels of `[B, C, H, W]`, both axes; the mean over B (0-dim).

    OMGD's code sums over the batch too, which would make the weight depend on how a batch is cut into ranks.
    """
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    return (x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum()) / len(x)


def channel(maps_student: LayerMaps, maps_teacher: LayerMaps) -> Tensor:
    """Sum over layers of mean (mean_hw S - mean_hw T)^2 (0-dim): what the channels hold on average, wherever it is.

    OMGD's channel distillation; the student's maps have been brought to the teacher's number of channels.
    """
    distances = []
    for student, teacher in _pairs(maps_student, maps_teacher):
        _check_same_shape(student, teacher)
        dtype = torch.promote_types(student.dtype, torch.float32)
        distances.append(l2(student.to(dtype).mean((2, 3)), teacher.to(dtype).mean((2, 3))))
    return torch.stack(distances).sum()


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
    return own_backward.laplace(*_estimate(mu, b, target))


def gaussian(mu: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Mean of ln b + (t - mu)^2 / (2 b^2) + ln(2 pi) / 2 (0-dim): t normal with mean `mu`, deviation `b`."""
    mu, b, target = _estimate(mu, b, target)
    return (torch.log(b) + ((target - mu) / b).square() / 2).mean() + math.log(2 * math.pi) / 2


class _Products(torch.autograd.Function):
    """F F^T of F `[B, C, N]`. Its gradient in one product, not two, laid out in memory as F is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Tensor) -> Tensor:
        return flat @ flat.transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        both = gradient + gradient.transpose(1, 2)
        if flat.stride(1) == 1:  # of channels-last maps
            found: Tensor = (flat.transpose(1, 2) @ both).transpose(1, 2)
            return found
        return both @ flat  # type: ignore[no-any-return]


def _window(side: int, like: Tensor) -> Tensor:
    """[side, side]: how much of each pixel of an axis the Gaussian window around each pixel takes. Symmetric."""
    places = torch.arange(side, device=like.device, dtype=like.dtype)
    apart = places[:, None] - places
    half = _WINDOW // 2
    whole = sum(math.exp(-(k**2) / (2 * _SIGMA**2)) for k in range(-half, half + 1))
    return torch.exp(apart.square() / (-2 * _SIGMA**2)).masked_fill(apart.abs() > half, 0.0) / whole


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
