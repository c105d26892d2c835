"""Each kind of data set trains by the command, from each reader."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pytest
import torch
from packed_sets import noise, write_set
from safetensors.torch import load_file
from serving import Server
from torch import Tensor, nn

from hpcdistill import train, trainer
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.methods.base import (
    NO_TEACHERS,
    Batch,
    Carry,
    Group,
    Method,
    MethodConfig,
    OptimizerSettings,
    Phase,
    Progress,
    Teachers,
    Terms,
)
from hpcdistill.models import GENERATORS
from hpcdistill.ops.bicubic import downsample_uint8
from hpcdistill.ranks.signals import StopSignals
from hpcdistill.run import load_run
from hpcdistill.training.loop import Training


class Translator(nn.Module):
    """A generator of one layer: [B, 3, H, W] in [-1, 1] to the same."""

    takes = "image"

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        translated: Tensor = self.layer(image)
        return translated


class Translation(Method):
    """a to b: by L1 where they are pairs, by the mean colour where they are not."""

    class Config(MethodConfig):
        name: Literal["translation"] = "translation"
        kind: Literal["paired", "unpaired"]
        batches: int = 1  # of an iteration

    version: ClassVar[int] = 1

    def __init__(self, config: Config, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config)
        self.generator = Translator()
        self.groups = {"generator": Group(self.generator, OptimizerSettings())}
        self.generators = {"generator": self.generator}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase("generator", "generator", self.loss, batch=number) for number in range(self.config.batches))

    @property
    def needs(self) -> Needs:
        return Needs(self.config.kind)

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        assert batch["a"].shape == batch["b"].shape == (len(batch["number"]), 3, 8, 8)
        assert batch["a"].abs().max() <= 1
        translated, target = self.call("generator", batch["a"]), batch["b"]
        if self.config.kind == "unpaired":
            translated, target = translated.mean((0, 2, 3)), target.mean((0, 2, 3))
        return {"l1": (translated - target).abs().mean()}


METHOD = {"lr-hr": "name: plain_sr, scale: 2", "paired": "name: translation, kind: paired"}
METHOD["unpaired"] = METHOD["paired"].replace("paired", "unpaired")
READERS = ("none", "ram", "device", "stream", "http", "staged", "staged stream")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders lr-hr, paired and unpaired: seven samples in shards of three."""
    folder = tmp_path_factory.mktemp("sets")
    photos = [noise(20, 24, seed) for seed in range(7)]
    super_resolution = [{"hr.png": photo, "lr2.png": downsample_uint8(photo, 2)} for photo in photos]
    write_set(folder / "lr-hr", "lr-hr", super_resolution, scales=(2,))
    write_set(folder / "paired", "paired", [{"ab.jpg": noise(16, 32, seed)} for seed in range(7)])
    domains = [{"a.jpg": noise(16, 16, seed)} for seed in range(4)] + [
        {"b.png": noise(16, 20, 9 + n)} for n in range(3)
    ]
    write_set(folder / "unpaired", "unpaired", domains)
    return folder


@pytest.fixture(scope="module", autouse=True)
def toy_method() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "translation", Translation)
        patch.setitem(GENERATORS, "Translator", Translator)
        yield


def command(kind: str, sets: Path, folder: Path, reader: str, address: str = "") -> list[str]:
    config = folder / f"{kind}.yaml"
    sizes = "patch: 16" if kind == "lr-hr" else "load_size: 12, crop: 8"
    config.write_text(
        f"name: {kind}\nmethod: {{{METHOD[kind]}}}\nruns: {folder / 'runs'}\n"
        f"data: {{train: '{sets / kind}', {sizes}, workers: 2, samples_per_epoch: 16}}\n"
        "train: {steps: 6, batch_size: 4, device: cpu, trackers: [], log_every: 1, checkpoint_every: 3}\n"
    )
    more = {
        "none": [],
        "ram": ["data.cache=ram"],
        "device": ["data.cache=device"],
        "stream": ["data.reader=stream"],
        "http": ["data.reader=stream", f"data.train={address}{kind}"],
        "staged": [f"data.stage={folder / 'scratch'}"],
        "staged stream": [f"data.stage={folder / 'scratch'}", "data.reader=stream", f"data.train={address}{kind}"],
    }
    return [str(config), *more[reader]]


class Trained(NamedTuple):
    """What a command has left: its result, weights and lines, and whether shards were fetched for it."""

    result: dict[str, Any]
    weights: dict[str, Tensor]
    lines: list[dict[str, Any]]
    fetched: bool


