"""Test sets from folders and packed data, the evaluation of stub generators, and bicubic's published numbers."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn
from whole_set import evaluate_sr

from hpcdistill.data.index import Index, Member, Sample, Shard
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import UserError
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.psnr_ssim import Rule
from hpcdistill.metrics.run_evaluators import SRRunEvaluator
from hpcdistill.metrics.sr_evaluation import (
    PSNR_CAP,
    BicubicUpsampler,
    SREvaluator,
    bicubic_upsampler,
)
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.ops.bicubic import downsample_uint8, upsample

# Bicubic's PSNR and SSIM in the literature's tables.
PUBLISHED = {
    ("Set5", 2): (33.66, 0.9299),
    ("Set14", 2): (30.24, 0.8688),
    ("B100", 2): (29.56, 0.8431),
    ("Set5", 3): (30.39, 0.8682),
    ("Set14", 3): (27.55, 0.7742),
    ("B100", 3): (27.21, 0.7385),
    ("Set5", 4): (28.42, 0.8104),
    ("Set14", 4): (26.00, 0.7027),
    ("B100", 4): (25.96, 0.6675),
}


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """`[height, width, 3]` uint8 with structure at several sizes."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / a + columns / b) for a, b in generator.uniform(2, 9, (3, 2))]
    return np.clip(128 + 70 * np.stack(waves, -1) + generator.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def write_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        Image.fromarray(picture(height, width, seed)).save(folder / name)
    return folder


def write_packed(folder: Path, images: dict[str, dict[str, np.ndarray]], scales: tuple[int, ...] = (2, 3, 4)) -> Path:
    """A packed data set written with the standard library alone: key -> member suffix -> pixels."""
    folder.mkdir(parents=True)
    shard = folder / "shard-000000.tar"
    places: dict[tuple[str, str], tuple[int, int]] = {}
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in images.items():
            for suffix, pixels in members.items():
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, format="PNG")
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content.getvalue())
                places[key, suffix] = tar.offset + 512, entry.size
                tar.addfile(entry, io.BytesIO(content.getvalue()))
    content = shard.read_bytes()
    samples = tuple(
        Sample(
            key,
            f"{key}_source.png",
            0,
            {suffix: Member(*places[key, suffix], *pixels.shape[:2]) for suffix, pixels in members.items()},
        )
        for key, members in images.items()
    )
    shards = (Shard(shard.name, len(content), hashlib.sha256(content).hexdigest()),)
    Index("folder", "all", "lr-hr", scales, "CC0", "made up", shards, samples).save(folder)
    return folder


def members_of(image: np.ndarray) -> dict[str, np.ndarray]:
    members = {"hr.png": image}
    for scale in (2, 3, 4):
        height, width = image.shape[0] // scale * scale, image.shape[1] // scale * scale
        members[f"lr{scale}.png"] = downsample_uint8(image[:height, :width], scale)
    return members


class Stub(nn.Module):
    """A generator that records what it is given and answers with `answer(image)`."""

    def __init__(self, scale: int, channels: int, takes: str, answer: Any) -> None:
        super().__init__()
        self.scale, self.channels, self.takes, self.answer = scale, channels, takes, answer
        self.dropout = nn.Dropout(0.5)
        self.given: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.given.append(image)
        return self.dropout(self.answer(image))


