"""Small methods, data and evaluators for the tests of the loop: networks of a few numbers, everything in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hpcdistill.data.counter import draw
from hpcdistill.methods.base import Batch, Carry, Group, Method, OptimizerSettings, Phase, Progress, Segment, Terms
from hpcdistill.methods.replay_pool import ReplayPool
from hpcdistill.models import GENERATORS
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.evaluation import Evaluation, Evaluator
from hpcdistill.training.loop import Outcome, Training
from hpcdistill.training.run_folder import RunFolder

SEED = 3
BATCH = 8
DATA_STREAM = 1001  # a stream of data.counter that nothing in the library uses


class Killed(BaseException):
    """Stands in for a kill inside the test's own process: no handler of the library may catch it."""


def uniform(numbers: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """[N, count] numbers in [0, 1), a function of the sample's number alone."""
    words = [word for part in range(math.ceil(count / 4)) for word in draw(SEED, DATA_STREAM, numbers, part)]
    return np.stack(words[:count], axis=1) / 2.0**32


class ToyReader:
    """Global batches as functions of the samples' numbers, of which a rank gets its contiguous share.

    `before` is called with each step before its batch is delivered: tests interrupt a run there.
    """

    def __init__(
        self,
        batch_size: int,
        samples: Callable[[NDArray[np.int64]], dict[str, Tensor]],
        rank: int = 0,
        ranks: int = 1,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.batch_size, self.samples, self.rank, self.share = batch_size, samples, rank, batch_size // ranks
        self.before = before

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.batch_size + self.rank * self.share
        return self.samples(np.arange(first, first + self.share))

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            if self.before:
                self.before(step)
            yield self[step]


def kill_at(step: int) -> Callable[[int], None]:
    """A `before` that interrupts a run when the batch of `step` is asked for."""

    def before(current: int) -> None:
        if current == step:
            raise Killed

    return before


def run(
    method: Method,
    reader: ToyReader,
    folder: Path,
    steps: int,
    evaluator: Evaluator | None = None,
    evaluate_every: int = 1000,
    **options: Any,
) -> Outcome:
    """`train` on the CPU, unless a device is named, with a configuration that logs each step."""
    settings = {"device": "cpu", "log_every": 1, "gradient_norms_every": 0, "batch_size": reader.batch_size, **options}
    config = TrainConfig(trackers=(), **settings)
    run_folder = RunFolder(folder)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run_folder.create("", {})
    accelerator.wait_for_everyone()
    training = Training(
        method,
        reader,
        evaluator,
        run_folder,
        accelerator,
        config,
        steps=steps,
        evaluate_every=evaluate_every,
        seed=SEED,
    )
    return training.run()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def saved(folder: Path, which: str = "last", name: str = "line") -> dict[str, Tensor]:
    """A saved generator's tensors."""
    return load_file(folder / "generators" / which / f"{name}.safetensors")


def newest_tensors(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the newest checkpoint's tensor files, but for the best generators, whose notes name the run."""
    path = max((folder / "checkpoints").glob("step-*"))
    files = (file for file in sorted(path.rglob("*.safetensors")) if not file.parent.name.startswith("best"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def states_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# --- linear regression -----------------------------------------------------------------------------------------------

INPUTS = 4
PENALTY = 0.05


class Line(nn.Module):
    """y = w x + b; the buffer `age` counts its training passes, so that a test sees when buffers move."""

    takes = "lr"
    age: Tensor

    def __init__(self, inputs: int = INPUTS, dropout: float = 0.0) -> None:
        super().__init__()
        self.arguments = {"inputs": inputs, "dropout": dropout}
        self.linear = nn.Linear(inputs, 1).double()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.age += 1
        y: Tensor = self.linear(self.dropout(x))
        return y.squeeze(1)


GENERATORS["Line"] = Line


class Regression(Method):
    """Terms: `error`, the mean squared error, and `penalty`, PENALTY * |w|^2.

    A batch may hold `spike` [B], added to the penalty, and `height` [B], whose mean h gives the term `kink`
    sqrt(h + sum(w) - sum(w) detached): finite everywhere, its gradient infinite at h = 0.
    """

    def __init__(self, optimizer: OptimizerSettings | None = None, dropout: float = 0.0) -> None:
        super().__init__(None)
        torch.manual_seed(SEED)
        self.line = Line(dropout=dropout)
        self.groups = {"line": Group(self.line, optimizer or OptimizerSettings(learning_rate=0.05))}
        self.generators = {"line": self.line}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("fit", "line", self.loss),)

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        weight = self.line.linear.weight
        terms = {
            "error": (self.call("line", batch["x"]) - batch["y"]).square().mean(),
            "penalty": PENALTY * weight.square().sum(),
        }
        if "spike" in batch:
            terms["penalty"] = terms["penalty"] + batch["spike"].mean()
        if "height" in batch:
            terms["kink"] = (batch["height"].mean() + weight.sum() - weight.sum().detach()).sqrt()
        return terms


def regression_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """x [B, 4] and y = 2 x0 - x1 + x3 + 0.5 plus noise."""
    drawn = uniform(numbers, INPUTS + 1)
    x = 2 * drawn[:, :INPUTS] - 1
    y = x @ np.array([2.0, -1.0, 0.0, 1.0]) + 0.5 + 0.1 * drawn[:, INPUTS]
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}


class SegmentedRegression(Regression):
    """A regression with segments; `entered` lists what `on_enter` has seen."""

    def __init__(self, segments: Callable[[SegmentedRegression], tuple[Segment, ...]]) -> None:
        super().__init__(None)
        self._segments = segments
        self.entered: list[tuple[str, int]] = []

    def segments(self) -> tuple[Segment, ...]:
        return self._segments(self)


class TableEvaluator:
    """Scores a generator by the table's value for its age, whatever it has learnt."""

    def __init__(
        self, table: Mapping[int, float], larger_is_better: bool = True, selects: str | None = "score"
    ) -> None:
        self.table, self.larger_is_better, self.selects = table, larger_is_better, selects

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Any = None) -> Evaluation:
        [generator] = generators.values()
        assert isinstance(generator.age, Tensor)
        return Evaluation({"score": self.table.get(int(generator.age), 0.0)})

    def protocol(self) -> dict[str, Any]:
        return {}


# --- a GAN -----------------------------------------------------------------------------------------------------------

SIDE = 8
POOL_SIZE = 50


class Painter(nn.Module):
    """The toy generator: [B, 1, 8, 8] -> [B, 1, 8, 8]."""

    takes = "lr"

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.arguments = {"norm": norm}
        between = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), between, nn.Tanh(), nn.Conv2d(6, 1, 3, padding=1))
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        painted: Tensor = self.body(image)
        return painted


