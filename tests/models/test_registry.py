"""Saving a generator and getting the same one back; what is not one ends in one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpcdistill.errors import UserError
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.registry import METADATA_KEY, load_generator, load_weights, save_generator, unique_state

GENERATORS = {
    "fsrcnn": lambda: FSRCNN(4),
    "fsrcnn rgb": lambda: FSRCNN(3, channels=3, d=8, s=4, m=1),
    "deployed": lambda: FSRCNN(2).deploy(),
    "teacher": lambda: PrivilegedTeacher(4),
    "tied teacher": lambda: PrivilegedTeacher(4, tie_sdm=True),
    "pisr": lambda: PrivilegedTeacher(2, encoder="pisr", degradation="none"),
    "cnn, one level": lambda: PrivilegedTeacher(4, degradation="cnn", levels=1),
    "deployed teacher": lambda: PrivilegedTeacher(4, tie_sdm=True).deploy(),
}


def randomised(generator: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


@pytest.mark.parametrize("name", GENERATORS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    generator = randomised(GENERATORS[name]())
    path = tmp_path / "generator.safetensors"
    save_generator(generator, path, {"steps": 3, "psnr": 30.5})
    loaded, notes = load_generator(str(path))  # as users write it; a Path as well, below
    assert notes == load_generator(path)[1] == {"steps": 3, "psnr": 30.5}
    assert type(loaded) is type(generator)
    assert not loaded.training
    assert loaded.arguments == generator.arguments
    assert {key: value.tolist() for key, value in loaded.state_dict().items()} == {
        key: value.tolist() for key, value in generator.state_dict().items()
    }
    image = torch.rand(1, generator.channels, 12, 12)
    assert torch.equal(loaded(image), generator(image))
    assert [entry.name for entry in tmp_path.iterdir()] == ["generator.safetensors"]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_generator(randomised(PrivilegedTeacher(4, tie_sdm=True)), tmp_path / "t.safetensors")
    loaded, _ = load_generator(tmp_path / "t.safetensors")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 47_656
    image = torch.rand(1, 1, 16, 16)
    output = loaded(image, supervised=True)
    assert torch.equal(output.degraded[0], loaded.encoder(output.sr))
    with safe_open(str(tmp_path / "t.safetensors"), "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == 47_656  # noqa: SIM118 - no dict


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    generator = randomised(FSRCNN(2)).to(memory_format=torch.channels_last)
    save_generator(generator, tmp_path / "g.safetensors")
    loaded, _ = load_generator(tmp_path / "g.safetensors")
    assert torch.equal(loaded.feature[0].weight, generator.feature[0].weight)


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_generator(randomised(PrivilegedTeacher(4)), tmp_path / name, {"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_shared_under_two_names_load(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(1, 1, 3)
            self.second = self.first

    weights = {name: torch.ones_like(value) for name, value in Twice().state_dict().items() if "first" in name}
    module = Twice()
    assert list(unique_state(module)) == list(weights)
    load_weights(module, weights, "file")
    assert module.second.weight.sum() == 9


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        (FSRCNN(4), FSRCNN(4, channels=3), "feature.0.weight is [56, 1, 5, 5] instead of [56, 3, 5, 5]"),
        (FSRCNN(4), FSRCNN(4, m=5), "mapping.4.0.weight is missing"),
        (FSRCNN(4), FSRCNN(4, m=3), "mapping.3.0.weight is not part of it"),
        (FSRCNN(2).deploy(), FSRCNN(2), "upsampling.conv.weight is"),
        (FSRCNN(4), PrivilegedTeacher(4), "is missing"),
    ],
)
def test_weights_of_another_architecture(source: torch.nn.Module, target: torch.nn.Module, fault: str) -> None:
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_weights(target, source.state_dict(), "runs/x/last.safetensors")
    message = str(raised.value)
    assert message.startswith(f"runs/x/last.safetensors: not the weights of this {type(target).__name__}: ")
    assert fault in message
    assert "same architecture" in message
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def metadata(**changes: Any) -> dict[str, str]:
    return {METADATA_KEY: json.dumps({"class": "FSRCNN", "arguments": FSRCNN(2).arguments, "notes": {}} | changes)}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"format": "pt"}, "does not say of which network"),
        (metadata(**{"class": "FSRCN"}), "no network is named 'FSRCN', did you mean 'FSRCNN'"),
        ({METADATA_KEY: "{}"}, r"does not rebuild a network \(KeyError: 'class'\)"),
        ({METADATA_KEY: "[1]"}, r"does not rebuild a network \(TypeError"),
        ({METADATA_KEY: "{"}, r"does not rebuild a network \(JSONDecodeError"),
        (metadata(arguments={"scale": 2, "width": 3}), r"does not rebuild a network \(TypeError.*width"),
        (metadata(arguments={"scale": 2, "collapse": {"form": "linear", "width": 10**9}}), "width is larger than the"),
        (metadata(arguments={"scale": 0}), r"does not rebuild a network \(FSRCNN: scale is 0"),
        (metadata(arguments={"scale": 2, "channels": 3}), r"instead of \[56, 3, 5, 5\]"),
    ],
)
def test_metadata_that_does_not_fit(meta: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_file(FSRCNN(2).state_dict(), path, meta)
    with pytest.raises(UserError, match=message) as raised:
        load_generator(path)
    assert str(path) in str(raised.value)


def test_files_that_are_no_generators(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_generator(tmp_path / "absent.safetensors")
    whole = tmp_path / "whole.safetensors"
    save_generator(FSRCNN(2), whole)
    for name, content in (("empty", b""), ("text", b"hello there, no tensors"), ("cut", whole.read_bytes()[:-100])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a readable safetensors file"):
            load_generator(path)


def test_a_run_folder_stands_for_its_student(tmp_path: Path) -> None:
    for which, scale in (("best", 2), ("last", 3)):
        (tmp_path / "generators" / which).mkdir(parents=True)
        save_generator(FSRCNN(scale), tmp_path / "generators" / which / "student.safetensors")
        save_generator(PrivilegedTeacher(4), tmp_path / "generators" / which / "teacher.safetensors")
    assert load_generator(tmp_path)[0].scale == 2
    for file in (tmp_path / "generators" / "best").iterdir():  # nothing was evaluated
        file.unlink()
    assert load_generator(tmp_path)[0].scale == 3
    (tmp_path / "generators" / "last" / "student.safetensors").rename(
        tmp_path / "generators" / "last" / "a.safetensors"
    )
    with pytest.raises(UserError, match="has several networks; choose one"):
        load_generator(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        load_generator(tmp_path / "generators")


@pytest.mark.parametrize(
    "arguments", [{"channels": 10**12}, {"scale": 10**9}, {"m": 10**9}, {"d": -1}, {"s": float("inf")}]
)
def test_numbers_that_are_damaged_reserve_no_memory(arguments: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_file(FSRCNN(2).state_dict(), path, metadata(arguments={"scale": 2} | arguments))
    with pytest.raises(UserError, match=r"g\.safetensors: its metadata does not rebuild a network"):
        load_generator(path)


def test_a_network_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    class Foreign(torch.nn.Module):
        arguments: dict[str, Any] = {}  # noqa: RUF012 - as a network from outside has it

    with pytest.raises(UserError, match=r"Foreign: .*add it: GENERATORS\['Foreign'\] = Foreign"):
        save_generator(Foreign(), tmp_path / "g.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_weights_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own configuration may name a method by an import path; a file from elsewhere may not name a network so."""
    (tmp_path / "elsewhere.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    description = json.dumps({"class": "elsewhere:Net", "arguments": {}, "notes": {}})
    save_file({"w": torch.ones(2)}, tmp_path / "g.safetensors", {METADATA_KEY: description})
    with pytest.raises(UserError, match="no network is named 'elsewhere:Net'"):
        load_generator(tmp_path / "g.safetensors")