def nearest(scale: int) -> Any:
    return lambda image: image.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def luma_float(image: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def test_folder_of_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", {"a10.png": (41, 50), "a2.png": (30, 33), "b.bmp": (24, 36)})
    images = load_test_set(folder, 4)
    assert len(images) == 3
    assert images.names == ("a2", "a10", "b")
    name, hr, lr = images[1]
    assert (name, hr.shape, lr.shape) == ("a10", (40, 48, 3), (10, 12, 3))
    assert np.array_equal(hr, np.asarray(Image.open(folder / "a10.png"))[:40, :48])
    assert np.array_equal(lr, downsample_uint8(hr, 4))
    assert [image[0] for image in images] == ["a2", "a10", "b"]


def test_folder_with_hr_inside(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "HR", {"x.png": (24, 24)})
    write_images(tmp_path / "set" / "LR_bicubic", {"x.png": (6, 6)})
    assert load_test_set(tmp_path / "set", 2)[0][1].shape == (24, 24, 3)


def test_names_that_clash_keep_their_suffix(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"x.bmp": (24, 24), "x.png": (24, 24), "y.png": (24, 24)})
    assert load_test_set(folder, 2).names == ("x.bmp", "x.png", "y")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load_test_set(tmp_path / "missing", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        load_test_set(tmp_path / "empty", 2)
    folder = write_images(tmp_path / "tiny", {"dot.png": (3, 9)})
    with pytest.raises(UserError, match=r"dot\.png: 9x3 is too small for x4"):
        load_test_set(folder, 4)[0]
    (tmp_path / "tiny" / "dot.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"dot\.png"):
        load_test_set(folder, 2)[0]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_packed_equals_the_folder_it_was_made_from(tmp_path: Path, scale: int) -> None:
    sizes = {"a_source.png": (61, 50), "b_source.png": (64, 48)}
    folder = write_images(tmp_path / "images", sizes)
    packed = write_packed(
        tmp_path / "packed",
        {name[0]: members_of(picture(*size, seed)) for seed, (name, size) in enumerate(sizes.items())},
    )
    for (name, hr, lr), (packed_name, packed_hr, packed_lr) in zip(
        load_test_set(folder, scale), load_test_set(packed, scale), strict=True
    ):
        assert name == packed_name
        assert np.array_equal(hr, packed_hr)
        assert np.array_equal(lr, packed_lr)


def test_bad_packed_sets(tmp_path: Path) -> None:
    members = members_of(picture(48, 48, 0))
    packed = write_packed(tmp_path / "good", {"a": members})
    with pytest.raises(UserError, match="good: packed for x2, x3, x4, not for x8"):
        load_test_set(packed, 8)
    with open(packed / "shard-000000.tar", "rb+") as shard:
        shard.truncate(700)
    with pytest.raises(UserError, match=r"shorter than index\.json says"):
        load_test_set(packed, 2)[0]
    (packed / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar: no such shard"):
        load_test_set(packed, 2)[0]
    other = write_packed(tmp_path / "other", {"a": {**members, "lr2.png": members["lr3.png"]}})
    with pytest.raises(UserError, match="HR 48x48 does not belong to LR 16x16 at x2"):
        load_test_set(other, 2)[0]
    split = write_packed(tmp_path / "splits" / "test", {"a": members}).parent
    with pytest.raises(UserError, match="has the splits test"):
        load_test_set(split, 2)


@pytest.mark.parametrize(
    ("part", "key", "value", "fault"),
    [
        ("samples", "shard", 9, "lies in shard 9 of 1"),
        ("samples", "shard", -1, r"samples\.0\.shard: expected greater than or equal to 0"),
        ("samples", "key", "../../x", r"samples\.0\.key: "),
        ("samples", "source", 3, r"samples\.0\.source: "),
        ("members", "length", 10**18, "ends behind the end of"),
        ("members", "offset", -5, r"members\.hr\.png\.offset: "),
        ("members", "height", 10**12, r"members\.hr\.png\.height: "),
        ("shards", "name", 3, r"shards\.0\.name: "),
        ("shards", "name", "../../x.tar", r"shards\.0\.name: "),
        ("shards", "length", None, r"shards\.0\.length: "),
    ],
)
def test_an_index_is_checked_before_anything_is_read(
    part: str, key: str, value: object, fault: str, tmp_path: Path
) -> None:
    folder = write_packed(tmp_path / "inner" / "packed", {"0": members_of(picture(16, 16, 0))})
    file = folder / "index.json"
    index = json.loads(file.read_text())
    for shard in folder.glob("*.tar"):
        (tmp_path / "x.tar").write_bytes(shard.read_bytes())
    inner = index["samples"][0]["members"]["hr.png"] if part == "members" else index[part][0]
    inner[key] = value
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=fault) as caught:
        load_test_set(folder, 2)[0]
    assert str(folder) in str(caught.value)


def test_a_sample_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """`--save-images` would write both under one name."""
    folder = write_packed(tmp_path / "packed", {"0": members_of(picture(16, 16, 0))})
    index = json.loads((folder / "index.json").read_text())
    index["samples"] *= 2
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: damaged \(a sample is listed twice\)"):
        load_test_set(folder, 2)


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_by_hand(tmp_path: Path, rule: Rule, channels: int) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60), "b.png": (44, 36)})
    generator = Stub(2, channels, "lr", nearest(2)).train()
    generator.dropout.eval()
    images = load_test_set(folder, 2)
    result = evaluate_sr(generator, images, 2, rule)
    assert result.images == 2
    assert generator.training
    assert not generator.dropout.training
    for (name, hr, lr), row, given in zip(images, result.per_image, generator.given, strict=True):
        # The same in NumPy: nearest enlargement of luma or RGB, rounding, luma, shave, PSNR.
        reference = luma_float(hr)
        if channels == 1:
            assert np.allclose(given[0, 0].numpy() * 255, luma_float(lr), atol=1e-4)
            output = np.round(luma_float(lr).repeat(2, 0).repeat(2, 1))
        else:
            assert np.array_equal(np.round(given[0].numpy() * 255), np.moveaxis(lr, -1, 0))
            output = luma_float(lr.repeat(2, 0).repeat(2, 1))
        if rule == "matlab":
            output, reference = np.round(output), np.round(reference)
        expected = peak_signal_noise_ratio(reference[2:-2, 2:-2], output[2:-2, 2:-2], data_range=255)
        assert row["name"] == name
        assert row["psnr"] == pytest.approx(expected, abs=1e-4)
    assert result.metrics["psnr"] == pytest.approx(np.mean([row["psnr"] for row in result.per_image]), abs=1e-12)
    assert result.metrics["ssim"] == pytest.approx(np.mean([row["ssim"] for row in result.per_image]), abs=1e-12)


