"""Estimated GPU hours of runs that have not been run, from a table of seconds a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hpcdistill.config import RunConfig
from hpcdistill.errors import UserError
from hpcdistill.run import relative_place
from hpcdistill.settings import MOST_STEPS, Section, load_section

ESTIMATES = Path("configs/estimates.yaml")


class Speed(Section):
    """Seconds a step of the runs that `when` fits."""

    when: dict[str, Any] = Field(description="configuration key -> its value, or a list of values; absent = null")
    seconds: float = Field(gt=0, le=1e6, description="seconds a training step, evaluation and reading included")
    source: str = Field("", description="where the number is from")


class Estimates(Section):
    """How fast runs are, as far as somebody has timed them."""

    gpu: str = Field("", description="the GPU that the seconds are of")
    seconds_per_step: tuple[Speed, ...] = Field((), description="the first that fits counts")
    samples: dict[str, Annotated[int, Field(gt=0, le=MOST_STEPS)]] = Field(
        {}, description="training set, relative to the data root -> samples an epoch"
    )

    def of(self, config: RunConfig) -> tuple[int | None, float | None]:
        """Steps of the run, and its GPU hours; None where they are not known."""
        steps = self.steps(config)
        if steps is None:
            return None, None
        speed = next((speed for speed in self.seconds_per_step if _fits(speed, config)), None)
        return steps, steps * speed.seconds / 3600 if speed else None

    def steps(self, config: RunConfig) -> int | None:
        """Optimizer steps of the run; None where an epoch is as long as data that are not known."""
        train, per_epoch = config.train, config.data.samples_per_epoch
        if train.steps:
            return train.steps
        if per_epoch is None:
            counts = [self.samples.get(relative_place(place)) for place in config.data.train]
            if not counts or None in counts:
                return None
            per_epoch = sum(count for count in counts if count is not None)
        return max(1, round(train.epochs * per_epoch / train.batch_size))


def load_estimates(path: Path | None = None) -> Estimates:
    """The table at `path`, by default configs/estimates.yaml; without that file nothing is known."""
    if path is None and not ESTIMATES.is_file():
        return Estimates()
    path = path or ESTIMATES
    if not path.is_file():
        raise UserError(f"{path}: no such table of estimates")
    return load_section(path, Estimates, "configs/estimates.yaml in the clone")


def _fits(speed: Speed, config: RunConfig) -> bool:
    for key, wanted in speed.when.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True
