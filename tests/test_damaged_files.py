"""Our own files, damaged in many ways, and read by whoever reads them: success or one line, never anything else."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from damages import EACH, damages, ends_well
from safetensors.torch import save
from tiny_runs import packed_noise

from hpcdistill.data.config import DataConfig
from hpcdistill.data.fetch.digests import file_digest, record, recorded
from hpcdistill.data.fetch.download import _PartFile
from hpcdistill.data.fetch.location import is_whole
from hpcdistill.data.fetch.unpacking import MARKER, unpack
from hpcdistill.data.index import load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.pack.shard_files import FinishedShard, read_sidecars, write_sidecar
from hpcdistill.data.read.reader import PatchReader
from hpcdistill.data.read.staging import clean, release, stage
from hpcdistill.errors import UserError
from hpcdistill.metrics.sr_test_sets import PackedTestSet
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.registry import METADATA_KEY, load_generator, unique_state
from hpcdistill.sweep.grid_file import read_grid_file
from hpcdistill.sweep.plots import curve
from hpcdistill.sweep.profile import load_profile
from hpcdistill.sweep.results import find_results, finished_run, started_run
from hpcdistill.sweep.slurm_queue import Queue
from hpcdistill.sweep.status import task_statuses
from hpcdistill.sweep.task_folder import TaskFolder
from hpcdistill.train import _show
from hpcdistill.training.checkpoint import MANIFEST, Checkpoints
from hpcdistill.training.lock import Holder, RunLock
from hpcdistill.training.metrics_log import MetricsLog
from hpcdistill.training.position import Position, _position
from hpcdistill.training.records import is_finished, read_environment, read_result
from hpcdistill.training.run_folder import RunFolder


class Made:
    """A file of ours with those who read it; `every`: of the damages, so many are passed over where reading is slow."""

    def __init__(
        self, file: Path, *readers: Callable[[], object], rest: Callable[[], object] | None = None, every: int = 1
    ) -> None:
        self.file, self.readers, self.rest, self.every = file, readers, rest, every

    def check(self) -> None:
        whole = self.file.read_bytes()
        assert all(map(ends_well, self.readers)), "undamaged, it is read"
        self.file.write_bytes(whole)
        for content in itertools.islice(damages(whole), 0, None, self.every):
            for read in self.readers:
                self.file.write_bytes(content)
                try:
                    ends_well(read)
                except BaseException as error:
                    raise AssertionError(f"{self.file.name} with {content[:300]!r}") from error
            if self.rest:
                self.rest()


RESULT = {
    "name": "toy",
    "identity": "0123abcd",
    "key": "k",
    "method": "plain_sr",
    "steps": 100,
    "seconds": 1.5,
    "best": {"step": 90, "metrics": {"student/set5/psnr": 30.5}},
    "last": {"step": 100, "metrics": {"student/set5/psnr": 31.5, "student/set5/ssim": None}},
    "protocol": {"selects": "student/set5/psnr", "test_sets": {"set5": 5}, "note": "PSNR"},
    "revision": "0123456789ab",
}
STATE = {
    "key": "k",
    "name": "toy",
    "state": "finished",
    "attempt": 1,
    "job": "17_3",
    "host": socket.gethostname(),
    "pid": 7,
}
STATE |= {"started": "2026-11-22T02:50:00Z", "ended": "2026-11-22T02:55:00Z", "run": "runs/toy-0123abcd", "code": 0}
STATE |= {"message": None, "log": "attempt-1/rank0.log"}
PLAN = {
    "time": "2026-11-22T02:50:00Z",
    "grids": {"g": {"cells": [{"title": "a", "seed": 0, "key": "k", "labels": {"rate": "1"}}]}},
    "runs": {"k": {"name": "toy", "steps": 100, "teacher": None}},
    "jobs": {"k": "17_3"},
    "local": {"host": socket.gethostname(), "pid": 7},
    "queue": ["k"],
    "command": ["grid.yaml"],
}


class Sweep:
    """A finished run and the sweep that it is of."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder / "sweep", folder / "runs"
        self.run, self.task = self.runs / "toy-0123abcd", TaskFolder(self.folder / "tasks" / "k")
        sessions = [{"revision": "a", "command": "python -m hpcdistill.train config.json"}]
        environment = {"identity": {"data": ["12"], "version": 1}, "sessions": sessions}
        self.write(self.run / "result.json", RESULT)
        self.write(self.run / "environment.json", environment)
        rows = [{"step": step, "images": 8 * step, "seconds": 0.1 * step, "loss": 0.5} for step in range(1, 4)]
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.write(self.task.path / "state.json", STATE)
        config = {"name": "toy", "runs": "runs", "data": {"eval": {"set5": "x"}}, "eval": {"select": "set5"}}
        self.write(self.task.config, config | {"train": {"steps": 100}})
        self.write(self.task.path / "environment.json", {"HPCDISTILL_DATA": "data/packed"})
        self.write(self.folder / "submissions" / "20261122T025000Z-g" / "plan.json", PLAN)

    def write(self, file: Path, value: object) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))

    def look(self) -> None:
        """As status and collect do, which must say the same of a result."""
        [status] = task_statuses(["k"], self.folder, self.runs, Queue({"PATH": ""}), problems=[])
        collected = find_results(self.runs).runs
        if (self.run / "result.json").exists():
            assert (status.state == "finished") >= any(run.key == "k" for run in collected)
            assert bool(collected) == is_finished(self.run)


