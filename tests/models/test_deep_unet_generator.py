"""OMGD's deep U-Net: its published size, its blocks written out by hand, and that it is a U-Net otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.metrics.cost import image_cost
from hpcdistill.models.deep_unet_generator import DeepUNetGenerator, ExtraBlock
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.unet_generator import UNetGenerator


def test_published_counts() -> None:
    """gan_zoo.md, section 1, counted there from the released module."""
    counted = image_cost(DeepUNetGenerator())
    assert round(counted.params / 1e6, 3) == 44.172
    assert round(counted.macs / 1e9, 3) == 18.344
    assert round(counted.true_macs / 1e9, 3) == 17.532


def test_counts_by_hand() -> None:
    """Widths 16 to 128 on levels 1 to 7, whose sides are 128 to 2; two blocks at each place."""
    places = [(16, 128), (32, 64), (64, 32), *((128, side) for side in (16, 8, 4, 2))]  # behind the ways down
    places += [(16, 128), (32, 64), (64, 32), *((128, side) for side in (16, 8, 4))]  # behind up2 to up7
    places += [(32, 128)]  # before up1
    weights = sum(2 * (161 * d * d + 20 * d) for d, _ in places)
    macs = sum(2 * (4 * d * d * (side + 2) ** 2 + 157 * d * d * side**2) for d, side in places)
    plain, deep = image_cost(UNetGenerator(16)), image_cost(DeepUNetGenerator(16))
    assert deep.params - plain.params == weights
    assert deep.macs - plain.macs == deep.true_macs - plain.true_macs == macs


@torch.no_grad()
def block_by_hand(block: ExtraBlock, x: Tensor) -> Tensor:
    def norm(x: Tensor, layer: nn.Module) -> Tensor:
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    first, norm1, _, second, norm2, _, third, norm3, _, last, norm4 = block.body
    y = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    y = norm(torch.einsum("oc,bchw->bohw", first.weight[:, :, 0, 0], y), norm1).clamp_min(0)
    y = norm(functional.conv2d(y, second.weight), norm2).clamp_min(0)
    y = norm(torch.einsum("oc,bchw->bohw", third.weight[:, :, 0, 0], y), norm3).clamp_min(0)
    y = functional.conv2d(functional.pad(y, (1, 1, 1, 1), mode="reflect"), last.weight)
    return x + norm(y, norm4)


def test_a_block_by_hand() -> None:
    torch.manual_seed(1)
    block = ExtraBlock(3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(block(x), block_by_hand(block, x), rtol=1e-12, atol=1e-12)
    assert [name for name, _ in block.named_parameters() if name.endswith("bias")] == [
        f"body.{number}.bias" for number in (1, 4, 7, 10)
    ]


def test_without_its_blocks_it_is_the_plain_network() -> None:
    """A block whose last norm is 0 does nothing; each of the others changes the image, and so stands where it acts."""
    torch.manual_seed(2)
    deep = DeepUNetGenerator(4, 4).double()
    for parameter in deep.parameters():
        nn.init.normal_(parameter, std=0.3)
    blocks = {name: part for name, part in deep.named_modules() if isinstance(part, ExtraBlock)}
    levels = [f"down{k}.{1 if k == 1 else 2}" for k in (1, 2, 3)] + ["up2.2", "up3.2", "before"]
    assert sorted(blocks) == sorted(_places(levels))
    plain = UNetGenerator(4, 4).double()
    plain.load_state_dict({name: value for name, value in deep.state_dict().items() if name in plain.state_dict()})
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    full = deep(image)
    for name, block in blocks.items():
        kept = block.body[-1].weight.detach().clone(), block.body[-1].bias.detach().clone()
        nn.init.zeros_(block.body[-1].weight)
        nn.init.zeros_(block.body[-1].bias)
        assert not torch.allclose(deep(image), full, rtol=1e-3), name
        block.body[-1].weight.data.copy_(kept[0])
        block.body[-1].bias.data.copy_(kept[1])
    for block in blocks.values():
        nn.init.zeros_(block.body[-1].weight)
        nn.init.zeros_(block.body[-1].bias)
    found, maps = deep(image, maps=deep.MAPS)
    expected, expected_maps = plain(image, maps=plain.MAPS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert list(maps) == list(expected_maps)
    for name, value in maps.items():
        torch.testing.assert_close(value, expected_maps[name], rtol=1e-12, atol=1e-12)


def _places(levels: list[str]) -> list[str]:
    """Both blocks of each place: the second module number follows the first."""
    found = []
    for place in levels:
        name, _, number = place.partition(".")
        found += [f"{name}.{int(number or 0)}", f"{name}.{int(number or 0) + 1}"]
    return found


def test_first_weights_and_a_file_of_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = build_generator("deep_unet", ngf=8, levels=3)
    assert network.before[0].body[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    save_generator(network, tmp_path / "deep.safetensors")
    again, _ = load_generator(tmp_path / "deep.safetensors")
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.eval()(image), network.eval()(image))
