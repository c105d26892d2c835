"""Which files of a folder are its images, in which order, and what is said about the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcdistill.data.folders import has_images, left_out, list_images, other_suffixes
from hpcdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_list_is_natural_and_leaves_out_what_is_no_image(tmp_path: Path) -> None:
    for name in ["img10.png", "img2.PNG", "img1.jpg", "IMG3.webp", "b.bmp", ".hidden.png", "._a.jpg", "readme.txt"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["b.bmp", "img1.jpg", "img2.PNG", "IMG3.webp", "img10.png"]


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list_images(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no images.*\.png, \.jpg"):
        list_images(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(UserError, match=r"found \.tif: convert them to PNG"):
        list_images(tmp_path)
    assert other_suffixes(tmp_path) == {".tif": 1}
    (tmp_path / "HR").mkdir()
    (tmp_path / "HR" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="its folders HR have some"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        list_images(tmp_path / "a.tif")


def test_names_that_are_no_text_and_links_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"b\.png: is a link to a file that is not there"):
        list_images(tmp_path)
    (tmp_path / "b.png").rename(tmp_path / "b.txt")
    (tmp_path / "a\nb.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"'a\\nb\.png' cannot be written as text; rename"):
        list_images(tmp_path)


def test_what_a_folder_holds_besides(tmp_path: Path) -> None:
    for name in (
        "a.png",
        "one/b.png",
        "two/c.jpg",
        "two/deep/d.jfif",
        "notes/e.txt",
        ".git/f.png",
        "x.tif",
        "one/y.nef",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    line = f"{tmp_path}: not read: one/ (1 image), two/ (2 images), 1 .tif file; ask, convert files to PNG"
    assert left_out(tmp_path, "ask") == line
    apart = [tmp_path / "two" / "deep"]  # read by itself: what is beside it is no longer certain
    assert "two" not in str(left_out(tmp_path, "ask", apart=apart))
    recursive = f"{tmp_path}: not read: 1 .nef file, 1 .tif file; convert files to PNG"
    assert left_out(tmp_path, "ask", recursive=True) == recursive
    assert left_out(tmp_path / "notes", "ask") is None


def test_folders_whose_links_lead_around_have_no_images_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert not has_images(tmp_path, recursive=True)
    (tmp_path / "a" / "b.png").write_bytes(b"")
    assert has_images(tmp_path, recursive=True)
    assert not has_images(tmp_path)


def test_reading_a_configuration_imports_neither_numpy_nor_pillow() -> None:
    """They take half of the time of `--print-config`."""
    code = "import sys, hpcdistill.run; sys.exit(str({'numpy', 'PIL', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
