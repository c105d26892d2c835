"""Cluster profiles (`slurm/clusters/*.yaml`): what a cluster's jobs must ask for. default.yaml explains each key."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from hpcdistill.config import RunConfig
from hpcdistill.errors import UserError, nearest, plural
from hpcdistill.settings import Section, load_section
from hpcdistill.storage import user_path

CLUSTERS = Path("slurm/clusters")
MOST, MOST_HOURS, MOST_GB = 10**7, 10**5, 10**6  # far above any cluster, far below what SLURM's numbers hold

# Options of sbatch that a job of a sweep has already, and the profile's key for those that may be chosen.
_OWN_OPTIONS = {
    **{"nodes": "nodes", "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node"},
    **{"gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_task", "time": "hours", "signal": "signal_seconds"},
    **{"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"},
    **{"requeue": "requeue", "no-requeue": "requeue", "array": "parallel or array"},
    **dict.fromkeys(("dependency", "kill-on-invalid-dep", "job-name", "output", "error", "open-mode"), ""),
}


class Shape(Section):
    """What one run asks for."""

    nodes: int = Field(1, ge=1, le=MOST, description="nodes a run")
    gpus_per_node: int = Field(1, ge=0, le=MOST, description="GPUs of each of them; 0 = none")
    tasks_per_node: int | None = Field(
        None, ge=1, le=MOST, description="ranks of each node; null = one a GPU, without GPUs one"
    )
    cpus_per_task: int = Field(4, ge=1, le=MOST, description="CPU cores a rank: data.workers and one more")
    memory: float | None = Field(None, gt=0, le=MOST_GB, description="GB of each node; null = the cluster's default")
    hours: float = Field(
        24.0, gt=0, le=MOST_HOURS, description="time limit; a run that is not finished by then goes on in a new turn"
    )

    @property
    def tasks(self) -> int:
        """Ranks of each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Ranks of a run."""
        return self.nodes * self.tasks

    def __str__(self) -> str:
        gpus = f"{self.gpus_per_node} GPU" if self.gpus_per_node else "CPU"
        ranks = f", {self.tasks} ranks" if self.tasks != max(1, self.gpus_per_node) else ""
        return f"{self.nodes} x ({gpus}{ranks}, {self.tasks * self.cpus_per_task} cores), {self.hours:g} h"


class PartialShape(Section):
    """The keys of `Shape` that some runs have of their own."""

    nodes: int | None = Field(None, ge=1, le=MOST)
    gpus_per_node: int | None = Field(None, ge=0, le=MOST)
    tasks_per_node: int | None = Field(None, ge=1, le=MOST)
    cpus_per_task: int | None = Field(None, ge=1, le=MOST)
    memory: float | None = Field(None, gt=0, le=MOST_GB)
    hours: float | None = Field(None, gt=0, le=MOST_HOURS)


class CollectShape(Section):
    """What the last job, which makes the tables, asks for."""

    partition: str | None = Field(None, description="null = the runs'")
    cpus: int = Field(1, ge=1, le=MOST)
    memory: float | None = Field(None, gt=0, le=MOST_GB, description="GB")
    hours: float = Field(1.0, gt=0, le=MOST_HOURS)


class Profile(Shape):
    """A cluster as the jobs of a sweep see it."""

    partition: str | None = Field(None, description="null = the cluster's default")
    account: str | None = Field(None, description="who pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features the nodes must have")
    sbatch: dict[str, str | int | bool] = Field({}, description="further options of sbatch: name -> value, true = bare")
    shapes: dict[str, PartialShape] = Field({}, description="runs by name (with * and ?) that ask for something else")
    parallel: int = Field(32, ge=1, le=MOST, description="runs of each stage of the sweep at the same time, at most")
    cells_per_device: int = Field(1, ge=1, le=MOST, description="runs of one kind side by side in a process; --local")
    array: int | None = Field(
        None, ge=1, le=MOST, description="tasks of a job array at most; null = as SLURM is configured"
    )
    signal_seconds: int = Field(
        120, ge=1, le=65535, description="seconds before the end in which a run saves and stops"
    )
    requeue: bool = Field(True, description="put stopped, preempted and node-lost runs into the queue again")
    requeues: int = Field(100, ge=0, le=MOST, description="how often at most")
    setup: tuple[str, ...] = Field((), description="lines of the job's shell before the run: modules, environments")
    environment: dict[str, str] = Field({}, description="variables of the job")
    python: str | None = Field(None, description="the interpreter's command, containers included; null = this one")
    scratch: str | None = Field(None, description="node-local folder that data are staged to (data.stage); may have $X")
    set: tuple[str, ...] = Field((), description="key=value overrides of every run, e.g. train.device=cpu")
    snapshot: bool = Field(False, description="run a copy of the code as it is at submission")
    collect: CollectShape = CollectShape()

    @field_validator("set")
    @classmethod
    def _overrides(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for override in value:
            if "=" not in override:
                raise ValueError(f"'{override}' is not an override; write key=value, e.g. train.device=cpu")
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name in value:
            option = name.lstrip("-").replace("_", "-")
            if option in _OWN_OPTIONS:
                key = _OWN_OPTIONS[option]
                raise ValueError(
                    f"'{name}' is set by the sweep itself; " + (f"use the key {key}" if key else "leave it out")
                )
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        words = {True: "true", False: "false"}
        return (
            {k: words[v] if isinstance(v, bool) else v for k, v in value.items()} if isinstance(value, dict) else value
        )

    def shape_of(self, name: str) -> Shape:
        """What the run called `name` asks for: of the patterns in `shapes`, the first that fits counts."""
        values = {key: getattr(self, key) for key in Shape.model_fields}
        for pattern, partial in self.shapes.items():
            if fnmatch.fnmatchcase(name, pattern):
                values |= {key: getattr(partial, key) for key in partial.model_fields_set}
                break
        return Shape(**values)

    def check_fits(self, config: RunConfig) -> None:
        """UserError when the run that `config` describes cannot be run as this profile says."""
        shape, train = self.shape_of(config.name), config.train
        share, rest = divmod(train.batch_size, shape.ranks)
        if rest or not share or share % train.accumulation:
            raise UserError(
                f"does not fit the profile: train.batch_size {train.batch_size} cannot be cut over {shape.ranks} ranks "
                f"(nodes {shape.nodes} x {shape.tasks}) into {train.accumulation} equal micro-batches; "
                f"change nodes or gpus_per_node, under shapes: {{{config.name}: ...}} for this run alone"
            )
        if train.device == "cuda" and not shape.gpus_per_node:
            raise UserError("does not fit the profile: train.device is cuda and gpus_per_node 0; give the runs a GPU")
        if train.device == "cpu" and shape.gpus_per_node:
            raise UserError(
                f"does not fit the profile: train.device is cpu, and {plural(shape.gpus_per_node, 'GPU')} a node would "
                "be idle; set gpus_per_node: 0, or take a profile for CPUs"
            )


def load_profile(name: str) -> Profile:
    """The profile called `name` in slurm/clusters, or in the file of that path. Raises UserError."""
    return load_section(_path_of(name), Profile, f"{CLUSTERS}/default.yaml")


def _path_of(name: str) -> Path:
    path = user_path(name, "--cluster")
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if not path.is_file():
            known = [entry.name for entry in path.parent.glob("*.y*ml")] or [f"{CLUSTERS}/default.yaml"]
            raise UserError(f"{path}: no such cluster profile; {nearest(path.name, known)}")
        return path
    if not CLUSTERS.is_dir():
        raise UserError(f"{CLUSTERS}: no such folder here; run the command in the clone's folder, or give a file")
    profiles = {entry.stem: entry for entry in CLUSTERS.glob("*.yaml")}
    if name not in profiles:
        raise UserError(f"--cluster {name}: no such profile in {CLUSTERS}; {nearest(name, profiles)}")
    return profiles[name]
