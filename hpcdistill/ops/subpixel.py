"""A strided transposed convolution written as an ordinary convolution followed by a pixel shuffle."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def transposed_to_subpixel(weight: Tensor, stride: int, padding: int, output_padding: int) -> Tensor:
    """The kernel of the convolution that, followed by a pixel shuffle, equals a transposed convolution.

    `weight` `[in, out, K, L]` belongs to a transposed convolution (no groups, no dilation). The result
    `[out * stride**2, in, K', L']` has odd sides and goes with stride 1, zero padding K' // 2 and L' // 2 and
    `pixel_shuffle(stride)`; each output channel's bias is repeated `stride**2` times. It holds the same numbers,
    rearranged, and zeros; every step is differentiable. The two agree on the whole image, border included.

    With 9x9 kernels and padding 4, K' is 5 for strides 2 and 3, and 3 for stride 4.
    ValueError when the transposed convolution does not enlarge an image by exactly `stride`.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight has {weight.ndim} dimensions; give a 2-D transposed convolution's [in, out, K, L]")
    channels_in, channels_out, *kernel = weight.shape
    if stride < 1 or padding < 0:
        raise ValueError(f"stride {stride} and padding {padding} are impossible; give stride >= 1 and padding >= 0")
    for side in kernel:
        needed = stride + 2 * padding - side
        if output_padding != needed:
            raise ValueError(
                f"kernel {side}, stride {stride}, padding {padding} and output_padding {output_padding} do not enlarge "
                f"by exactly {stride}, so no sub-pixel convolution equals it; "
                + (f"use output_padding {needed}" if needed >= 0 else "use a smaller kernel or a larger padding")
            )
    (radius_y, top, bottom), (radius_x, left, right) = (_extent(side, stride, padding) for side in kernel)
    # Output pixel q * stride + r takes input pixel q + d times tap k = r + padding - d * stride: padded so that the
    # tap index is (radius - d) * stride + r, the kernel's axis splits into (radius - d, r); flipped, it is d + radius.
    phases = functional.pad(weight, (left, right, top, bottom)).reshape(
        channels_in, channels_out, 2 * radius_y + 1, stride, 2 * radius_x + 1, stride
    )
    return (
        phases.flip(2, 4)
        .permute(1, 3, 5, 0, 2, 4)
        .reshape(channels_out * stride**2, channels_in, 2 * radius_y + 1, 2 * radius_x + 1)
    )


def _extent(side: int, stride: int, padding: int) -> tuple[int, int, int]:
    """Along one axis: input pixels that the new kernel reaches to each side, zeros before and after the taps."""
    radius = max((stride - 1 + padding) // stride, (side - 1 - padding) // stride)
    before = radius * stride - padding
    after = (radius + 1) * stride + padding - side
    assert before >= 0
    assert after >= 0
    return radius, before, after
