"""The table of estimates that ships: it knows every run of the papers' tables, and the sizes of the standard splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.run import load_run
from hpcdistill.sweep.estimates import load_estimates
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
ESTIMATES = load_estimates(ROOT / "configs" / "estimates.yaml")


def test_an_epoch_is_the_larger_side_of_the_recipes_split() -> None:
    assert ESTIMATES.samples
    for place, count in ESTIMATES.samples.items():
        name, _, split = place.partition("/")
        assert count == max(load_recipe(name).images[split].values()), place


@pytest.mark.parametrize("cache", ["auto", "none", "ram", "device"])
def test_the_hours_of_all_tables_are_known(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_grids(["all", "fesd-schedule", "fesd-spectrum"]), None, [f"data.cache={cache}"], ESTIMATES)
    assert [run.name for run in plan.runs.values() if run.hours is None] == []


def test_every_line_is_of_some_run() -> None:
    """A line that nothing fits any more was forgotten when its runs changed."""
    more = [["fesd/edges2shoes", "variants/fesd-online-1"], ["fesd/horse2zebra", "variants/fesd-online-1"]]
    methods = [["omgd/horse2zebra"], ["omgd/edges2shoes-r"], ["original/edges2shoes-r"], ["fesd/edges2shoes-r"]]
    methods += [["wavelet_kd/horse2zebra"], ["wavelet_kd/edges2shoes-r"]]
    sr = [["fsrcnn/x4"], ["dssd/x4"], ["fsrcnn/x4", "variants/network-vdsr"], ["dssd/x4", "variants/network-vdsr"]]
    sr += [["fsrcnn/x4", "variants/network-idn", "variants/rgb"]]
    used: Counter[float] = Counter()
    for files in [*more, *methods, *sr, ["fesd/horse2zebra"]]:
        for cache in ("none", "ram"):
            run = load_run([*(str(ROOT / "configs" / f"{name}.yaml") for name in files), f"data.cache={cache}"])
            taught = [teacher.run for teacher in run.teachers.values() if teacher.run]
            for config in (run.config, *(one.config for one in taught)):
                steps, hours = ESTIMATES.of(config.model_copy(update={"data": run.config.data}))
                assert steps
                assert hours
                used[round(hours * 3600 / steps, 4)] += 1
    assert set(used) == {line.seconds for line in ESTIMATES.seconds_per_step}
