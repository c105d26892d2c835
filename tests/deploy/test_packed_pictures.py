"""`infer` of a packed set: its images and what a network makes of them, as pairs that can be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_sets import files, noise, write_set
from PIL import Image

from hpcdistill import pack
from hpcdistill.data.index import load_index
from hpcdistill.errors import UserError
from hpcdistill.infer import main
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.registry import load_generator, save_generator

PAIRS = [(noise(16, 24, seed), noise(16, 24, seed + 50)) for seed in range(3)]


def infer(*words: Any) -> int:
    return main([str(word) for word in words])


def shown(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_generator(build_generator("resnet", ngf=4, blocks=1), tmp_path / "network.safetensors", {"step": 1})
    return tmp_path / "network.safetensors"


def translated(network: Path, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 127.5 - 1
    with torch.no_grad():
        made = (load_generator(network)[0].eval()(x) + 1) * 127.5
    return made[0].permute(1, 2, 0).clamp(0, 255).double().numpy()


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_pairs_of_what_a_network_makes(network: Path, joined: bool, direction: str, tmp_path: Path) -> None:
    """Of pairs in one image, too, whose halves are no files anywhere; and the result can be packed as it is."""
    rows = [{"ab.png": np.concatenate(pair, axis=1)} if joined else dict(zip(("a.png", "b.png"), pair, strict=True))
            for pair in PAIRS]  # fmt: skip
    write_set(tmp_path / "packed", "paired", rows)
    out = tmp_path / "taught"
    assert infer(network, tmp_path / "packed", "--out", out, "--direction", direction) == 0
    assert sorted(files(out)) == [f"{side}/image{number}.png" for side in "AB" for number in range(3)]
    for number, pair in enumerate(PAIRS):
        source = pair[direction == "BtoA"]
        inputs, outputs = direction.split("to")  # the sides of the set
        np.testing.assert_array_equal(shown(out / inputs / f"image{number}.png"), source)
        made = shown(out / outputs / f"image{number}.png")
        np.testing.assert_allclose(made, translated(network, source), atol=0.501)
    pack.main(["paired", "--source", str(out), "--out", str(tmp_path / "again"), "--processes", "1"])
    assert [sample.source for sample in load_index(tmp_path / "again").samples] == [f"image{n}.png" for n in range(3)]
    before = files(out)
    assert infer(network, tmp_path / "packed", "--out", out, "--direction", direction) == 0  # its own may be replaced
    assert files(out) == before


def test_a_set_without_pairs_keeps_its_one_side(network: Path, tmp_path: Path) -> None:
    rows = [{"a.png": noise(16, 16, 0)}, {"a.jpg": noise(20, 16, 1)}, {"b.png": noise(16, 16, 2)}]
    write_set(tmp_path / "packed", "unpaired", rows)
    assert infer(network, tmp_path / "packed", "--out", tmp_path / "out") == 0
    assert sorted(files(tmp_path / "out")) == ["A/image0.png", "A/image1.png", "B/image0.png", "B/image1.png"]
    assert shown(tmp_path / "out/B/image1.png").shape == (20, 16, 3)


def test_refusals(network: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "packed", "paired", [{"a.png": PAIRS[0][0], "b.png": PAIRS[0][1]}])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="packed: is a packed set; translate it by itself"):
        infer(network, tmp_path / "packed", tmp_path / "packed", "--out", out)
    with pytest.raises(UserError, match="packed: is a packed set, which networks that translate take"):
        infer("pretrained:x4", tmp_path / "packed", "--out", out)
    write_set(tmp_path / "sr", "lr-hr", [{"hr.png": PAIRS[0][0]}])
    with pytest.raises(UserError, match=r"pictures: .*sr holds lr-hr samples, not paired or unpaired ones"):
        infer(network, tmp_path / "sr", "--out", out)
    (tmp_path / "photos").mkdir()
    Image.fromarray(PAIRS[0][0]).save(tmp_path / "photos" / "1.png")
    with pytest.raises(UserError, match="--direction AtoB: is for packed sets"):
        infer(network, tmp_path / "photos", "--out", out, "--direction", "AtoB")
    assert not out.exists()
    (out / "A").mkdir(parents=True)
    Image.fromarray(PAIRS[0][0]).save(out / "A" / "image0.png")  # somebody's own
    with pytest.raises(UserError, match=r"--out .*A: image0\.png is there, and was not saved by this command"):
        infer(network, tmp_path / "packed", "--out", out)
