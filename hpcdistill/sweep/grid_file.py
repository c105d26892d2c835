"""A grid file as it is written: its keys, and one line for what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from hpcdistill.errors import UserError
from hpcdistill.settings import Section, load_section

SUFFIXES = (".yaml", ".yml")


class MetricSpec(Section):
    """A number of a cell."""

    label: str = Field("", description="the column's head; unset = the metric's own name")
    of: str | None = Field(
        None,
        description="generator/test set/metric as in result.json, or generator/cost/latency_ms (runtime_ms, macs_G, "
        "params_M, params_k) as `benchmark latency --protocol paper` measures it; {label} is filled in; unset = only "
        "printed",
    )
    better: Literal["higher", "lower"] = Field(description="which of two numbers is the better one")
    digits: int = Field(2, ge=0, le=8, description="digits after the point, as the paper prints")
    device: str = Field("", description="what the paper's time was measured on, for the table's foot")


class Part(Section):
    """What an axis value, or a cell, adds to its command line. {label} is filled in everywhere."""

    kind: Literal["run", "reported"] = Field("run", description="reported = shown as printed, never submitted")
    base: str | None = Field(None, description="configuration file, in the place of the grid's")
    overlays: tuple[str, ...] = Field((), description="files merged over it")
    set: tuple[str, ...] = Field((), description="key=value overrides")
    of: dict[str, str] = Field({}, description="metric -> its name in result.json where it differs from the grid's")
    measured: dict[str, float] = Field({}, description="metric -> our own number where nothing is trained")
    note: str = Field("", description="a line for the table's foot")

    @field_validator("set")
    @classmethod
    def _overrides(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_overrides(value)


class CellSpec(Part):
    """An explicit cell."""

    labels: dict[str, str] = Field(min_length=1, description="its place in the table")
    printed: dict[str, float] = Field({}, description="metric -> the paper's number")

    @field_validator("labels", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {key: _label(text) for key, text in value.items()} if isinstance(value, Mapping) else value


class GridFile(Section):
    """A grid file. Either `include`, or a table."""

    include: tuple[str, ...] = Field((), description="other grid files, beside this one")
    title: str = Field("", description="the table's caption")
    paper: str = Field("", description="DSSD, FESD, or free text")
    table: str = Field("", description="the table's number in it")
    metrics: dict[str, MetricSpec] = Field({}, description="numbers of a cell; the first decides order and bold")
    base: str | None = Field(None, description="configuration file of every cell that names none")
    overlays: tuple[str, ...] = Field((), description="files merged over it in every cell")
    set: tuple[str, ...] = Field((), description="key=value overrides of every cell")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each cell is run once with each of them")
    ours: Literal["best", "last"] = Field(
        "best", description="which of a run's weights stand beside print; the other is shown too"
    )
    within: tuple[str, ...] = Field((), description="labels that cells share to be compared; unset = all with all")
    printed_images: dict[str, int] = Field(
        {}, description="test set -> how many images the printed numbers are of; a table names rows that have others"
    )
    axes: dict[str, dict[str, Part]] = Field({}, description="their product makes cells: axis -> value -> part")
    printed: tuple[dict[str, Any], ...] = Field((), description="the paper's numbers of products: labels and metrics")
    cells: tuple[CellSpec, ...] = Field((), description="explicit cells, after the products")

    @field_validator("set")
    @classmethod
    def _overrides(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_overrides(value)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or any(not 0 <= seed < 2**32 for seed in value):
            raise ValueError("expected different whole numbers from 0 to 2^32 - 1")
        return value

    @field_validator("axes", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            axis: {_label(label): {} if part is None else part for label, part in values.items()}
            if isinstance(values, Mapping)
            else values
            for axis, values in value.items()
        }

    @field_validator("printed", mode="before")
    @classmethod
    def _printed_labels(cls, value: Any) -> Any:
        lines = [line for line in value if isinstance(line, dict)] if isinstance(value, list) else []
        if any(isinstance(item, bool) for line in lines for item in line.values()):
            raise ValueError("a label is read as true or false; put it in quotes")
        return value


def read_grid_file(path: Path) -> GridFile:
    """The content of `path`; UserError, with the key and the remedy, for what is wrong in it."""
    if not path.exists():
        raise UserError(f"{path}: no such grid file")
    content = load_section(path, GridFile, f"{path.parent} for others")
    if content.include:
        if content.model_fields_set - {"include", "title"}:
            raise UserError(f"{path}: include: stands alone (with a title); a table of its own is a file of its own")
    elif not content.metrics:
        raise UserError(f"{path}: metrics: missing; e.g. psnr: {{of: student/set5/psnr, better: higher}}")
    return content


def _label(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("a label is read as true or false; put it in quotes")
    if not isinstance(value, str | int | float):
        raise ValueError(f"a label is text, got {json.dumps(value, default=str)}")
    return str(value)


def _checked_overrides(overrides: tuple[str, ...]) -> tuple[str, ...]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ValueError(f"'{override}' is not an override; write key=value, e.g. train.batch_size=4")
        if key == "seed":
            raise ValueError("the seed is not an override here; name it under seeds")
    return overrides
