"""Pieces of images against slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdistill.ops.crops import cut


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_image_s_own_piece(channels: int, layout: torch.memory_format) -> None:
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((4, channels, 11, 14)))
    top, left = [0, 6, 3, 6], [9, 0, 4, 9]  # both ends of either range
    pieces = cut(images.contiguous(memory_format=layout), 5, torch.tensor(top), torch.tensor(left))
    expected = [image[:, i : i + 5, j : j + 5] for image, i, j in zip(images, top, left, strict=True)]
    assert torch.equal(pieces, torch.stack(expected))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_is_the_piece_s_place(deterministic: bool) -> None:
    images = torch.zeros(2, 3, 6, 7, requires_grad=True)
    weights = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4) + 1
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        (cut(images, 4, torch.tensor([2, 0]), torch.tensor([0, 3])) * weights).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    expected = torch.zeros(2, 3, 6, 7)
    expected[0, :, 2:, :4] = weights[0]
    expected[1, :, :4, 3:] = weights[1]
    assert images.grad is not None
    assert torch.equal(images.grad, expected)
