"""The export command: where it writes, what it says, and what it does not write over."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpcdistill.deploy.description import METADATA_KEY
from hpcdistill.deploy.formats.base import Opened
from hpcdistill.deploy.formats.onnx import Onnx
from hpcdistill.deploy.formats.torch_export import TorchExport
from hpcdistill.deploy.model import load, load_network
from hpcdistill.deploy.session import Batch
from hpcdistill.errors import UserError
from hpcdistill.export import main
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import save_generator


def saved(folder: Path) -> Path:
    """A small network of luma, in its training form, that makes pictures: a bicubic skip, and a little more."""
    torch.manual_seed(0)
    network = FSRCNN(2, d=8, s=4, m=1, residual="bicubic")
    with torch.no_grad():  # as FSRCNN draws it, what it adds would be nothing
        network.upsampling.conv.weight.mul_(30)
    save_generator(network, folder / "small.safetensors")
    return folder / "small.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The ONNX file of that network."""
    folder = tmp_path_factory.mktemp("exported")
    assert main(["onnx", str(saved(folder)), "--out", str(folder)]) == 0
    return (folder / "small.onnx").read_bytes()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> object:
    """No temporary file or folder, whatever has happened."""
    yield
    assert not list(tmp_path.rglob(".*"))


def refused(*arguments: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)