@pytest.fixture
def gray(tmp_path: Path) -> Path:
    """A gray file, and the same pixels as RGB of equal channels."""
    (tmp_path / "gray").mkdir()
    pixels = picture(40, 60, 3)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "gray" / "a.png")
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "gray" / "b.png")
    return tmp_path / "gray"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gray_image_by_hand(gray: Path, channels: int) -> None:
    """`matlab`: it is its own luma. `pisr`, and RGB of the same pixels by either: 16 + 219/255 of it."""
    pixels = np.asarray(Image.open(gray / "a.png")).astype(np.float64)
    images = load_test_set(gray, 2)
    small = images[0][2][..., 0].astype(np.float64)
    for rule in ("matlab", "pisr"):
        generator = Stub(2, channels, "lr", nearest(2))
        result = evaluate_sr(generator, images, 2, rule)
        for row, given in zip(result.per_image, generator.given, strict=True):
            full = rule == "matlab" and row["name"] == "a"
            lr, hr = ((image if full else 16 + image * 219 / 255) for image in (small, pixels))
            fed = lr if channels == 1 else small
            assert np.allclose(given[0, 0].numpy() * 255, fed, atol=1e-4)
            output = lr.repeat(2, 0).repeat(2, 1)
            if rule == "matlab":
                output, hr = np.round(output), np.round(hr)
            elif channels == 1:
                output = np.round(output)
            expected = peak_signal_noise_ratio(hr[2:-2, 2:-2], output[2:-2, 2:-2], data_range=255)
            assert row["psnr"] == pytest.approx(expected, abs=1e-4)
    assert images.taken_as_gray("matlab") == ["a"]


