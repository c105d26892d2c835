"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hpcdistill.console import err, is_main_process, say

# Of an evaluation without a metric, e.g. of unpaired images where no feature network is at hand.
NOTHING_MEASURED = "nothing could be measured; the last weights are kept"


class TrainingProgress:
    """Counts images and shows rate, time left, the losses of the last log point and the last evaluation."""

    def __init__(self, name: str, first_step: int, steps: int, batch_size: int) -> None:
        self.name, self.first, self.steps, self.batch_size = name, first_step, steps, batch_size
        self.step = first_step
        self.losses = ""
        self.evaluation = ""
        self._started = time.perf_counter()
        self._live: Progress | None = None
        if is_main_process() and err.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]:.0f} images/s"),
                TextColumn("{task.fields[losses]}", style="cyan"),
                TextColumn("{task.fields[evaluation]}", style="green"),
                console=err,
                refresh_per_second=4,
            )
            self._task = self._live.add_task(
                name, total=steps, completed=first_step, rate=0.0, losses="", evaluation=""
            )

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since this session's first step."""
        return time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        return (self.step - self.first) * self.batch_size / max(self.seconds, 1e-9)

    def advance(self) -> None:
        self.step += 1
        if self._live:
            self._live.update(self._task, completed=self.step, rate=self.images_per_second)

    def show_losses(self, losses: dict[str, float]) -> None:
        """Show the means of a log point; without a terminal this prints one line."""
        self.losses = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if self._live:
            self._live.update(self._task, losses=self.losses)
        else:
            left = (self.steps - self.step) * self.seconds / max(self.step - self.first, 1)
            say(
                f"{self.name} step {self.step}/{self.steps}  {self.images_per_second:.0f} images/s  "
                f"{_clock(left)} left  {self.losses}"
            )

    def show_evaluation(self, metrics: dict[str, float]) -> None:
        self.evaluation = " ".join(f"{name} {value:.3f}" for name, value in metrics.items()) or NOTHING_MEASURED
        if self._live:
            self._live.update(self._task, evaluation=self.evaluation)
        else:
            say(f"{self.name} step {self.step}/{self.steps}  evaluated: {self.evaluation}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
