"""The command that enlarges and translates pictures: what it reads, where it writes, what it leaves alone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpcdistill.deploy import pictures
from hpcdistill.deploy.model import load
from hpcdistill.errors import UserError
from hpcdistill.infer import main
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import save_generator

RANDOM = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (9, 7)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def infer(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "deep/b.jpg", "deep/er/c.webp", ".hidden/d.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_enlarged_and_keeps_its_structure(folder: Path, tmp_path: Path) -> None:
    assert infer(folder, "--out", tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["a.png", "deep/b.png", "deep/er/c.png"]
    with Image.open(tmp_path / "out/a.png") as made, Image.open(folder / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(made), np.asarray(load()(image)))
    assert infer(folder, "--out", tmp_path / "out") == 0  # its own files may be replaced


def test_an_earlier_result_inside_the_folder_is_no_input(folder: Path) -> None:
    for _ in range(2):
        assert infer(folder, "--out", folder / "large") == 0
        assert below(folder / "large") == ["a.png", "deep/b.png", "deep/er/c.png"]


def test_the_model_is_named_first_or_not_at_all(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    save_generator(build_generator("resnet", ngf=4, blocks=1), tmp_path / "g.safetensors")
    for words, size in ((("pretrained:x2",), (14, 18)), ((tmp_path / "g.safetensors",), (7, 9)), ((), (28, 36))):
        assert infer(*words, image, "--out", tmp_path / "out") == 0
        with Image.open(tmp_path / "out/a.png") as made:
            assert made.size == size


def test_a_bad_picture_is_named_and_the_others_are_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:80])
    (folder / "none.jpg").write_bytes(b"")
    assert infer(folder, "--out", tmp_path / "out") == 1
    assert below(tmp_path / "out") == ["a.png", "deep/b.png", "deep/er/c.png"]
    said = capsys.readouterr().err
    assert f"{folder / 'broken.png'}: cannot be decoded" in said
    assert f"2 pictures could not be used: {folder / 'broken.png'}, {folder / 'none.jpg'}" in said
    with pytest.raises(UserError, match="no picture could be made"):
        infer(folder / "broken.png", "--out", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    before = (folder / "a.png").read_bytes()
    with pytest.raises(UserError, match="is where the pictures are"):
        infer(folder, "--out", folder)
    with pytest.raises(UserError, match="is one of the pictures that are read"):
        infer(folder / "a.png", "--out", folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="is where the pictures are"):
        infer(folder, "--out", tmp_path / "link")
    with pytest.raises(UserError, match="is one of the pictures that are read"):
        infer(folder / "a.png", "--out", tmp_path / "link")
    assert (folder / "a.png").read_bytes() == before
    mine = picture(tmp_path / "out/deep/b.png").read_bytes()
    with pytest.raises(UserError, match=r"b\.png: is there, and was not written by hpcdistill"):
        infer(folder, "--out", tmp_path / "out")
    assert (tmp_path / "out/deep/b.png").read_bytes() == mine
    assert below(tmp_path / "out") == ["deep/b.png"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        infer(folder, "--out", folder / "a.png")


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/a.jpg", "other/a.png"):
        picture(tmp_path / name)
    assert infer(tmp_path / "in", "--out", tmp_path / "out") == 0
    assert below(tmp_path / "out") == ["a.jpg.png", "a.png.png"]
    with pytest.raises(UserError, match="would both become"):
        infer(tmp_path / "in/a.png", tmp_path / "other/a.png", "--out", tmp_path / "out2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrained:x4",), "and which pictures"),
        (("nowhere",), "no such model, picture or folder"),
        (("pretrained:x4", "nowhere.png"), "no such picture or folder"),
        (("pretrained:x9", "{image}"), "no such weights are shipped"),
        (("{image}", "--scale", "2"), "--scale 2: pretrained:x4 enlarges x4"),
        (("{text}",), "not a suffix that is read"),
        (("{empty}",), "no images in this folder"),
    ],
)
def test_misuse_is_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    places = {"image": picture(tmp_path / "a.png"), "text": tmp_path / "a.txt", "empty": tmp_path / "empty"}
    with pytest.raises(UserError, match=message):
        infer(*(word.format(**places) for word in words), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "_chunk", full)
    with pytest.raises(OSError, match="No space left"):
        infer(picture(tmp_path / "a.png"), "--out", tmp_path / "out")
    assert below(tmp_path / "out") == []


def test_as_a_process_one_line_and_no_compiler(tmp_path: Path) -> None:
    """What torch imports for its compiler would double the time to the first pixel."""
    script = (
        "import sys; from hpcdistill.infer import main; code = main(sys.argv[1:]);"
        "print(code, 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    )
    image = picture(tmp_path / "a.png")
    command = [sys.executable, "-c", script, str(image), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "False"]
    assert done.stderr.startswith("pretrained:x4: wrote 1 picture to ")
    assert done.stderr.count("\n") == 1


def test_what_fails_for_every_picture_is_said_once(folder: Path, tmp_path: Path) -> None:
    save_generator(build_generator("resnet", ngf=4, blocks=1), tmp_path / "g.safetensors")
    with pytest.raises(UserError, match=r"--tile 40: .* has no exact tiles"):
        infer(tmp_path / "g.safetensors", folder, "--tile", 40, "--out", tmp_path / "out")


def test_a_name_that_is_no_text_and_a_link_to_nothing_are_passed_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(folder / "new\nline.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert infer(folder, "--out", tmp_path / "out") == 1
    assert below(tmp_path / "out") == ["a.png", "deep/b.png", "deep/er/c.png"]
    assert "2 pictures could not be used: 'gone.png', 'new\\nline.png'" in capsys.readouterr().err


def test_a_model_that_comes_late_is_no_folder_of_pictures(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    run = tmp_path / "run"
    save_generator(build_generator("resnet", ngf=4, blocks=1), _made(run / "generators/last") / "student.safetensors")
    picture(run / "samples/1.png")
    for late in ("pretrained:x2", run):
        with pytest.raises(UserError, match="is a model; it comes first"):
            infer(image, late, "--out", tmp_path / "out")


def test_photographs_beside_a_configuration_are_no_run(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    (tmp_path / "in/config.json").write_text("{}")
    assert infer(tmp_path / "in", "--out", tmp_path / "out") == 0


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        infer(tmp_path / "a.png", "--out", tmp_path / "out")


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from hpcdistill import infer; from hpcdistill.deploy import pictures;"
        "write = pictures._chunk;"
        "pictures._chunk = lambda *a: os.kill(os.getpid(), signal.SIGTERM) if a[1] == b'IEND' else write(*a);"
        "infer.main(sys.argv[1:])"
    )
    image = picture(tmp_path / "a.png")
    done = subprocess.run([sys.executable, "-c", script, str(image), "--out", str(tmp_path / "out")], timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert below(tmp_path / "out") == []


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
