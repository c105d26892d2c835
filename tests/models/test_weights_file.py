"""What a file is that should hold weights, by its first bytes; nothing in it is run."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcdistill.errors import UserError
from hpcdistill.metrics.feature_networks import read_state
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.registry import load_generator, save_generator
from hpcdistill.models.vgg import load_vgg16
from hpcdistill.models.weights_file import PYTORCH, generator_file, kind_of
from hpcdistill.run import load_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RAN: list[str] = []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("ran",)


def saved(value: object, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


def numbers() -> bytes:
    content = io.BytesIO()
    np.savez(content, weight=np.ones(2))
    return content.getvalue()


PUBLISHED = {"module.body.0.weight": torch.ones(2, 3)}
FILES = {
    "zip.pth": (saved(PUBLISHED), "is a PyTorch checkpoint"),
    "legacy.pth": (saved(PUBLISHED, _use_new_zipfile_serialization=False), "is a PyTorch checkpoint"),
    "nested.ckpt": (saved({"state_dict": PUBLISHED, "epoch": 3}), "is a PyTorch checkpoint"),
    "object.pt": (saved(Bomb()), "is a PyTorch checkpoint"),
    "cut.pth": (saved(PUBLISHED)[:-40], "damaged zip file"),
    "script.pt": (zipped("net/constants.pkl", "net/code/__torch__.py", "net/data.pkl"), "TorchScript"),
    "numbers.npz": (numbers(), "a zip file"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "an ONNX model"),
    "page.pth": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
    "annexed.pth": (b"/annex/objects/SHA256E-s3--12.pth\n", "a git-annex pointer"),
    "empty.safetensors": (b"", "an empty one"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "packed.pth.gz": (b"\x1f\x8b\x08" + bytes(20), "a compressed file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_called_by_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    with pytest.raises(UserError, match=rf"{name}: .*{FILES[name][1]}"):
        load_generator(path)
    loaded = load_run([str(CONFIGS / "fsrcnn" / "x4.yaml"), f"init.student={path}", "data.train=[]", "data.eval={}"])
    with pytest.raises(UserError, match=rf"{name}: .*{FILES[name][1]}"):
        _ = loaded.identity  # asked for before anything is trained
    if kind_of(path) != PYTORCH:  # these two read PyTorch's
        with pytest.raises(UserError, match=rf"{name}: not a readable file of weights \(.*{FILES[name][1]}"):
            load_vgg16(path)
        with pytest.raises(UserError, match=rf"{name}: no readable PyTorch weights \(.*{FILES[name][1]}"):
            read_state(path)
    assert RAN == []


# Lengths of a header whose bytes are those that other kinds begin with: BM, gzip, a pickle, ONNX.
@pytest.mark.parametrize("length", [0x4D42, 0x8B1F, 0x0280, 0x0480, 0x0708])
def test_no_safetensors_file_is_taken_for_another_kind(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert load_file(path) == {}
    assert kind_of(path) is None


def test_a_published_checkpoint_becomes_weights_as_the_docs_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = {f"module.{name}": value for name, value in FSRCNN(4).state_dict().items()}
    torch.save(published, tmp_path / "published.pth")
    state = torch.load(tmp_path / "published.pth", map_location="cpu", weights_only=True)
    network = FSRCNN(4)
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    save_generator(network, tmp_path / "published.safetensors")
    loaded, _ = load_generator(tmp_path / "published.safetensors")
    assert all(torch.equal(value, published[f"module.{name}"]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("networks", "meant"),
    [
        (("generator", "generator_b2a"), "generator"),  # CycleGAN alone
        (("student", "teacher", "teacher_b2a"), "student"),
        (("only",), "only"),
        (("only_b2a",), "only_b2a"),
    ],
)
def test_the_network_that_a_run_stands_for(networks: tuple[str, ...], meant: str, tmp_path: Path) -> None:
    folder = tmp_path / "generators" / "best"
    folder.mkdir(parents=True)
    for name in networks:
        (folder / f"{name}.safetensors").touch()
    assert generator_file(tmp_path) == folder / f"{meant}.safetensors"
