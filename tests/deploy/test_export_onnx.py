"""ONNX files: the same pictures as PyTorch makes, at every size, in one file that holds no trace of this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn
from whole_set import evaluate_sr

from hpcdistill.deploy.description import METADATA_KEY, Description, describe
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.formats.onnx import Onnx, _sealed
from hpcdistill.deploy.model import Model, TorchSession, load, load_network
from hpcdistill.deploy.pictures import Picture
from hpcdistill.deploy.rgb_graph import rgb_graph
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.deploy.verification import photograph
from hpcdistill.errors import UserError
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import load_generator
from hpcdistill.models.sr_network import build_network
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.colour import luma, with_luma

SIZES = [(1, 1), (1, 7), (2, 3), (37, 53), (64, 48)]
Exported = tuple[nn.Module, Description, Path]


def exported(network: nn.Module, about: Description, folder: Path, options: Options | None = None) -> Exported:
    assert Onnx().write(network, about, folder / "network.onnx", options or Options()) == (folder / "network.onnx",)
    return network, about, folder / "network.onnx"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The shipped x4 student, a network of luma with a bicubic residual."""
    network, about, _ = load_network(pretrained_file("pretrained:x4"))
    return exported(network, about, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    network = build_generator("resnet", ngf=4, blocks=2, separable=True)
    about = describe(network, {}, Path("resnet"))
    return exported(network.deploy(), about, tmp_path_factory.mktemp("resnet"))


def run(path: Path, image: Tensor) -> Tensor:
    """By onnxruntime alone, as somebody else's program would."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": np.ascontiguousarray(image.numpy())})[0])


def real(about: Description, size: tuple[int, int]) -> Tensor:
    """[2, C, H, W]: two parts of a photograph."""
    image = photograph(replace(about, scale=1))[1]
    parts = [image[0, :, top : top + size[0], 60 : 60 + size[1]] for top in (30, 110)]
    return torch.from_numpy(np.stack(parts))


def difference(left: Tensor, right: Tensor) -> float:
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    return float((left - right).abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_luma_is_pytorchs(student: Exported, size: tuple[int, int]) -> None:
    network, about, path = student
    both = real(about, size)
    for image in (both, both[:1], both[[0, 1, 0]]):
        with torch.no_grad():
            assert difference(run(path, image), network(image)) <= 1e-6


def test_the_rgb_graph_is_luma_chroma_and_clamp(student: Exported, tmp_path: Path) -> None:
    network, about, _ = student
    graph, inner = rgb_graph(network, about)
    assert (inner.colour, inner.channels, inner.overlap) == ("rgb", 3, 7)
    path = exported(graph, inner, tmp_path)[2]

    def by_parts(image: Tensor) -> Tensor:
        with torch.no_grad():
            return with_luma(upsample(image, 4), network(luma(image)))

    for size in SIZES:
        image = real(inner, size)
        assert difference(run(path, image), by_parts(image).clamp(0, 1)) <= 1e-6
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert by_parts(noise).min() < -0.1
    assert difference(run(path, noise), by_parts(noise).clamp(0, 1)) <= 1e-5


def test_an_rgb_graph_reads_as_far_as_chroma_does(student: Exported) -> None:
    network, about, _ = student
    assert rgb_graph(network, about.tiled(0))[1].overlap == 2
    assert rgb_graph(network, about.tiled(None))[1].overlap is None


@pytest.mark.parametrize("name", ["vdsr", "idn"])
def test_networks_with_a_bicubic_skip_are_pytorchs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(name, 3).deploy()
    path = exported(network, describe(network, {}, tmp_path), tmp_path)[2]
    image = torch.rand(2, 1, 11, 14)
    with torch.no_grad():
        expected = network(image)
    assert difference(run(path, image), expected) <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_the_file_says_what_it_eats(student: Exported) -> None:
    _, about, path = student
    model = onnx.load(path)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert Description.from_json(texts[METADATA_KEY], "it") == about
    assert "(16 + 65.481 R + 128.553 G + 24.966 B) / 255" in texts["input"]
    assert texts["sizes"] == "any height and width of 1 pixel or more"
    assert texts["licence"] == about.licence
    assert texts["task"] == "super-resolution x4"
    assert [[axis.dim_param or axis.dim_value for axis in end.type.tensor_type.shape.dim] for end in (
        *model.graph.input, *model.graph.output
    )] == [["batch", 1, "height", "width"], ["batch", 1, "4*height", "4*width"]]  # fmt: skip
    assert [entry.version for entry in model.opset_import] == [18]
    assert model.ir_version == 8  # what goes with it; PyTorch writes 10, which onnxruntime before 1.18 refuses
    onnx.checker.check_model(model, full_check=True)


def test_nothing_of_this_machine_is_inside_and_nothing_lies_beside(student: Exported) -> None:
    path = student[2]
    content = path.read_bytes()
    for trace in (str(Path(__file__).parents[2]), "site-packages", "File ", "stack_trace", "hpcdistill.models"):
        assert trace.encode() not in content
    assert list(path.parent.iterdir()) == [path]
    assert not any(node.metadata_props or node.doc_string for node in onnx.load(path).graph.node)


def test_the_same_network_gives_the_same_bytes(student: Exported, tmp_path: Path) -> None:
    network, about, path = student
    assert exported(network, about, tmp_path)[2].read_bytes() == path.read_bytes()


def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path: Path) -> None:
    network = build_network("fsrcnn", 2).deploy()
    about = describe(network, {}, tmp_path)
    for opset in (11, 99):
        with pytest.raises(UserError, match=f"--opset {opset}: .*18.*leave --opset out"):
            Onnx().write(network, about, tmp_path / "a.onnx", Options(opset=opset))
    assert not list(tmp_path.iterdir())
    Onnx().write(network, about, tmp_path / "a.onnx", Options(opset=20))
    assert [entry.version for entry in onnx.load(tmp_path / "a.onnx").opset_import] == [20]


def test_half_keeps_float32_outside(student: Exported, tmp_path: Path) -> None:
    network, about, whole = student
    path = exported(network, about, tmp_path, Options(half=True))[2]
    kinds = {item.data_type for item in onnx.load(path).graph.initializer if item.name.endswith(".weight")}
    assert kinds == {TensorProto.FLOAT16}
    assert path.stat().st_size < 0.6 * whole.stat().st_size
    image = torch.from_numpy(photograph(about)[1])
    with torch.no_grad():
        assert 1e-5 < difference(run(path, image), network(image)) <= 1 / 255


class Trained(nn.Module):
    """What behaves otherwise in training: Dropout, and statistics that were tracked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)
        self.norm.running_mean = torch.tensor([0.3, -0.2, 0.1])
        self.norm.running_var = torch.tensor([2.0, 0.5, 4.0])

    def forward(self, image: Tensor) -> Tensor:
        made: Tensor = self.dropout(self.norm(image))
        return made


