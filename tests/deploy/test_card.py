"""The folder that a network is published in: what the hub reads of it, what it says, and that it gives itself back."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from packed_sets import noise, write_set
from PIL import Image
from safetensors import safe_open
from tiny_runs import CONFIGS, tiny_variant, trained

import hpcdistill
from hpcdistill import card
from hpcdistill.deploy.model import load_network
from hpcdistill.deploy.provenance import without_folders
from hpcdistill.errors import UserError
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.idn import IDN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.run import load_run

FILES = {"README.md", "config.json", "model.safetensors", "LICENSE"}
FOLDER = re.compile(r"(?<![\w.:/])[/~]\w[\w.-]*/")  # the beginning of a path from the root or a home


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", closed)
    monkeypatch.setattr(socket, "create_connection", closed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, in a folder whose name is personal."""
    folder = tmp_path_factory.mktemp("jane_doe")
    result = trained(str(CONFIGS / "fsrcnn/x4.yaml"), tiny_variant(folder), f"runs={folder}/runs")
    return folder / "runs" / f"{result['name']}-{result['identity']}"


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("john_doe")
    write_set(folder / "paired", "paired", [{"ab.png": noise(48, 96, seed)} for seed in range(2)])
    (folder / "small.yaml").write_text(
        f"runs: {folder}/runs\n"
        f"data: {{train: {folder}/paired, eval: {{mine: {folder}/paired}}, crop: 48, load_size: 52, workers: 0}}\n"
        "train: {steps: 2, log_every: 1, trackers: [], device: cpu}\n"
        "eval: {every: 1, kid: false, lpips: false, size: 48}\n"
        "method: {ndf: 4, discriminator_strides: 2, generator: {ngf: 8, levels: 4}}\n"
    )
    result = trained(str(CONFIGS / "original/edges2shoes.yaml"), str(folder / "small.yaml"))
    return folder / "runs" / f"{result['name']}-{result['identity']}"


def fields(folder: Path) -> dict[str, Any]:
    """The head of README.md as the hub's own reader takes it."""
    found: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return found


def section(folder: Path, title: str) -> str:
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert match
    return match.group(1)


def test_what_the_hub_reads(run: Path, tmp_path: Path) -> None:
    assert card.main([str(run), "--out", str(tmp_path / "hub")]) == 0
    assert {path.name for path in (tmp_path / "hub").iterdir()} == FILES
    read = fields(tmp_path / "hub")
    assert read["library_name"] == "hpcdistill"
    assert read["pipeline_tag"] == "image-to-image"
    assert (read["license"], read["license_name"]) == ("other", "of-the-training-data")
    assert (tmp_path / "hub" / read["license_link"]).is_file()
    assert {"super-resolution", "fsrcnn", "x4"} <= set(read["tags"])
    assert "knowledge-distillation" not in read["tags"]
    assert read["metrics"] == ["psnr", "ssim"]
    assert "datasets" not in read  # one's own images have no name there


def test_the_numbers_are_the_runs(run: Path, tmp_path: Path) -> None:
    card.main([str(run), "--out", str(tmp_path / "hub")])
    result = json.loads((run / "result.json").read_text())
    found = ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results
    assert found
    assert {(one.dataset_name, one.metric_type): one.metric_value for one in found} == {
        ("tiny", name): result["best"]["metrics"][f"student/tiny/{name}"] for name in ("psnr", "ssim")
    }
    for one in found:
        for words in ("3 images", "luma", "border of 4 pixels", "rule pisr", "LR images newer"):
            assert words in one.metric_name, words
        chosen = one.metric_args["weights"]
        assert chosen == f"the best weights (step {result['best']['step']}), chosen by PSNR on tiny, a test set: " + (
            "this number flatters"
        )
    assert "expect less on others" in section(tmp_path / "hub", "Limits")
    row = re.search(r"\| tiny \| PSNR \| ([\d.]+) \| ([\d.]+) \|", section(tmp_path / "hub", "How good it is"))
    assert row
    assert float(row.group(1)) == pytest.approx(result["best"]["metrics"]["student/tiny/psnr"], abs=0.0051)
    assert float(row.group(2)) == pytest.approx(result["bicubic"]["tiny"]["psnr"], abs=0.0051)


