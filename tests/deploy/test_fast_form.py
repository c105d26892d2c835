"""What runs in a network's place is the network: to the bit where it can be, to float32's rounding else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcdistill.deploy.fast_form import OneShuffle, fast_form, with_leaky_relu
from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.sr_network import build_network


@pytest.mark.parametrize("network", ["fsrcnn", "idn", "vdsr"])
@pytest.mark.parametrize(("scale", "channels"), [(2, 3), (3, 1), (4, 1)])
@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_it_is_the_network(network: str, scale: int, channels: int, residual: str) -> None:
    torch.manual_seed(0)
    built = build_network(network, scale, channels, residual=residual, first_weights="pytorch").deploy()
    fast = fast_form(built)
    assert isinstance(fast, OneShuffle) == (residual == "bicubic" and network != "vdsr")
    for size in ((1, 1), (2, 9), (17, 12)):
        image = torch.rand(2, channels, *size, dtype=torch.float64)
        with torch.no_grad():
            exact = built.double()(image)
            made = fast(image.float())
            built.float()
        torch.testing.assert_close(made.double(), exact, rtol=0, atol=2e-6)


def test_a_prelu_of_one_slope_is_a_leaky_relu_to_the_bit() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.PReLU(1, 0.3), nn.Conv2d(3, 4, 1), nn.PReLU(4))
    leaky = with_leaky_relu(network)
    assert [type(part).__name__ for part in leaky] == ["Conv2d", "LeakyReLU", "Conv2d", "PReLU"]
    assert isinstance(network[1], nn.PReLU)
    image = torch.randn(2, 1, 9, 7)
    assert torch.equal(leaky(image), network(image))


def test_the_network_inside_a_graph_of_colour_is_replaced_too() -> None:
    network = build_network("fsrcnn", 2, residual="bicubic").deploy()
    graph = RgbGraph(network, 2).eval()
    fast = fast_form(graph)
    assert isinstance(fast.network, OneShuffle)
    image = torch.rand(1, 3, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), graph(image), rtol=0, atol=1e-6)


def test_generators_stay_what_they_are() -> None:
    network = build_generator("resnet", ngf=4, blocks=1).eval()
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fast_form(network)(image), network(image))
