"""The Python of docs/into-your-app.md runs as it stands, on a photograph, and makes the picture that it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from hpcdistill.export import main as export

CLONE = Path(__file__).resolve().parents[1]
PAGE = (CLONE / "docs/into-your-app.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def psnr(one: Path, other: Path) -> float:
    pixels = [np.asarray(Image.open(path).convert("RGB"), np.float64)[8:-8, 8:-8] for path in (one, other)]
    return float(10 * np.log10(255**2 / np.square(pixels[0] - pixels[1]).mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's reader has: a photograph, and the files that its commands have made."""
    made = tmp_path_factory.mktemp("app")
    Image.fromarray(astronaut()[:90, 150:270]).save(made / "photo.png")
    export(["onnx", "pretrained:x4", "--out", str(made / "x4.onnx")])
    export(["ncnn", "pretrained:x4", "--graph", "rgb", "--out", str(made / "x4.param")])
    return made


def test_the_page_has_its_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("number", range(3))
def test_a_snippet_makes_the_picture(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All make nearly the same picture: Pillow's bicubic, which the second takes for the colour, is another one."""
    monkeypatch.chdir(folder)
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), {})
    [saved] = re.findall(r'save\("(.*?)"\)', SNIPPETS[number])
    with Image.open(folder / saved) as image:
        assert image.size == (480, 360)
    if number:
        exec(compile(SNIPPETS[0], "snippet 0", "exec"), {})
        assert psnr(folder / saved, folder / "photo-x4.png") > (45 if number == 1 else 55)