def test_it_is_named_after_the_network_and_says_how_far_it_is_off(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["onnx", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [file.name for file in here.iterdir()] == ["small.onnx"]
    assert lines[0] == f"wrote small.onnx ({os.path.getsize('small.onnx') / 1000:.1f} kB)"  # noqa: PTH202
    assert lines[1].startswith("onnxruntime ")
    assert "(of 1) at 120x120, 1x1, 37x53, 61x90; a photograph's PSNR is " in lines[1]
    assert lines[1].endswith("+0.0000 dB from PyTorch's")


def test_an_rgb_half_file_has_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert main(["onnx", str(model), "--graph", "rgb", "--half", "--out", str(folder)]) == 0
    assert [file.name for file in folder.iterdir()] == ["small-rgb-half.onnx"]
    assert load(folder / "small-rgb-half.onnx")(Image.new("RGB", (5, 4))).size == (10, 8)


def test_what_a_format_remarks_is_said(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Onnx, "remarks", lambda self, path, about, options: (f"{path.name} is {about.colour}",))
    assert main(["onnx", str(model), "--graph", "rgb"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["small-rgb.onnx is rgb"]


def test_a_run_is_exported_under_its_name(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "dssd-x2-01234567"
    for which, scale in (("best", 2), ("last", 3)):
        (run / "generators" / which).mkdir(parents=True)
        for name in ("student", "other"):
            save_generator(FSRCNN(scale, d=8, s=4, m=1), run / "generators" / which / f"{name}.safetensors")
    assert main(["torch", str(run)]) == 0
    assert load("dssd-x2-01234567.pt2").about.scale == 2
    assert main(["torch", str(run), "--which", "last", "--generator", "other", "--out", "last.pt2"]) == 0
    assert load("last.pt2").about.scale == 3
    assert "--generator teacher: not in" in refused("torch", run, "--generator", "teacher")


def test_an_export_of_ours_is_replaced_and_nothing_else_is(model: Path, here: Path, exported: bytes) -> None:
    assert main(["torch", str(model)]) == 0
    for name, suffix, first in (("onnx", "onnx", exported), ("torch", "pt2", Path("small.pt2").read_bytes())):
        path = here / f"a.{suffix}"
        path.write_bytes(b"somebody's")
        assert "exists and was not exported by hpcdistill" in refused(name, model, "--out", path)
        assert path.read_bytes() == b"somebody's"
        path.write_bytes(first)
        assert main([name, str(model), "--graph", "rgb", "--out", str(path)]) == 0
        assert path.read_bytes() != first


def test_it_never_writes_over_its_input(model: Path, here: Path) -> None:
    content = model.read_bytes()
    Path("linked.onnx").hardlink_to(model)
    Path("pointing.onnx").symlink_to(model)
    for name in ("linked.onnx", "pointing.onnx"):
        assert "is the network itself" in refused("onnx", model, "--out", name)
    assert "must end in .onnx" in refused("onnx", model, "--out", model)
    assert model.read_bytes() == content


def test_what_is_wrong_is_one_line(model: Path, here: Path, tmp_path: Path, exported: bytes) -> None:
    assert refused("onxx", model) == "unknown format 'onxx'; did you mean 'onnx'?"
    assert "no such run folder or checkpoint" in refused("onnx", tmp_path / "absent")
    assert "no such weights are shipped" in refused("onnx", "pretrained:x5")
    assert "--out a.pt: must end in .onnx" in refused("onnx", model, "--out", "a.pt")
    assert "--half is not for torch" in refused("torch", model, "--half")
    assert "--opset is not for torch" in refused("torch", model, "--opset", "18")
    save_generator(build_generator("unet", ngf=2, levels=2), tmp_path / "unet.safetensors")
    assert "--graph rgb is for networks of luma" in refused("onnx", tmp_path / "unet.safetensors", "--graph", "rgb")
    assert "takes RGB; leave --graph out" in refused("onnx", tmp_path / "unet.safetensors", "--graph", "luma")
    assert not list(here.iterdir())
    Path("small.ONNX").write_bytes(exported)
    assert "is an export already" in refused("torch", "small.ONNX")


def test_a_translation_network_is_exported_with_its_multiple(tmp_path: Path, here: Path) -> None:
    torch.manual_seed(0)
    network = build_generator("unet", ngf=2, levels=2)
    save_generator(network, tmp_path / "unet.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 7, 3), dtype=np.uint8)
    expected = np.asarray(load(tmp_path / "unet.safetensors")(Image.fromarray(pixels))).astype(int)
    for name, suffix in (("onnx", "onnx"), ("torch", "pt2")):
        assert main([name, str(tmp_path / "unet.safetensors")]) == 0
        made = load(f"unet.{suffix}")
        assert made.about.multiple == 4
        assert np.abs(np.asarray(made(Image.fromarray(pixels))) - expected).max() <= 1


def test_what_differs_is_removed_and_the_old_file_stays(
    model: Path, here: Path, exported: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.onnx").write_bytes(exported)
    opened = Onnx.open

    def off(self: Onnx, path: Path) -> Opened:
        whole = opened(self, path)

        def session(images: Batch) -> Batch:
            return whole.session(images) + np.float32(2e-4)

        return Opened(whole.about, session)

    monkeypatch.setattr(Onnx, "open", off)
    for name in ("a.onnx", "b.onnx"):
        assert "more than the 1.0e-04 that is allowed" in refused("onnx", model, "--out", name)
    assert [file.name for file in here.iterdir()] == ["a.onnx"]
    assert Path("a.onnx").read_bytes() == exported


def test_a_full_disk_leaves_nothing(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("onnx", "torch"):
        with pytest.raises(OSError, match="No space left") as caught:  # of which run_command makes a line
            main([name, str(model)])
        assert caught.value.errno == errno.ENOSPC
    assert not list(here.iterdir())


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, hpcdistill.export\n"
        "try:\n    hpcdistill.export.main(['--help'])\n"
        "finally:\n    assert not {'torch', 'onnx', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "onnx, shader, ncnn, openvino, torch" in result.stdout


def test_a_pt2_file_runs_in_torch_alone_and_holds_no_path(model: Path, here: Path) -> None:
    assert main(["torch", str(model)]) == 0
    content = Path("small.pt2").read_bytes()
    for trace in (str(Path(__file__).parents[2]), "site-packages", "File "):
        assert trace.encode() not in content
    extra = {METADATA_KEY: "", "input": ""}
    program = torch.export.load("small.pt2", extra_files=extra)
    assert "BT.601" in extra["input"]
    network = load_network(model)[0]
    for size in ((1, 1), (9, 6)):
        image = torch.rand(2, 1, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(image), network(image), rtol=0, atol=1e-6)  # channels last
    again = Path("again.pt2")
    assert main(["torch", str(model), "--out", str(again)]) == 0
    assert again.read_bytes() == content


def test_opening_a_pt2_file_runs_nothing_of_it(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.export.load` unpickles, and evaluates text as Python: a file may be a stranger's."""
    assert main(["torch", str(model)]) == 0

    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("a file was unpickled")

    for name in ("export.load", "load"):
        monkeypatch.setattr(f"torch.{name}", forbidden)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8))
    made = np.asarray(load("small.pt2")(picture)).astype(int)
    assert np.abs(made - np.asarray(load(model)(picture))).max() <= 1  # a rounding that falls otherwise
    assert made.std() > 5  # and no gray picture


def test_a_pt2_file_that_is_not_ours_is_one_line(model: Path, here: Path) -> None:
    assert main(["torch", str(model)]) == 0
    content = Path("small.pt2").read_bytes()
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1),)), "foreign.pt2")
    Path("half.pt2").write_bytes(content[: len(content) // 2])
    Path("empty.pt2").write_bytes(b"")
    for name in ("foreign.pt2", "half.pt2", "empty.pt2"):
        with pytest.raises(UserError, match=f"{name}: is no .pt2 file that hpcdistill exported"):
            TorchExport().open(Path(name))
    for member in ("data/weights/weight_0", "data/weights/model_weights_config.json"):
        with zipfile.ZipFile("small.pt2") as source, zipfile.ZipFile("cut.pt2", "w") as target:
            for info in source.infolist():
                cut = source.read(info)[:-1] if info.filename.endswith(member) else source.read(info)
                target.writestr(info.filename, cut)
        with pytest.raises(UserError, match=r"cut\.pt2: damaged"):
            TorchExport().open(Path("cut.pt2"))
