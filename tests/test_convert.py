"""The command that makes a network's file of a published one: what it writes is what the other commands take."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hpcdistill
from hpcdistill import convert, evaluate, infer
from hpcdistill.errors import UserError
from hpcdistill.models.registry import load_generator
from hpcdistill.models.resnet_generator import ResNetGenerator

# A separable generator of two blocks, and what its layers are called in `model` of GAN Compression's code.
NAMES = {
    "stem.0": "1", "down1.0": "4", "down2.0": "7", "up1.0": "12", "up2.0": "15", "head.0": "19",
    **{
        f"block{block}.body.{ours}": f"{9 + block}.conv_block.{theirs}"
        for block in (1, 2)
        for ours, theirs in ((0, "1.conv.0"), (2, "1.conv.2"), (5, "6.conv.0"), (7, "6.conv.2"))
    },
}  # fmt: skip


@pytest.fixture
def published(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = ResNetGenerator(4, 2, separable=True)
    state = {}
    for name, tensor in network.state_dict().items():
        module, _, leaf = name.rpartition(".")
        state[f"model.{NAMES[module]}.{leaf}"] = torch.randn_like(tensor) * 0.2
    torch.save(state, tmp_path / "latest_net_G.pth")
    return tmp_path / "latest_net_G.pth"


def test_what_is_written_translates(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "zebra.safetensors"
    assert convert.main([str(published), "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ResNetGenerator, 0.006 M parameters (ngf 4, blocks 2, separable True, channels_in 3" in said
    network, notes = load_generator(out)
    assert notes == {
        "converted_from": "latest_net_G.pth",
        "sha256": hashlib.sha256(published.read_bytes()).hexdigest(),
        "layout": "resnet",
    }
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "horse.png")
    assert infer.main([str(out), str(tmp_path / "horse.png"), "--out", str(tmp_path / "pictures")]) == 0
    with torch.no_grad():
        made = network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    expected = ((made + 1) * 127.5).round().permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "pictures" / "horse.png") as picture:
        np.testing.assert_allclose(np.asarray(picture).astype(float), expected, atol=1)
    assert hpcdistill.load(out).about.task == "translation"


def test_nothing_is_written_over_and_other_commands_name_this_one(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "zebra.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"zebra\.safetensors: is there already; give another name"):
        convert.main([str(published), "--out", str(out)])
    assert out.read_text() == "mine"
    with pytest.raises(UserError, match=r"--out .*zebra\.pt: must end in \.safetensors"):
        convert.main([str(published), "--out", str(tmp_path / "zebra.pt")])
    remedy = r"latest_net_G\.pth: is a PyTorch checkpoint; .*`hpcdistill convert .*latest_net_G\.pth --out"
    with pytest.raises(UserError, match=remedy):
        evaluate.main([str(published), "--data", str(tmp_path)])
    Image.new("RGB", (24, 24)).save(tmp_path / "horse.png")
    with pytest.raises(UserError, match=remedy):
        infer.main([str(published), str(tmp_path / "horse.png"), "--out", str(tmp_path / "pictures")])