def test_the_last_weights_have_their_own_numbers(run: Path, tmp_path: Path) -> None:
    card.main([str(run), "--which", "last", "--out", str(tmp_path / "hub")])
    result = json.loads((run / "result.json").read_text())
    (psnr, _) = ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results or ()
    assert psnr.metric_value == result["last"]["metrics"]["student/tiny/psnr"]
    assert psnr.metric_args == {"weights": "the last weights, which no test set chose"}
    assert "expect less on others" not in section(tmp_path / "hub", "Limits")


def test_the_network_comes_back(run: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    card.main([str(run), "--out", str(hub)])
    image = torch.rand(1, 1, 9, 11)
    with torch.no_grad():
        assert torch.equal(load_generator(hub)[0](image), load_generator(run)[0](image))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    made = hpcdistill.load(hub)
    assert np.array_equal(np.asarray(made(picture)), np.asarray(hpcdistill.load(run)(picture)))
    was, now = load_network(run)[1], load_network(hub)[1]
    assert (now.method, now.steps, now.licence, now.run, now.overlap) == (
        was.method,
        2,
        "what their owner says",
        run.name,
        7,
    )
    with safe_open(hub / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hpcdistill"])["class"] == "FSRCNN"
    described = json.loads((hub / "config.json").read_text())
    assert (described["scale"], described["colour"], described["arguments"]["scale"]) == (4, "luma", 4)


@pytest.mark.parametrize("form", ["deployed", "wide", "IDN", "ResNet"])
def test_every_form_comes_back(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = {
        "deployed": lambda: FSRCNN(3, d=8, s=4, m=1).deploy(),
        "wide": lambda: FSRCNN(2, d=8, s=4, m=1, collapse={"form": "linear", "width": 16}),
        "IDN": lambda: IDN(2),
        "ResNet": lambda: ResNetGenerator(ngf=4, blocks=1),
    }[form]()
    save_generator(network.eval(), tmp_path / "some.safetensors")
    card.main([str(tmp_path / "some.safetensors"), "--out", str(tmp_path / "hub")])
    back = load_generator(tmp_path / "hub" / "model.safetensors")[0]
    image = torch.rand(2, network.arguments.get("channels", 3), 12, 16)
    with torch.no_grad():
        assert torch.allclose(back(image), network(image), atol=1e-6, rtol=0)
    assert "collapse" not in back.arguments
    assert back.arguments.get("upsampling") == (
        "subpixel" if form == "deployed" else network.arguments.get("upsampling")
    )
    count = sum(parameter.numel() for parameter in back.parameters())
    assert f" {count:,} parameters" in (tmp_path / "hub" / "README.md").read_text()
    assert hpcdistill.load(tmp_path / "hub").about.network == type(network).__name__


def test_the_snippet_works(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    card.main(["pretrained:x2", "--out", str(hub)])
    Image.new("RGB", (10, 7), (200, 30, 60)).save(hub / "photo.png")
    (snippet,) = re.findall(r"```python\n(.*?)```", (hub / "README.md").read_text(), re.DOTALL)
    path = str(Path(hpcdistill.__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {path!r})\n{snippet}"
    subprocess.run([sys.executable, "-c", code], cwd=hub, check=True)
    with Image.open(hub / "made.png") as made:
        assert made.size == (20, 14)
        assert made.getpixel((10, 7)) == pytest.approx((200, 30, 60), abs=3)


def test_a_shipped_students_card(tmp_path: Path) -> None:
    """Its numbers are those of the notes beside it, here as they were measured for the release."""
    card.main(["pretrained:x4", "--out", str(tmp_path)])
    found = ModelCard.load(tmp_path / "README.md").data.eval_results or []
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in found] == [
        ("set5", "psnr", 30.77),
        ("set5", "ssim", 0.8724),
        ("set14", "psnr", 27.76),
        ("set14", "ssim", 0.7601),
        ("b100", "psnr", 27.05),
        ("b100", "ssim", 0.7171),
    ]
    assert all("border 4" in one.metric_name and "rule `exact`" in one.metric_name for one in found)
    assert {one.metric_args["weights"] for one in found} == {"the last weights, which no test set chose"}
    assert fields(tmp_path)["datasets"] == ["bsds500", "t91"]
    assert "non-commercial research only" in section(tmp_path, "Licence")
    page = (tmp_path / "README.md").read_text()
    assert " 12,644 parameters, 0.72 G multiply-accumulates" in page
    assert "(4.64 G as the literature counts)" in page
    assert "| set5 | PSNR | 30.77 | 28.43 |" in page
    for words in ("`[B, 1, H, W]`", "[16/255, 235/255]", "`[B, 1, 4 H, 4 W]`", "overlap of 7 input pixels"):
        assert words in section(tmp_path, "What it eats")


def test_a_translator(translation: Path, tmp_path: Path) -> None:
    card.main([str(translation), "--out", str(tmp_path / "hub")])
    read, hub = fields(tmp_path / "hub"), tmp_path / "hub"
    assert {"image-translation", "unetgenerator"} <= set(read["tags"])
    result = json.loads((translation / "result.json").read_text())
    (name,) = {key.partition("/")[0] for key in result["last"]["metrics"]}
    found = ModelCard.load(hub / "README.md").data.eval_results or []
    assert {one.metric_type: one.metric_value for one in found} == {
        key.rpartition("/")[2]: value for key, value in result["best"]["metrics"].items()
    }
    assert found
    assert all("48x48" in one.metric_name for one in found)
    eats = section(hub, "What it eats")
    for words in ("R, G, B in this order", "in [-1, 1]", "multiples of 16", "one piece"):
        assert words in eats, words
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(load_generator(hub)[0](image), load_generator(translation)[0](image))
    assert name in section(hub, "Training")


@pytest.mark.parametrize("which", ["run", "translation"])
def test_nobodys_folders(which: str, run: Path, translation: Path, tmp_path: Path) -> None:
    card.main([str(run if which == "run" else translation), "--out", str(tmp_path / "hub")])
    for path in (tmp_path / "hub").iterdir():
        content = path.read_bytes().decode(errors="replace")
        assert "_doe" not in content, path.name
        if path.suffix != ".safetensors":
            assert not FOLDER.findall(content), path.name
    config = section(tmp_path / "hub", "Training")
    assert "- packed\n" in config if which == "run" else "- paired\n" in config  # the data are named all the same


def test_the_settings_make_the_same_run(run: Path, tmp_path: Path) -> None:
    """As the page says: saved as config.yaml, with the data's place, they are those that the run was trained with."""
    card.main([str(run), "--out", str(tmp_path / "hub")])
    (settings,) = re.findall(r"```yaml\n(.*?)```", section(tmp_path / "hub", "Training"), re.DOTALL)
    (tmp_path / "config.yaml").write_text(settings)
    was = load_run([str(run / "config.yaml")]).config
    again = load_run(
        [str(tmp_path / "config.yaml"), f"data.train={was.data.train[0]}", f"data.eval.tiny={was.data.eval['tiny']}"]
    )
    assert again.config.dump() | {"runs": ""} == was.dump() | {"runs": ""}
    assert again.short == run.name[-8:]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/jane/data/set", "set"),
        ("~/data/set, /a/b", "set, b"),
        ("of '/mnt/my disk' and C:\\Users\\jane\\x", "of 'my disk' and x"),
        ("https://user:secret@host/sets/div2k", "div2k"),
        ("10/12 of data/packed/div2k, luma and/or RGB", "10/12 of data/packed/div2k, luma and/or RGB"),
    ],
)
def test_what_is_left_of_a_path(text: str, left: str) -> None:
    assert without_folders(text) == left


def test_the_same_again_replaces_what_is_ours(run: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    card.main([str(run), "--out", str(hub)])
    first = {path.name: path.read_bytes() for path in hub.iterdir()}
    (hub / ".git").mkdir()  # a clone of a repository on the hub
    (hub / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    card.main([str(run), "--out", str(hub)])
    assert {name: (hub / name).read_bytes() for name in FILES} == first
    card.main(["pretrained:x3", "--out", str(hub)])  # another network
    assert load_generator(hub)[0].scale == 3
    digests = json.loads((hub / "config.json").read_text())["files"]
    assert digests == {name: hashlib.sha256((hub / name).read_bytes()).hexdigest() for name in FILES - {"config.json"}}


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_command_that_was_killed_is_run_again(stopped_after: int, tmp_path: Path) -> None:
    card.main(["pretrained:x2", "--out", str(tmp_path / "old")])
    card.main(["pretrained:x3", "--out", str(tmp_path / "new")])
    for name in ("README.md", "LICENSE", "model.safetensors")[:stopped_after]:
        (tmp_path / "old" / name).write_bytes((tmp_path / "new" / name).read_bytes())
    card.main(["pretrained:x3", "--out", str(tmp_path / "old")])
    assert load_generator(tmp_path / "old")[0].scale == 3


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("notes.txt", b"mine", "holds notes.txt, which is no part of a model card"),
        ("README.md", b"# mine", "its README.md was not written by this command"),
        ("config.json", b'{"library_name": "transformers"}', "its config.json was not written by this command"),
        ("model.safetensors", b"x", "its model.safetensors was not written by this command"),
    ],
)
def test_nobodys_files_are_written_over(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(why)):
        card.main(["pretrained:x4", "--out", str(tmp_path)])
    assert written(tmp_path) == {name: content}


def test_a_page_that_was_edited_stays(tmp_path: Path) -> None:
    card.main(["pretrained:x4", "--out", str(tmp_path)])
    with open(tmp_path / "README.md", "a") as page:
        page.write("\nMine.\n")
    before = written(tmp_path)
    with pytest.raises(UserError, match=r"README.md was changed since it was written; move it away"):
        card.main(["pretrained:x3", "--out", str(tmp_path)])
    assert written(tmp_path) == before
    (tmp_path / "README.md").unlink()
    card.main(["pretrained:x3", "--out", str(tmp_path)])
    assert "Enlarges pictures x3" in (tmp_path / "README.md").read_text()


def test_what_has_no_card(run: Path, tmp_path: Path) -> None:
    def refused(model: str | Path, why: str) -> None:
        with pytest.raises(UserError, match=why):
            card.main([str(model), "--out", str(tmp_path / "hub")])
        assert not (tmp_path / "hub").exists()

    save_generator(PrivilegedTeacher(2), tmp_path / "teacher.safetensors")
    refused(tmp_path / "teacher.safetensors", "is a teacher that sees the high-resolution image")
    network = FSRCNN(2)
    next(network.parameters()).data.fill_(torch.nan)
    save_generator(network, tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", "no finite numbers")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    refused(tmp_path / "model.onnx", "is not a .safetensors file")
    refused(tmp_path / "nowhere", "no such run folder or checkpoint")
    card.main(["pretrained:x4", "--out", str(tmp_path / "card")])
    refused(tmp_path / "card", "is a model card already")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; name a folder"):
        card.main(["pretrained:x4", "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"holds .*, which is no part of a model card"):
        card.main([str(run), "--out", str(run)])


def test_what_was_not_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_generator(FSRCNN(2, d=8, s=4, m=1), tmp_path / "mine.safetensors")
    card.main([str(tmp_path / "mine.safetensors"), "--out", str(tmp_path / "hub")])
    read = fields(tmp_path / "hub")
    assert (read["license"], read["license_name"]) == ("other", "not-recorded")
    assert not {"metrics", "datasets", "model-index"} & set(read)
    assert "was not recorded" in section(tmp_path / "hub", "Licence")
    assert "not recorded" in (tmp_path / "hub" / "LICENSE").read_text()
    assert "Not measured" in section(tmp_path / "hub", "How good it is")
    assert "| Training data | not recorded |" in section(tmp_path / "hub", "Training")
    assert "warning: what the training data may be used for is not recorded" in capsys.readouterr().err


def test_a_run_before_its_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    try:
        card.main([str(run), "--out", str(tmp_path / "hub")])
    finally:
        (run / "result.json").write_bytes(result)
    assert "its run has not finished" in capsys.readouterr().err
    assert "Its run had not finished" in section(tmp_path / "hub", "How good it is")
    assert "model-index" not in fields(tmp_path / "hub")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".model.safetensors" in path.name:
            original(path, content[:100])
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        card.main(["pretrained:x4", "--out", str(tmp_path)])
    monkeypatch.setattr(Path, "write_bytes", original)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "LICENSE"}
    card.main(["pretrained:x4", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == FILES