@pytest.fixture(scope="module")
def trained(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """The run of a kind from a reader, made once."""

    @functools.cache
    def train_once(kind: str, reader: str) -> Trained:
        folder = tmp_path_factory.mktemp("run")
        with Server(sets) as server:
            assert train.main(command(kind, sets, folder, reader, server.address())) == 0
            fetched = any(request.path.endswith(".tar") for request in server.requests)
        [run] = (folder / "runs").iterdir()
        [weights] = (run / "generators" / "last").glob("*.safetensors")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return Trained(json.loads((run / "result.json").read_text()), load_file(weights), lines, fetched)

    return train_once


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", METHOD)
def test_each_kind_trains_from_each_reader(kind: str, reader: str, trained: Callable[[str, str], Trained]) -> None:
    """The indexed readers give the same run to the bit; the order of a stream is part of a run's identity."""
    run, plain = trained(kind, reader), trained(kind, "none")
    assert run.fetched == (reader in ("http", "staged stream"))
    assert run.result["steps"] == 6
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(tensor).all() for tensor in run.weights.values())
    if reader in ("ram", "device", "staged"):
        assert run.result["identity"] == plain.result["identity"]
        assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())
    elif reader != "none":
        assert plain.result["identity"] != run.result["identity"] == trained(kind, "stream").result["identity"]


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("paired", ["data.train={sets}/unpaired"], r"holds unpaired samples, the method needs paired"),
        ("lr-hr", ["data.train={sets}/paired"], r"holds paired samples, the method needs lr-hr"),
        ("paired", ["data.crop=13"], r"data.crop"),
        ("paired", ["data.train=http://127.0.0.1:9/paired"], r"could not|cannot|refused"),
        ("paired", ["data.train=s3://bucket/paired", "data.reader=stream"], r"s3"),
        ("paired", ["data.train=pipe:cat", "data.reader=stream"], r"pipe"),
        ("paired", ["data.reader=stream", "data.cache=ram"], r"data.cache"),
        ("paired", ["data.stage={sets}/paired/index.json"], r"index.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    kind: str, more: list[str], message: str, sets: Path, tmp_path: Path
) -> None:
    arguments = [*command(kind, sets, tmp_path, "none"), *(part.format(sets=sets) for part in more)]
    with pytest.raises(UserError, match=message):
        train.main(arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("reader", ["none", "device"])
def test_a_run_goes_on_with_another_cache(
    reader: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-batches, with two batches an iteration, stopped after the fourth: the bits of an undisturbed one."""
    options = ["train.accumulation=2", "method.batches=2", "data.workers=0"]
    for folder in ("undisturbed", "stopped"):
        (tmp_path / folder).mkdir()
    assert train.main([*command("unpaired", sets, tmp_path / "undisturbed", "none"), *options]) == 0
    runs = {
        name: load_run([*command("unpaired", sets, tmp_path / "stopped", name), *options])
        for name in ("none", "device")
    }
    with StopSignals() as signals, monkeypatch.context() as patch:
        patch.setattr(Training, "take_step", _signalled(Training.take_step, signals, after=4))
        assert trainer.train(runs.pop(reader), signals) is None
    [other] = runs.values()
    assert trainer.train(other) is not None
    expected, found = (_last(tmp_path / folder) for folder in ("undisturbed", "stopped"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def _signalled(take_step: Callable[..., None], signals: StopSignals, after: int) -> Callable[..., None]:
    """A signal comes in the step that is the `after`-th."""

    def taken(training: Training, step: int, batches: Sequence[Batch]) -> None:
        take_step(training, step, batches)
        signals.received = step == after - 1

    return taken


def _last(folder: Path) -> dict[str, Tensor]:
    [run] = (folder / "runs").iterdir()
    [weights] = (run / "generators" / "last").glob("*.safetensors")
    return load_file(weights)


def test_the_reader_is_told_what_trains(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or `data.cache: device` would keep the set in the host's memory."""
    given: list[Any] = []
    opened = trainer.open_reader

    def seen(*arguments: Any) -> Any:
        given.append(inspect.signature(opened).bind(*arguments).arguments.get("device"))
        return opened(*arguments)

    monkeypatch.setattr(trainer, "open_reader", seen)
    assert train.main([*command("paired", sets, tmp_path, "device"), "train.steps=1"]) == 0
    assert given == [torch.device("cpu")]