def of_a_result(folder: Path) -> Made:
    sweep = Sweep(folder)

    def show() -> None:
        _show(read_result(sweep.run) or {})

    found = [show, sweep.look, lambda: finished_run(sweep.runs, "k")]
    return Made(sweep.run / "result.json", *found)


def of_an_environment(folder: Path) -> Made:
    sweep = Sweep(folder)

    def go_on() -> None:
        run = RunFolder(sweep.run)
        run.create("seed: 1\n", {"short": "x"})
        run.release()

    started = [lambda: started_run(sweep.runs, Path("config.json"), 0.0), go_on]
    return Made(sweep.run / "environment.json", lambda: read_environment(sweep.run), sweep.look, *started, every=3)


def of_a_state(folder: Path) -> Made:
    sweep = Sweep(folder)
    return Made(sweep.task.path / "state.json", sweep.look, lambda: sweep.task.save_state(STATE))


def of_a_task(folder: Path) -> Made:
    sweep = Sweep(folder)
    return Made(sweep.task.config, sweep.task.values, sweep.look)


def of_a_tasks_environment(folder: Path) -> Made:
    sweep = Sweep(folder)
    return Made(sweep.task.path / "environment.json", sweep.task.environment)


def of_a_submission(folder: Path) -> Made:
    sweep = Sweep(folder)
    (sweep.run / "result.json").unlink()
    return Made(sweep.folder / "submissions" / "20261122T025000Z-g" / "plan.json", sweep.look)


def of_metrics(folder: Path) -> Made:
    sweep = Sweep(folder)
    file = sweep.run / "metrics.jsonl"
    file.write_bytes(file.read_bytes().splitlines()[-1])  # one line, so that it is JSON
    (sweep.run / "result.json").unlink()

    def draw() -> None:
        (run,) = find_results(sweep.runs).runs or [None]
        if run:
            curve(run, "loss")

    def read() -> None:
        sweep.write(sweep.run / "result.json", RESULT)
        curve(find_results(sweep.runs).runs[0], "loss")
        (sweep.run / "result.json").unlink()

    return Made(file, sweep.look, read, lambda: MetricsLog(file, Accelerator(cpu=True)).rewind(1 << 20, 3))


def of_an_index(folder: Path) -> Made:
    packed = packed_noise(folder, 2, (16, 20))
    shutil.copy(packed / "shard-00000.tar", folder.parent / "x.tar")

    def train() -> None:
        config = DataConfig(patch=8, cache="none")
        PatchReader([packed], Needs("lr-hr", 2, (2,)), config, seed=0, batch_size=2)[0]

    return Made(packed / "index.json", lambda: PackedTestSet(packed, 2)[:], train)


def of_a_staged_set(folder: Path) -> Made:
    packed, scratch = packed_noise(folder, 2, (16, 20)), folder / "scratch"
    staged = stage(str(packed), scratch)

    def again() -> None:
        stage(str(packed), scratch)
        assert load_index(staged)
        release(staged)

    def tidy() -> None:
        release(staged)
        clean(scratch)
        staged.mkdir(parents=True, exist_ok=True)

    def back() -> None:
        shutil.rmtree(staged, ignore_errors=True)
        stage(str(packed), scratch)

    return Made(staged / ".staged.json", again, tidy, rest=back, every=5)


def of_a_finished_shard(folder: Path) -> Made:
    index = load_index(packed_noise(folder, 2, (16, 20)))
    digests = (("0.png", 12, "ab"), ("1.png", 12, "cd"))
    settings = {"recipe": index.recipe, "split": index.split}
    finished = FinishedShard(settings, 100, index.shards[0], index.samples, digests, (), None)
    write_sidecar(folder, finished)
    (file,) = folder.glob(".shard-*.json")

    def read() -> None:
        for found in read_sidecars(folder).values():
            if found:
                assert "/" not in found.shard.name
                is_whole(folder / found.shard.name, found.shard)

    return Made(file, read)


def of_recorded_digests(folder: Path) -> Made:
    record(folder, "a.zip", {"bytes": 3, "sha256": "0" * 64, "address": "https://example.org/a.zip"})
    return Made(folder / "recorded.json", lambda: recorded(folder))


