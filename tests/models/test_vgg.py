"""VGG16's maps against a computation with functions, its weights in torchvision's and in stlpips' layout."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hpcdistill.errors import UserError
from hpcdistill.models import vgg
from hpcdistill.models.vgg import PERCEPTUAL, VGG16Features, load_vgg16

# torchvision's numbers of the convolutions, with their channels; a pooling after 3, 8, 15, 22.
CONVOLUTIONS = {
    "relu1_1": (0, 3, 64),
    "relu1_2": (2, 64, 64),
    "relu2_1": (5, 64, 128),
    "relu2_2": (7, 128, 128),
    "relu3_1": (10, 128, 256),
    "relu3_2": (12, 256, 256),
    "relu3_3": (14, 256, 256),
    "relu4_1": (17, 256, 512),
    "relu4_2": (19, 512, 512),
    "relu4_3": (21, 512, 512),
    "relu5_1": (24, 512, 512),
    "relu5_2": (26, 512, 512),
    "relu5_3": (28, 512, 512),
}
STLPIPS = dict(
    zip(
        CONVOLUTIONS,
        ["1.0", "1.2", "2.6", "2.8", "3.12", "3.14", "3.16", "4.20", "4.22", "4.24", "5.28", "5.30", "5.32"],
        strict=True,
    )
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights under torchvision's names, with a classifier behind them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, channels_in, channels_out in CONVOLUTIONS.values():
        scale = (2 / (9 * channels_in)) ** 0.5
        state[f"features.{number}.weight"] = scale * torch.randn(channels_out, channels_in, 3, 3, generator=generator)
        state[f"features.{number}.bias"] = 0.1 * torch.randn(channels_out, generator=generator)
    state["classifier.0.weight"] = torch.zeros(2, 3)
    return state


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "mine.pth"
    torch.save(weights, path)
    return path


def expected_maps(weights: dict[str, Tensor], images: Tensor, normalise: bool, pool) -> dict[str, Tensor]:
    """All 13 maps, in float64."""
    x = images.double() * 0.5 + 0.5
    if normalise:
        for channel, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
            x[:, channel] = (x[:, channel] - mean) / deviation
    maps = {}
    for name, (number, _, _) in CONVOLUTIONS.items():
        if number in (5, 10, 17, 24):
            x = pool(x)
        weight, bias = (weights[f"features.{number}.{kind}"].double() for kind in ("weight", "bias"))
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1)), weight, bias).clamp(min=0)
        maps[name] = x
    return maps


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("normalise", [False, True])
def test_equals_functions(weights: dict[str, Tensor], file: Path, normalise: bool) -> None:
    batch = images(2, 3, 32, 48)
    expected = expected_maps(weights, batch, normalise, lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)))
    network = load_vgg16(file, layers=tuple(CONVOLUTIONS), normalise=normalise)
    result = network(batch)
    assert list(result) == list(CONVOLUTIONS)
    for name, values in expected.items():
        torch.testing.assert_close(result[name].double(), values, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert network.origin == f"mine.pth (sha256 {digest})"


def test_nothing_behind_the_last_layer_is_computed(file: Path) -> None:
    assert PERCEPTUAL == ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    network = load_vgg16(file)
    assert list(network(images(1, 3, 16, 16))) == list(PERCEPTUAL)
    assert len(network.features) == 23  # up to relu4_3
    small = load_vgg16(file, layers=["relu2_2"])
    assert len(small.features) == 9
    assert torch.equal(small(images(1, 3, 16, 16))["relu2_2"], network(images(1, 3, 16, 16))["relu2_2"])


def test_frozen_but_gradients_reach_the_image(file: Path) -> None:
    network = load_vgg16(file, layers=("relu1_2", "relu2_1"))
    assert not network.train().training
    assert not network.features.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    batch = images(1, 3, 8, 8).requires_grad_()
    sum(x.square().sum() for x in network(batch).values()).backward()
    assert batch.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    network.double()
    exact = images(1, 3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: network(x)["relu2_1"].sum(), exact, eps=1e-7, atol=1e-4)


def blurred(x: Tensor) -> Tensor:
    """Shift-tolerant LPIPS' pooling with loops over rows and columns of its output."""
    height, width = x.shape[2:]
    largest = torch.stack([x[..., i : i + height - 1, j : j + width - 1] for i in (0, 1) for j in (0, 1)]).amax(0)
    rows, columns = ([*range(2, 0, -1), *range(n - 1), n - 3, n - 4] for n in (height, width))
    padded = largest[:, :, rows][..., columns]
    result = torch.zeros(*x.shape[:2], height // 2 + 1, width // 2 + 1, dtype=x.dtype)
    for i in range(height // 2 + 1):
        for j in range(width // 2 + 1):
            for a, b in ((a, b) for a in range(3) for b in range(3)):
                result[..., i, j] += (1, 2, 1)[a] * (1, 2, 1)[b] / 16 * padded[..., 2 * i + a, 2 * j + b]
    return result


@pytest.fixture
def stlpips(weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package stlpips_pytorch that holds random weights; the file's digest counts as the published one."""
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "net.slice2.5.filt": torch.zeros(64, 1, 3, 3)}
    for name, place in STLPIPS.items():
        for kind in ("weight", "bias"):
            state[f"net.slice{place}.{kind}"] = weights[f"features.{CONVOLUTIONS[name][0]}.{kind}"]
    path = tmp_path / "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (tmp_path / "stlpips_pytorch/__init__.py").write_text("raise ImportError('torchvision')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vgg, "_STLPIPS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_trunk_of_stlpips(weights: dict[str, Tensor], stlpips: Path) -> None:
    batch = images(1, 3, 33, 40)
    expected = expected_maps(weights, batch, False, blurred)
    network = load_vgg16("stlpips", layers=("relu1_1", *PERCEPTUAL))
    assert network.origin == "stlpips-pytorch trunk"
    assert "stlpips_pytorch" not in sys.modules
    for name, values in network(batch).items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
    stlpips.write_bytes(stlpips.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"vgg_shift_tolerant.pth: missing or not the file of stlpips-pytorch 0.0.2"):
        load_vgg16("stlpips")


def test_without_stlpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"stlpips-pytorch is not installed; `pip install stlpips-pytorch`"):
        load_vgg16("stlpips")


def test_torchvisions_file_is_found(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes(file.read_bytes())
    monkeypatch.setattr(vgg, "find_weights", {"vgg16": path}.__getitem__)
    assert load_vgg16().origin == "torchvision vgg16-397923af"


def test_safetensors(weights: dict[str, Tensor], file: Path, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "mine.safetensors")
    one, two = load_vgg16(file), load_vgg16(tmp_path / "mine.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_file_that_does_not_fit(weights: dict[str, Tensor], file: Path, tmp_path: Path) -> None:
    def complaint(content: object, name: str = "file.pth") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as error:
            load_vgg16(path, layers=("relu1_1",))
        assert "\n" not in str(error.value)
        assert name in str(error.value)
        return str(error.value)

    whole = file.read_bytes()
    for damaged in (b"", b"not weights", whole[: len(whole) // 2], whole[:1000]):
        assert "not a readable file of weights" in complaint(damaged)
    assert "not a readable file of weights" in complaint(b"12345678", "file.safetensors")
    assert "holds a list" in complaint([1, 2])
    # Also when the layers that are wanted would be there.
    without = {name: tensor for name, tensor in weights.items() if not name.startswith("features.28")}
    assert "features.28.weight is missing" in complaint(without)
    assert "features.17.weight is [3] instead of [512, 256, 3, 3]" in complaint(
        weights | {"features.17.weight": torch.zeros(3)}
    )
    assert "it has features.30.weight too" in complaint(weights | {"features.30.weight": torch.zeros(3)})
    assert "features.0.weight is missing" in complaint({"conv1.weight": torch.zeros(3)})


def test_a_pickled_object_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"features.0.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_vgg16(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


def test_wrong_names() -> None:
    with pytest.raises(UserError, match=r"no layer 'relu3_4'; valid: relu1_1, relu1_2, .*, relu5_3"):
        VGG16Features(("relu1_2", "relu3_4"))
    with pytest.raises(UserError, match="no layer is named"):
        VGG16Features(())
    with pytest.raises(UserError, match=r"torchvison: no such file; VGG16's weights are 'torchvision', 'stlpips' or a"):
        load_vgg16("torchvison")


def test_an_evaluation_first_leaves_weights_that_training_can_use() -> None:
    """On a CPU the first pass lays the weights out anew."""
    network = VGG16Features(("relu1_2",))
    with torch.inference_mode():
        network(torch.zeros(1, 3, 8, 8))
    image = torch.zeros(1, 3, 8, 8, requires_grad=True)
    network(image)["relu1_2"].sum().backward()
    assert image.grad is not None