def test_an_rgb_output_beside_a_gray_image(gray: Path) -> None:
    """Its luma is MATLAB's rgb2gray: 0.299 R + 0.587 G + 0.114 B over the whole range."""
    images = load_test_set(gray, 2)
    tint = torch.tensor([30.0, -20.0, 10.0])[:, None, None] / 255
    result = evaluate_sr(Stub(2, 3, "lr", lambda image: nearest(2)(image) * 0 + 0.5 + tint), images, 2, "matlab")
    level = np.round(0.299 * 158 + 0.587 * 108 + 0.114 * 138)  # 127.5 + tint, each channel rounded half to even
    reference = np.asarray(Image.open(gray / "a.png")).astype(np.float64)[2:-2, 2:-2]
    expected = peak_signal_noise_ratio(reference, np.full_like(reference, level), data_range=255)
    assert result.per_image[0]["psnr"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_a_packed_gray_image_is_the_folder_s(gray: Path, tmp_path: Path, rule: Rule) -> None:
    pack(load_recipe("folder"), gray, tmp_path / "packed", processes=1)
    folder, packed = load_test_set(gray, 3), load_test_set(tmp_path / "packed", 3)
    assert packed.taken_as_gray(rule) == folder.taken_as_gray(rule) == ["a"] * (rule == "matlab")
    assert (packed.lr, folder.lr) == ("newer", "newer")
    results = [evaluate_sr(bicubic_upsampler(3), images, 3, rule) for images in (folder, packed)]
    assert results[0] == results[1]
    evaluator = SREvaluator({"set": tmp_path / "packed"}, 3, 1, rule)
    assert evaluator.result("set", evaluator.bicubic()["set"]) == results[1]


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_a_run_s_result_says_how_lr_was_made_and_what_is_gray(gray: Path, tmp_path: Path, rule: Rule) -> None:
    pack(load_recipe("folder"), gray, tmp_path / "packed", processes=1, resize="older")
    sets, needs = {"x": str(gray), "y": str(tmp_path / "packed")}, Needs("lr-hr", channels=1, scale=2)
    measured = SRRunEvaluator(sets, "x", "student", needs, EvalConfig(rule=rule), Accelerator(cpu=True))
    protocol = measured.protocol()
    assert protocol["lr"] == {"x": "newer", "y": "older"}
    assert protocol.get("gray") == ({"x": ["a"], "y": ["a"]} if rule == "matlab" else None)
    pictures = measured({"student": bicubic_upsampler(2)}, Accelerator(cpu=True)).pictures
    assert set(pictures) == {"student"}


def test_gray_laid_over_a_colour_is_not_gray(tmp_path: Path) -> None:
    for name, alpha in (("a.png", 0), ("b.png", 255)):
        Image.fromarray(np.full((24, 24, 2), (90, alpha), np.uint8)).save(tmp_path / name)
    taken = [load_test_set(tmp_path, 2, colour).taken_as_gray("matlab") for colour in ((9, 9, 9), (255, 0, 0))]
    assert taken == [["a", "b"], ["b"]]


def test_an_earlier_set_does_not_know_what_was_gray(gray: Path, tmp_path: Path) -> None:
    """Its numbers stay what they were: of RGB, and of the LR images that are in it."""
    pack(load_recipe("folder"), gray, tmp_path / "packed", processes=1, resize="exact")
    images = load_test_set(tmp_path / "packed", 4)
    assert images.lr == "exact"
    assert images.taken_as_gray("matlab") == []
    rows = evaluate_sr(bicubic_upsampler(4), images, 4, "matlab").per_image
    assert rows[0]["psnr"] == rows[1]["psnr"]
    _, hr, lr = images[0]
    assert np.array_equal(lr, downsample_uint8(hr, 4, "exact"))
    assert not np.array_equal(lr, downsample_uint8(hr, 4))


def test_a_teacher_is_fed_with_hr_and_equal_images_are_capped(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60)})
    generator = Stub(4, 1, "hr", lambda image: image)
    result = evaluate_sr(generator, load_test_set(folder, 4), 4, "matlab")
    assert generator.given[0].shape == (1, 1, 40, 60)
    assert result.metrics["psnr"] == PSNR_CAP
    assert result.metrics["ssim"] == pytest.approx(1, abs=1e-12)
    assert json.loads(json.dumps(result.per_image, allow_nan=False)) == result.per_image