def test_a_network_left_in_training_mode_is_written_as_in_evaluation(tmp_path: Path) -> None:
    network = Trained().train()
    path = exported(network, Description("super-resolution", "Trained"), tmp_path)[2]
    assert network.training  # it is a copy that was changed
    image = torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([2.0, 0.5, 4.0])
    by_hand = (image - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    assert difference(run(path, image), by_hand) <= 1e-6


def test_a_resnet_takes_any_picture_through_its_model(resnet: Exported) -> None:
    network, about, path = resnet
    pixels = np.random.default_rng(0).integers(0, 256, (66, 50, 3), dtype=np.uint8)
    expected = Model(about, TorchSession(network))(Image.fromarray(pixels))
    made = load(path)(Image.fromarray(pixels))
    assert made.size == (50, 66)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).max() <= 1  # a rounding that falls otherwise
    assert np.mean(np.asarray(made) != np.asarray(expected)) < 1e-3


def test_a_resnet_makes_nothing_larger_without_a_word(resnet: Exported) -> None:
    """At 66x66 the graph would make 68x68, or break inside onnxruntime."""
    opened = Onnx().open(resnet[2])
    assert (opened.about.multiple, opened.about.smallest) == (4, 8)
    axes = onnx.load(resnet[2]).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param for axis in axes][2:] == ["4*h", "4*w"]
    with pytest.raises(UserError, match=r"network\.onnx"):
        opened.session(np.zeros((1, 3, 66, 66), np.float32))