def of_a_verified_digest(folder: Path) -> Made:
    (folder / "a.zip").write_bytes(b"abc")
    digest = file_digest(folder / "a.zip")

    def read() -> None:
        found = file_digest(folder / "a.zip")
        assert len(found) == len(digest)

    return Made(folder / ".a.zip.verified.json", read)


def of_an_unpacked_archive(folder: Path) -> Made:
    (folder / "in" / "images").mkdir(parents=True)
    (folder / "in" / "images" / "a.txt").write_text("a")
    archive = Path(shutil.make_archive(str(folder / "a"), "zip", folder / "in"))
    out = unpack(archive, folder / "out")
    return Made(out / MARKER, lambda: unpack(archive, out))


def of_a_partial_download(folder: Path) -> Made:
    part = _PartFile(folder / "a.zip")
    part.sidecar.write_text(json.dumps({"address": "https://example.org/a.zip", "validator": "x", "total": 3}))
    return Made(part.sidecar, part.origin)


def of_a_lock(folder: Path) -> Made:
    ours = Holder.this_process({"PATH": ""})
    file = folder / "lock.json"
    file.write_text(json.dumps(asdict(ours) | {"token": "ab", "job": "17", "array": "17_3", "elastic": "x"}))
    lock = RunLock(file, environ={"PATH": ""})

    def judge() -> None:
        if other := Holder.read(file.read_bytes()):
            assert str(other)
            lock._is_free(other, ours)

    return Made(file, judge)


def checkpoints(folder: Path) -> Checkpoints:
    kept = Checkpoints(folder / "checkpoints")
    state = vars(Position(10, 1.5, {"step": 5, "metrics": {"a": 1.0}}, None)) | {"scaler": {}}
    kept.save(10, {"networks/a": {"weight": torch.ones(2)}}, state, {"best/a.safetensors": b"\x02\0\0\0\0\0\0\0{}"})
    return kept


def of_a_manifest(folder: Path) -> Made:
    kept = checkpoints(folder)
    return Made(kept.folder / "step-00000010" / MANIFEST, kept.newest)


def of_a_checkpoints_state(folder: Path) -> Made:
    """With a digest that holds: another version, or a person, has written it."""
    kept = checkpoints(folder)
    whole = kept.newest()
    assert whole is not None
    file = folder / "state.json"
    file.write_bytes(whole.files["state.json"])

    def take_back() -> None:
        _position(type(whole)(whole.path, 10, {}, {}, {"state.json": file.read_bytes()}))

    return Made(file, take_back)


def of_a_generator(folder: Path) -> Made:
    """The description in the metadata of the weights."""
    network = FSRCNN(2)
    file = folder / "description.json"
    description = {"class": "FSRCNN", "arguments": network.arguments, "notes": {"step": 3}}
    file.write_text(json.dumps(description))
    weights = unique_state(network)

    def load() -> None:
        text = file.read_bytes().decode("utf-8", "replace")
        (folder / "a.safetensors").write_bytes(save(weights, {METADATA_KEY: text}))
        load_generator(folder / "a.safetensors")

    return Made(file, load)


KINDS = (of_a_result, of_an_environment, of_a_state, of_a_task, of_a_tasks_environment, of_a_submission, of_metrics)
KINDS += (of_an_index, of_a_staged_set, of_a_finished_shard, of_recorded_digests, of_a_verified_digest)
KINDS += (of_an_unpacked_archive, of_a_partial_download, of_a_lock, of_a_manifest, of_a_checkpoints_state)
KINDS += (of_a_generator,)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_damage_ends_in_success_or_one_line(make: Callable[[Path], Made], tmp_path: Path) -> None:
    make(tmp_path).check()


def test_cut_weights_end_in_one_line(tmp_path: Path) -> None:
    content = save(unique_state(FSRCNN(2)), {METADATA_KEY: json.dumps({"class": "FSRCNN"})})
    file = tmp_path / "a.safetensors"
    chance = random.Random(0)
    for _ in range(EACH):
        file.write_bytes(content[: chance.randrange(len(content))])
        assert not ends_well(lambda: load_generator(file))


@pytest.mark.parametrize(
    "text", ["a: &a [*a]\n", "cells: &a [*a]\nmetrics: {}\n", "title: &x {x: *x}\n", "a: " + "[" * 500]
)
def test_yaml_without_an_end_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    for read in (read_grid_file, lambda path: load_profile(str(path)), lambda path: load_recipe(str(path))):
        with pytest.raises(UserError, match=r"file\.yaml: not (valid|readable as) YAML"):
            read(file)


def test_nothing_outside_a_checkpoint_is_read(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(save({"weight": torch.ones(2)}))
    os.utime(outside, (1, 1))
    manifest = kept.folder / "step-00000010" / MANIFEST
    digests = json.loads(manifest.read_text()) | {"../../outside.safetensors": file_digest(outside, keep=False)}
    manifest.write_text(json.dumps(digests))
    assert kept.newest() is None