def test_the_inference_form_is_evaluated(tmp_path: Path) -> None:
    images = load_test_set(write_images(tmp_path, {"a.png": (48, 60)}), 4)
    torch.manual_seed(0)
    generator = FSRCNN(4)
    trained_form = evaluate_sr(Stub(4, 1, "lr", generator.forward), images, 4)
    assert evaluate_sr(generator, images, 4).metrics["psnr"] == pytest.approx(trained_form.metrics["psnr"], abs=1e-3)
    assert generator.training
    assert generator.arguments["upsampling"] == "transposed"
    other = Stub(4, 1, "lr", nearest(4))
    other.deploy = lambda: Stub(4, 1, "lr", upsampled).eval()  # type: ignore[assignment]
    assert evaluate_sr(other, images, 4) == evaluate_sr(Stub(4, 1, "lr", upsampled), images, 4)
    assert not other.given


def upsampled(image: Tensor) -> Tensor:
    return upsample(image, 4)


def test_outputs_that_cannot_be_judged(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60)})
    images = load_test_set(folder, 2)
    for spoilt in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="a: the network's output is not finite"):
            evaluate_sr(Stub(2, 1, "lr", lambda image, spoilt=spoilt: nearest(2)(image) + spoilt), images, 2)
    with pytest.raises(UserError, match="made 90x60 pixels of an image of 30x20, not 60x40"):
        evaluate_sr(Stub(3, 1, "lr", nearest(3)), images, 2)
    small = write_images(tmp_path / "small", {"s.png": (14, 20)})
    with pytest.raises(UserError, match="s: 16x10 pixels are left"):
        evaluate_sr(Stub(2, 1, "lr", nearest(2)), load_test_set(small, 2), 2)


def test_the_mode_is_restored_after_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60)})
    generator = Stub(3, 1, "lr", nearest(3)).train()
    with pytest.raises(UserError):
        evaluate_sr(generator, load_test_set(folder, 2), 2)
    assert generator.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_together_give_the_whole(tmp_path: Path, ranks: int) -> None:
    sizes = {f"i{index}.png": (30 + index, 40) for index in range(4)}
    sets = {"one": write_images(tmp_path / "one", sizes), "two": write_images(tmp_path / "two", {"z.png": (30, 30)})}
    expected = {name: evaluate_sr(bicubic_upsampler(3), load_test_set(path, 3), 3) for name, path in sets.items()}
    evaluators = [SREvaluator(sets, 3, 1) for _ in range(ranks)]
    parts = [evaluator.evaluate(BicubicUpsampler(3), rank, ranks) for rank, evaluator in enumerate(evaluators)]
    for name in sets:
        rows = [row for part in reversed(parts) for row in part[name]]
        assert evaluators[0].result(name, rows) == expected[name]