GENERATORS["Painter"] = Painter


class Critic(nn.Module):
    """The toy discriminator, spectrally normalised: [B, 1, 8, 8] -> [B, 1, 2, 2]."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(1, 6, 4, stride=2, padding=1)),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(6, 1, 4, stride=2, padding=1)),
        )
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        verdict: Tensor = self.body(image)
        return verdict


class ToyGAN(Method):
    """LSGAN with an L1 term. The generator's phase leaves its fakes to the discriminator's, by way of the pool."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(None)
        torch.manual_seed(SEED)
        self.generator, self.discriminator = Painter(norm), Critic(norm)
        self.pool = ReplayPool(POOL_SIZE, 1, SIDE, SIDE, seed=SEED).double()
        settings = OptimizerSettings(learning_rate=2e-2, schedule="linear", betas=(0.5, 0.999))
        self.groups = {
            "generator": Group(self.generator, settings),
            "discriminator": Group(self.discriminator, settings.model_copy(update={"clip_norm": 0.5})),
        }
        self.generators = {"painter": self.generator}
        self.memory = {"pool": self.pool}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("generator", "generator", self.generator_loss),
            Phase("discriminator", "discriminator", self.discriminator_loss, self.pass_the_pool),
        )

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        fake = self.call("generator", batch["x"])
        carry["fake"] = fake.detach()
        return {
            "adversarial": (self.discriminator(fake) - 1).square().mean(),
            "l1": 0.5 * (fake - batch["y"]).abs().mean(),
        }

    def pass_the_pool(self, batches: Sequence[Batch], carries: Sequence[Carry]) -> None:
        fakes, numbers = ([part[name] for part in parts] for name, parts in (("fake", carries), ("number", batches)))
        images = self.pool.query(torch.cat(fakes), torch.cat(numbers))
        for carry, piece in zip(carries, images.chunk(len(carries)), strict=True):
            carry["fake"] = piece

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        return {
            "real": 0.5 * (self.call("discriminator", batch["y"]) - 1).square().mean(),
            "fake": 0.5 * self.call("discriminator", carry["fake"]).square().mean(),
        }


def gan_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """x noise, y the same image smoothed: [B, 1, 8, 8] in [0, 1)."""
    x = torch.from_numpy(uniform(numbers, SIDE * SIDE)).view(-1, 1, SIDE, SIDE)
    y = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    return {"x": x, "y": y, "number": torch.from_numpy(numbers)}


# --- runs of them ----------------------------------------------------------------------------------------------------


def fit(
    folder: Path,
    steps: int,
    method: Method | None = None,
    *,
    killed: int | None = None,
    before: Callable[[int], None] | None = None,
    **options: Any,
) -> Outcome | None:
    """`run` of the regression, or of another toy method on its own samples.

    With `killed` it is interrupted as soon as the batch of that step is asked for, and there is no outcome.
    """
    method = method or Regression()
    samples = gan_samples if isinstance(method, ToyGAN) else regression_samples
    reader = ToyReader(BATCH, samples, before=before if killed is None else kill_at(killed))
    if killed is None:
        return run(method, reader, folder, steps, **options)
    with pytest.raises(Killed):
        run(method, reader, folder, steps, **options)
    return None


def sr_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """HR noise of 16x16 and its LR images, float32, for the smallest methods that ship."""
    hr = torch.from_numpy(uniform(numbers, 256)).float().view(-1, 1, 16, 16)
    return {"hr": hr} | {f"lr{scale}": nn.functional.avg_pool2d(hr, scale) for scale in (2, 4)}