@pytest.mark.parametrize("size", [(8, 8), (8, 24), (40, 56)])
def test_a_unet_takes_every_multiple(size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_generator("unet", ngf=4, levels=3).deploy()
    path = exported(network, describe(network, {}, tmp_path), tmp_path)[2]
    image = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        assert difference(run(path, image), network(image)) <= 1e-6


def test_tiles_are_the_whole(student: Exported) -> None:
    model = load(student[2])
    picture = Picture(np.random.default_rng(0).integers(0, 65536, (61, 75, 3), dtype=np.uint16))
    whole, tiled = (np.concatenate(list(model.strips(picture, tile))).astype(int) for tile in (None, 20))
    assert whole.shape == (244, 300, 3)
    assert np.abs(whole - tiled).max() <= 1  # of 65,535: a rounding that falls otherwise


class Graph(nn.Module):
    """A session as a network, for the evaluation."""

    takes = "lr"
    channels = 1

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = load(path).session

    def forward(self, image: Tensor) -> Tensor:
        return torch.from_numpy(self.session(np.ascontiguousarray(image.numpy())))


def test_set5_has_the_psnr_of_its_network(student: Exported, test_data: Path) -> None:
    images = load_test_set(test_data / "sr_test" / "Set5" / "HR", 4)
    own = evaluate_sr(load_generator(pretrained_file("pretrained:x4"))[0], images, 4)
    graph = evaluate_sr(Graph(student[2]), images, 4)
    assert own.metrics["psnr"] > 30  # the shipped student's, above bicubic's 28.4
    assert graph.metrics["psnr"] == pytest.approx(own.metrics["psnr"], abs=0.01)


def without_metadata(model: Any) -> None:
    del model.metadata_props[:]


def foreign_metadata(model: Any) -> None:
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value='{"task": "translation"}')


def external_data(model: Any) -> None:
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.bin")
    model.graph.initializer[0].ClearField("raw_data")


def external_data_in_a_constant(model: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "constant")
    onnx.external_data_helper.set_external_data(tensor, "/etc/hostname")
    tensor.ClearField("raw_data")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def custom_operator(model: Any) -> None:
    model.graph.node[0].domain = "somebody.else"
    model.opset_import.append(helper.make_opsetid("somebody.else", 1))


def other_names(model: Any) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "result"


DAMAGES = [
    (without_metadata, "is no ONNX file that hpcdistill exported"),
    (foreign_metadata, "its metadata is not hpcdistill's"),
    (external_data, "keeps weights in another file"),
    (external_data_in_a_constant, "keeps weights in another file"),
    (custom_operator, "operators of its own"),
    (other_names, "is no ONNX file that hpcdistill exported"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_file_that_is_not_ours_is_one_line(
    damage: Callable[[Any], None], words: str, student: Exported, tmp_path: Path
) -> None:
    model = onnx.load(student[2])
    damage(model)
    path = tmp_path / "other.onnx"
    path.write_bytes(_sealed(model.SerializeToString()))  # nobody's checksum helps against what is meant
    with pytest.raises(UserError, match=rf"other\.onnx: .*{words}.*export") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(student: Exported, tmp_path: Path) -> None:
    content = student[2].read_bytes()
    for number, damaged in enumerate((b"", b"\0" * 99, content[: len(content) // 2], content[:-1], b"no model")):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{number}\.onnx"):
            load(path)


def test_one_wrong_bit_is_found_before_anything_runs(student: Exported, tmp_path: Path) -> None:
    """In a padding it would have onnxruntime take all memory, in a weight it would make another picture."""
    content = student[2].read_bytes()
    path = tmp_path / "flipped.onnx"
    for place in range(100, len(content), 1499):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"flipped\.onnx"):
            load(path)


def test_a_scale_that_is_another_is_found_when_it_runs(student: Exported, tmp_path: Path) -> None:
    network, about, _ = student
    path = exported(network, replace(about, scale=2), tmp_path)[2]
    with pytest.raises(UserError, match="its metadata says otherwise"):
        load(path)(Image.new("L", (9, 9)))


def test_missing_packages_are_named_with_their_extra(student: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    network, about, path = student
    for action in (lambda: Onnx().check(network, about, Options()), lambda: Onnx().open(path)):
        with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime, which are not installed: .*\[export\]"):
            action()