@pytest.mark.parametrize("evaluated", [True, False], ids=["after an evaluation", "on its own"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_beside_a_run_s_networks(tmp_path: Path, channels: int, evaluated: bool) -> None:
    """Of luma, whatever the networks take, by the run's rule, all images once over the ranks."""
    folder = write_images(tmp_path, {f"i{index}.png": (30 + index, 40) for index in range(5)})
    expected = evaluate_sr(bicubic_upsampler(3), load_test_set(folder, 3), 3, "matlab")
    rows = []
    for rank in range(2):
        evaluator = SREvaluator({"set": folder}, 3, channels, "matlab")
        if evaluated:
            evaluator.evaluate(BicubicUpsampler(3, channels), rank, 2)
        rows += evaluator.bicubic(rank, 2)["set"]
    assert evaluator.result("set", rows) == expected


def test_images_are_decoded_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60), "b.png": (40, 60)})
    evaluator = SREvaluator({"set": folder}, 2, 1)
    evaluator.preload(rank=1, ranks=2)
    (folder / "b.png").unlink()
    first = evaluator.evaluate(BicubicUpsampler(2), 1, 2)
    assert [row["name"] for row in first["set"]] == ["b"]
    assert evaluator.evaluate(BicubicUpsampler(2), 1, 2) == first
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png"):
        evaluator.preload()


def test_samples(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {"a.png": (40, 60), "b.png": (42, 60)})
    evaluator = SREvaluator({"set": folder}, 2, 3)
    samples = evaluator.samples(BicubicUpsampler(2, 3), "set", 1)
    assert [(name, pair.hr.shape, tuple(output.shape)) for name, pair, output in samples] == [
        ("a", (1, 3, 40, 60), (1, 3, 40, 60))
    ]
    assert len(evaluator.samples(BicubicUpsampler(2, 3), "set", 9)) == 2
    _, pair, output = samples[0]
    assert torch.equal(output, upsample(pair.lr.float() / 255, 2))


@pytest.mark.parametrize(("name", "scale"), PUBLISHED)
def test_bicubic_gives_the_published_numbers(test_data: Path, name: str, scale: int) -> None:
    """They are MATLAB's: by that rule, which takes Set14's gray image as it is."""
    psnr, ssim = PUBLISHED[name, scale]
    result = evaluate_sr(bicubic_upsampler(scale), load_test_set(test_data / "sr_test" / name, scale), scale, "matlab")
    assert result.images == {"Set5": 5, "Set14": 14, "B100": 100}[name]
    assert result.metrics["psnr"] == pytest.approx(psnr, abs=0.03)
    assert result.metrics["ssim"] == pytest.approx(ssim, abs=0.002)


def test_one_gray_image_sets_the_rules_apart_on_set14(test_data: Path) -> None:
    """Made RGB, `bridge` gains 1.32 dB (219/255 of its range); `man` is RGB of equal channels, and stays so."""
    images = load_test_set(test_data / "sr_test" / "Set14", 4)
    assert images.taken_as_gray("matlab") == ["bridge"]
    assert images.taken_as_gray("pisr") == []
    by_rule = [evaluate_sr(bicubic_upsampler(4), images, 4, rule) for rule in ("pisr", "matlab")]
    gains = {
        pisr["name"]: pisr["psnr"] - matlab["psnr"]
        for pisr, matlab in zip(by_rule[0].per_image, by_rule[1].per_image, strict=True)
    }
    assert gains.pop("bridge") == pytest.approx(1.32, abs=0.02)
    assert max(map(abs, gains.values())) < 0.03
    assert by_rule[0].metrics["psnr"] - by_rule[1].metrics["psnr"] == pytest.approx(0.095, abs=0.01)


def test_the_rules_differ_as_stated(test_data: Path) -> None:
    images = load_test_set(test_data / "sr_test" / "Set5", 2)
    by_rule = {rule: evaluate_sr(bicubic_upsampler(2), images, 2, rule).metrics["psnr"] for rule in ("pisr", "matlab")}
    assert by_rule["matlab"] == pytest.approx(33.66, abs=0.03)
    assert 0.005 < by_rule["pisr"] - by_rule["matlab"] < 0.03


def test_enlarging_rgb_instead_of_luma_differs_little(test_data: Path) -> None:
    images = load_test_set(test_data / "sr_test" / "Set5", 4)
    luma, rgb = (
        evaluate_sr(bicubic_upsampler(4, channels), images, 4, "matlab").metrics["psnr"] for channels in (1, 3)
    )
    assert 0 < abs(luma - rgb) < 0.015
