"""PSNR and SSIM on luma, as super-resolution papers report them (`dssd.md`, section 4).

Luma is Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 for R, G, B in 0..255; `scale` pixels of border are left out.
Two rules are in use, so a number needs its rule. They differ in what is rounded to 8 bits, by 0.03 dB at 37 dB, and in
what a gray file is, which moves Set14 (one of its 14 files is gray) by 0.09 dB with bicubic enlargement:

- "pisr": the network's output is clamped and rounded, the reference's luma is not rounded; a gray image is made RGB and
  then luma, so that its 0..255 becomes 16..235;
- "matlab": both are rounded; a gray image is taken as it is. Bicubic's printed numbers are made so.

What is rounded of the output is what the network makes: its luma for a network of one channel; its RGB for one of
three, whose luma is then rounded again under "matlab" only (`rgb2ycbcr` of an 8-bit image gives 8 bits). Beside a gray
image taken as it is, the luma of an RGB output has the range 0..255 too (`rgb2gray`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from hpcdistill.errors import UserError
from hpcdistill.ops.colour import luma

Rule = Literal["pisr", "matlab"]
PEAK = 255.0  # of luma too, although studio-swing luma ends at 235: the literature's convention
WINDOW = 11  # SSIM's Gaussian window, pixels
SIGMA = 1.5  # its standard deviation, pixels
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2

_STRIP_PIXELS, _STRIP_ROWS = 1 << 14, 24  # a dozen float64 maps of it lie in a core's second-level cache


def luma_pair(output: Tensor, reference: Tensor, scale: int, rule: Rule, gray: bool = False) -> tuple[Tensor, Tensor]:
    """The two luma images that a rule compares, `[..., H - 2 scale, W - 2 scale]` float64 in 0..255.

    `output` is the network's `[..., c, H, W]`, nominally in [0, 1], luma (c = 1) or RGB (c = 3), neither clamped nor
    rounded; `reference` is the HR image `[..., 3, H, W]`, uint8. `gray`: its file stores gray, which counts under
    "matlab" (see `gray_as_it_is`). Raises UserError when nothing is left of the image.
    """
    if output.shape[-2:] != reference.shape[-2:]:
        raise ValueError(f"the output is {list(output.shape[-2:])}, the reference {list(reference.shape[-2:])}")
    if min(reference.shape[-2:]) <= 2 * scale:
        height, width = reference.shape[-2:]
        raise UserError(f"an image of {width}x{height} is gone after shaving {scale} pixels a side; use larger images")
    # Shaved first: the border is neither converted nor filtered.
    output = shave(output, scale).double().mul(PEAK).clamp_(0.0, PEAK).round_()
    reference = shave(reference, scale)
    full = gray_as_it_is(rule, gray)
    produced = output.squeeze(-3) if output.shape[-3] == 1 else luma_255(output, full)
    expected = luma_255(reference, full)
    if rule == "matlab":
        produced, expected = produced.round(), expected.round()
    return produced, expected


def gray_as_it_is(rule: Rule, gray: bool) -> bool:
    """Whether an image, whose file stores gray or not, is its own luma in 0..255: what networks get and are held to."""
    return rule == "matlab" and gray


def luma_255(rgb: Tensor, full: bool = False) -> Tensor:
    """`[..., 3, H, W]` RGB in 0..255, any dtype, to unrounded `[..., H, W]` float64 luma in 16..235, `full`: in 0..255.

    Of equal channels the full luma is their value to 1e-13, and so the same once it is rounded.
    """
    studio = luma(rgb.double() / PEAK).squeeze(-3) * PEAK
    return (studio - 16) * (255 / 219) if full else studio


def shave(images: Tensor, border: int) -> Tensor:
    """`[..., H, W]` without `border` pixels on each side."""
    height, width = images.shape[-2:]
    return images[..., border : height - border, border : width - border]


def psnr(output: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, `[...]`, of `[..., H, W]` images in 0..255; infinite where they are equal."""
    error = (output.double() - reference.double()).square().mean(dim=(-2, -1))
    decibels: Tensor = 10 * torch.log10(PEAK**2 / error)
    return decibels


def ssim(output: Tensor, reference: Tensor) -> Tensor:
    """Mean structural similarity `[...]` of `[..., H, W]` images in 0..255 (Wang et al. 2004).

    11x11 Gaussian of sigma 1.5, positions where the window lies wholly inside, K = 0.01 and 0.03, biased variances;
    float64, since E[x^2] - E[x]^2 cancels. Raises UserError for an image smaller than the window.
    """
    height, width = reference.shape[-2:]
    if min(height, width) < WINDOW:
        raise UserError(
            f"{width}x{height} pixels are left of an image after shaving, less than SSIM's {WINDOW}x{WINDOW} window; "
            "use larger images"
        )
    x, y = output.double(), reference.double()
    assert x.shape == y.shape
    places = height - WINDOW + 1  # rows of window positions
    # On a CPU in strips that fit its cache: half the time, and little memory whatever the image's size.
    strip = max(_STRIP_ROWS, _STRIP_PIXELS // width) if x.device.type == "cpu" else places
    total = x.new_zeros(x.shape[:-2])
    for top in range(0, places, strip):
        bottom = min(top + strip, places) + WINDOW - 1
        total += _similarity(x[..., top:bottom, :], y[..., top:bottom, :]).sum(dim=(-2, -1))
    return total / (places * (width - WINDOW + 1))


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM at each position of the window, `[..., H - 10, W - 10]`."""
    # The variances enter only as a sum, so four maps are filtered instead of five.
    maps = x.new_empty((4, *x.shape))
    maps[0], maps[1] = x, y
    torch.mul(x, x, out=maps[2]).addcmul_(y, y)
    torch.mul(x, y, out=maps[3])
    mean_x, mean_y, square, product = _blur(maps)
    means = mean_x * mean_y
    mean_square = mean_x.square_().addcmul_(mean_y, mean_y)
    covariance = product.sub_(means)
    variance = square.sub_(mean_square)
    numerator = means.mul_(2).add_(C1).mul_(covariance.mul_(2).add_(C2))
    similarity: Tensor = numerator.div_(mean_square.add_(C1).mul_(variance.add_(C2)))
    return similarity


@lru_cache(maxsize=1)
def _window() -> tuple[float, ...]:
    positions = torch.arange(WINDOW, dtype=torch.float64) - (WINDOW - 1) / 2
    weights = torch.exp(-positions.square() / (2 * SIGMA**2))
    return tuple((weights / weights.sum()).tolist())


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over `[..., H, W]`, valid positions only: `[..., H - 10, W - 10]`.

    Separable, as weighted sums of shifted views: on CPU several times faster than float64 `conv2d`, which unfolds.
    """
    height, width = images.shape[-2] - WINDOW + 1, images.shape[-1] - WINDOW + 1
    rows = _weighted([images[..., k : k + height, :] for k in range(WINDOW)])
    return _weighted([rows[..., k : k + width] for k in range(WINDOW)])


def _weighted(views: list[Tensor]) -> Tensor:
    total = torch.zeros_like(views[0], memory_format=torch.contiguous_format)
    for view, weight in zip(views, _window(), strict=True):
        total.add_(view, alpha=weight)
    return total
