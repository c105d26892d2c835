"""Pictures through networks: against the networks themselves, and against hand-made colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from tiny_runs import tiny_variant, trained

from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.model import Model, TorchSession, load, load_network
from hpcdistill.deploy.pictures import Picture
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.deploy.tiles import pieces
from hpcdistill.errors import UserError
from hpcdistill.metrics.sample_grid import bicubic_image, colourise
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.sr_network import build_network
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.colour import luma

PHOTO = np.ascontiguousarray(astronaut()[20:83, 190:255])  # a face, 63x65


@pytest.fixture(scope="module")
def student() -> Model:
    return load("pretrained:x4")


def saved(network: torch.nn.Module, path: Path) -> Path:
    save_generator(network, path)
    return path


def test_a_photograph_becomes_what_evaluation_measures(student: Model) -> None:
    network, _ = load_generator(pretrained_file("pretrained:x4"))
    planes = torch.from_numpy(PHOTO.transpose(2, 0, 1)).float()[None] / 255
    with torch.no_grad():
        expected = colourise(network(luma(planes))[0], PHOTO, 4)
    made = np.asarray(student(Image.fromarray(PHOTO)))
    assert made.shape == (252, 260, 3)
    difference = np.abs(made.astype(int) - expected)
    assert difference.max() <= 1  # a value at .5
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("network", ["fsrcnn", "idn"])
@pytest.mark.parametrize(("scale", "tile"), [(2, 17), (3, 40), (4, 64)])
def test_tiles_equal_the_whole(network: str, scale: int, tile: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = build_network(network, scale, residual="bicubic", first_weights="pytorch")
    model = load(saved(built, tmp_path / "n.safetensors"))
    planes = luma(torch.from_numpy(PHOTO.transpose(2, 0, 1)).float()[None] / 255).numpy()
    whole = model.session(planes)
    assert whole.std() > 0.1
    overlap = model.about.overlap
    assert overlap is not None
    for strip in pieces(63, 65, tile, overlap):
        for piece in strip:
            (top, bottom), (left, right) = piece.from_rows, piece.from_columns
            made = model.session(np.ascontiguousarray(planes[..., top:bottom, left:right]))
            rows, columns = (slice(first * scale, last * scale) for first, last in (piece.rows, piece.columns))
            inner = made[..., rows.start - top * scale :, columns.start - left * scale :]
            inner = inner[..., : rows.stop - rows.start, : columns.stop - columns.start]
            np.testing.assert_allclose(inner, whole[..., rows, columns], rtol=0, atol=1e-6)


def test_a_picture_in_tiles_equals_the_whole_and_a_smaller_overlap_would_not(student: Model) -> None:
    deep = Picture(PHOTO.astype(np.uint16) * 257)  # a step is 1.5e-5: more than rounding leaves
    [whole] = student.strips(deep)
    assert np.abs(whole.astype(int) - np.concatenate(list(student.strips(deep, 20)))).max() <= 1
    narrow = Model(student.about.tiled(5), student.session)
    assert np.abs(whole.astype(int) - np.concatenate(list(narrow.strips(deep, 20)))).max() > 1


def test_gray_alpha_and_depth_stay(student: Model) -> None:
    gray = PHOTO[..., 1]
    as_rgb = np.asarray(student(Image.fromarray(np.repeat(gray[..., None], 3, axis=2))))
    made = student(Image.fromarray(gray))
    assert made.mode == "L"
    assert np.abs(np.asarray(made).astype(int) - as_rgb[..., 0]).max() <= 1  # gray is RGB of three equal channels
    rgba = np.dstack([PHOTO, gray])
    with_alpha = np.asarray(student(Image.fromarray(rgba)))
    np.testing.assert_array_equal(with_alpha[..., :3], np.asarray(student(Image.fromarray(PHOTO))))
    expected = bicubic_image(np.repeat(gray[..., None], 3, axis=2), 4)[..., 0]
    np.testing.assert_array_equal(with_alpha[..., 3], expected)
    deep = np.asarray(student(Image.fromarray(gray.astype(np.uint16) * 257))).astype(float)
    assert np.abs(deep / 257 - np.asarray(made)).max() <= 0.51
    assert len(np.unique(deep)) > 300  # not 8 bits in disguise


def test_an_rgb_network_takes_rgb_in_this_order(tmp_path: Path) -> None:
    network = build_network("fsrcnn", 2, 3, residual="bicubic")
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        network.upsampling.conv.bias[:] = torch.tensor([0.1, 0.0, -0.1])  # type: ignore[union-attr,index]
    made = np.asarray(load(saved(network, tmp_path / "rgb.safetensors"))(Image.fromarray(PHOTO)))
    planes = torch.from_numpy(PHOTO.transpose(2, 0, 1)).double() / 255
    shifted = upsample(planes, 2) + torch.tensor([0.1, 0.0, -0.1]).view(3, 1, 1)
    expected = (shifted * 255).clamp(0, 255).round().permute(1, 2, 0).numpy()
    assert np.abs(made - expected).max() <= 1
    assert (made != expected).mean() < 1e-3


def test_translation_takes_any_size_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_generator("resnet", ngf=4, blocks=2).eval()
    model = load(saved(network, tmp_path / "g.safetensors"))
    for height, width in ((63, 65), (8, 8), (9, 3), (1, 1), (2, 30)):
        pixels = PHOTO[:height, :width]
        down = max(8, -(-height // 4) * 4) - height
        across = max(8, -(-width // 4) * 4) - width
        padded = np.pad(pixels, ((0, down), (0, across), (0, 0)), mode="reflect")
        with torch.no_grad():
            image = torch.from_numpy(padded.transpose(2, 0, 1)).float()[None] / 127.5 - 1
            expected = ((network(image)[0] + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0).numpy()
        made = np.asarray(model(Image.fromarray(pixels)))
        assert made.shape == pixels.shape
        assert np.abs(made - expected[:height, :width]).max() <= 1, (height, width)
    with pytest.raises(UserError, match="has no exact tiles"):
        model(Image.fromarray(PHOTO), tile=32)


def test_translation_keeps_alpha(tmp_path: Path) -> None:
    model = load(saved(build_generator("unet", ngf=4, levels=3), tmp_path / "u.safetensors"))
    rgba = np.dstack([PHOTO, PHOTO[..., 0]])
    np.testing.assert_array_equal(np.asarray(model(Image.fromarray(rgba)))[..., 3], PHOTO[..., 0])


def test_what_takes_the_strips_is_not_in_inference_mode(student: Model, tmp_path: Path) -> None:
    """A generator's context is its caller's too while it waits: what that computes would have no gradients."""
    translator = load(saved(build_generator("unet", ngf=4, levels=3), tmp_path / "u.safetensors"))
    for model in (student, translator):
        strips = model.strips(Picture(PHOTO), tile=16 if model is student else None)
        next(strips)
        assert not torch.is_inference_mode_enabled()


def test_an_exported_file_has_no_other_networks(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    for wanted in ({"which": "last"}, {"generator": "teacher"}):
        option = next(iter(wanted))
        with pytest.raises(UserError, match=rf"--{option} \w+: .*a\.onnx is one exported network; leave it out"):
            load(tmp_path / "a.onnx", **wanted)


def test_shipped_students_by_their_short_names() -> None:
    for scale in (2, 3, 4):
        assert f"-x{scale}-" in pretrained_file(f"pretrained:x{scale}").name
    with pytest.raises(UserError, match=r"pretrained:x5: no such weights are shipped; .*x"):
        pretrained_file("pretrained:x5")


def test_what_makes_no_picture_is_refused(tmp_path: Path) -> None:
    teacher = PrivilegedTeacher(scale=2, channels=1)
    cases = {
        "teacher": (teacher, "sees the high-resolution image"),
        "judge": (PatchDiscriminator(6, ndf=4), "makes no picture of a picture"),
        "maps": (build_generator("resnet", ngf=4, blocks=1, channels_in=1), "only RGB to RGB"),
    }
    for name, (network, words) in cases.items():
        with pytest.raises(UserError, match=words):
            load(saved(network, tmp_path / f"{name}.safetensors"))
    with pytest.raises(UserError, match="no such"):
        load(tmp_path / "nothing")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network = build_network("fsrcnn", 2)
    with torch.no_grad():
        network.expanding[0].weight[0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(UserError, match="no finite numbers; its training went wrong"):
        load(saved(network, tmp_path / "n.safetensors"))


def test_outputs_that_are_no_numbers_are_refused() -> None:
    def nothing(images: np.ndarray) -> np.ndarray:
        return np.full((1, 1, images.shape[2] * 2, images.shape[3] * 2), np.inf, np.float32)

    model = Model(Description("super-resolution", "X", scale=2, colour="luma", overlap=1), nothing, "x.onnx")
    with pytest.raises(UserError, match=r"x\.onnx: makes values that are no numbers"):
        model(Image.fromarray(PHOTO))


def test_without_memory_one_line() -> None:
    def full(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    model = Model(Description("super-resolution", "X", scale=2, colour="luma", overlap=1), full, "x")
    with pytest.raises(UserError, match="no memory for a picture of 65x63; choose a smaller --tile"):
        model(Image.fromarray(PHOTO))


def test_a_run_says_what_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = trained("configs/fsrcnn/x2.yaml", tiny_variant(tmp_path), f"runs={tmp_path / 'runs'}")
    [run] = (tmp_path / "runs").iterdir()
    about = load(run).about
    assert (about.method, about.data, about.run, about.steps) == (
        "plain_sr",
        "images of one's own (packed, all)",
        run.name,
        2,
    )
    assert result["steps"] == 2
    (run / "result.json").unlink()
    capsys.readouterr()
    load(run, which="last")
    assert "has not finished; taken are the last weights, of step 2" in " ".join(capsys.readouterr().err.split())


def test_a_description_survives_json_and_nothing_else_does() -> None:
    network, notes = load_generator(pretrained_file("pretrained:x3"))
    about = describe(network, notes, Path("x.safetensors"))
    assert (about.scale, about.colour, about.channels) == (3, "luma", 1)
    assert about.licence.startswith("non-commercial research only")
    text = about.to_json()
    assert Description.from_json(text, "file") == about
    assert "/" not in json.loads(text)["run"]
    for broken in ("", "[]", "{}", text.replace('"scale": 3', '"scale": 0'), text.replace('"luma"', '"cmyk"')):
        with pytest.raises(UserError, match=r"x\.onnx: its metadata is not hpcdistill's"):
            Description.from_json(broken, "x.onnx")


def test_sessions_run_the_inference_form() -> None:
    network, about, _ = load_network(pretrained_file("pretrained:x2"))
    assert network.arguments["upsampling"] == "subpixel"  # type: ignore[index,call-overload]
    assert not network.training
    image = np.random.default_rng(0).random((2, 1, 5, 9), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(TorchSession(network)(image), expected, atol=1e-6, rtol=0)
    assert about.overlap == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [("photo.png", "give a PIL image, not a str"), (PHOTO, "not a ndarray"), (Image.new("RGB", (0, 5)), "no pixels")],
)
def test_what_is_no_picture_is_one_line(given: object, words: str, student: Model) -> None:
    with pytest.raises(UserError, match=words):
        student(given)  # type: ignore[arg-type]


def test_a_tile_of_nothing_is_refused(student: Model) -> None:
    for tile in (0, -3):
        with pytest.raises(UserError, match=f"--tile {tile}: give a number of pixels"):
            student(Image.fromarray(PHOTO), tile=tile)


def test_data_sets_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's paths are from the folder that it was started in, beside which its runs lie."""
    variant = tiny_variant(tmp_path)
    config = Path("configs/fsrcnn/x2.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    trained(str(config), variant, "data.train=packed", "runs=runs")
    [run] = (tmp_path / "runs").iterdir()
    (tmp_path / "elsewhere").mkdir()
    here = load(run.resolve()).about
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(tmp_path / "runs" / run.name).about == here
    assert here.licence == "what their owner says"
