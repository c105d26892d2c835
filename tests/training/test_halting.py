"""A loss or a gradient that stops being finite: nothing moves from then on, and the run says what it was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from toy import (
    BATCH,
    Regression,
    TableEvaluator,
    ToyGAN,
    ToyReader,
    gan_samples,
    regression_samples,
    rows,
    run,
    saved,
    states_equal,
)

from hpcdistill.errors import UserError
from hpcdistill.methods.base import OptimizerSettings

BAD_STEP = 7  # 0-based; log points are at steps 5 and 10
FAULTS: dict[str, tuple[str, float, str]] = {
    "nan in one term": ("spike", torch.nan, "the loss term fit/penalty became NaN or infinite by step 10"),
    "infinite term": ("spike", torch.inf, "the loss term fit/penalty became NaN or infinite by step 10"),
    "nan in the data": ("y", torch.nan, "the loss term fit/error became NaN or infinite by step 10"),
    "infinite gradient": ("height", -1.0, r"a gradient \(of finite loss terms\) became NaN or infinite by step 10"),
}


def faulty(
    key: str, value: float, sample: int = BAD_STEP * BATCH + 3
) -> Callable[[NDArray[np.int64]], dict[str, Tensor]]:
    """The regression's samples with a fault in one of them; heights are 1, but add up to 0 in the faulty batch."""

    def samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        count = len(numbers)
        batch = regression_samples(numbers)
        batch |= {"spike": torch.zeros(count).double(), "height": torch.ones(count).double()}
        if key == "height":
            batch[key][torch.from_numpy(numbers // BATCH == BAD_STEP)] = 0.0
        else:
            batch[key][torch.from_numpy(numbers == sample)] = value
        return batch

    return samples


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulation": 4}], ids=["plain", "ema", "accumulation"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_weight_moves_from_the_faulty_step_on(fault: str, options: dict[str, float], tmp_path: Path) -> None:
    key, value, message = FAULTS[fault]
    method = Regression(OptimizerSettings(learning_rate=0.05, clip_norm=1.0))
    weights: list[dict[str, Tensor]] = []

    def before(step: int) -> None:
        weights.append({name: value.clone() for name, value in method.line.linear.state_dict().items()})

    reader = ToyReader(BATCH, faulty(key, value), before=before)
    with pytest.raises(UserError, match=message) as error:
        run(method, reader, tmp_path, 30, log_every=5, checkpoint_every=100, **options)
    text = str(error.value)
    assert "\n" not in text
    assert f"the last good weights are in {tmp_path}/generators/last" in text
    assert len(weights) == 10  # the run stopped at the next log point
    assert not states_equal(weights[BAD_STEP], weights[BAD_STEP - 1])
    assert all(states_equal(weights[BAD_STEP], later) for later in weights[BAD_STEP + 1 :])
    assert states_equal(weights[BAD_STEP], dict(method.line.linear.state_dict()))
    # What is saved is what a run of BAD_STEP good steps gives: weights, averages and buffers.
    good = tmp_path / "good"
    samples = faulty(key, value)
    schedule = OptimizerSettings(learning_rate=0.05, clip_norm=1.0)
    stopping = ToyReader(BATCH, samples, before=stop_before(BAD_STEP))
    run(Regression(schedule), stopping, good, 30, log_every=5, checkpoint_every=100, **options)
    averaged = "averages" if options.get("ema") else "networks"
    assert states_equal(saved(tmp_path), checkpointed(good, averaged))


def stop_before(step: int) -> Callable[[int], None]:
    """A `before` that asks the run to stop once `step` steps are done."""

    def before(current: int) -> None:
        if current == step - 1:
            signal.raise_signal(signal.SIGTERM)

    return before


def checkpointed(folder: Path, kind: str) -> dict[str, Tensor]:
    return load_file(max((folder / "checkpoints").glob("step-*")) / kind / "line.safetensors")


def test_an_earlier_checkpoint_is_kept_and_a_later_one_not_written(tmp_path: Path) -> None:
    reader = ToyReader(BATCH, faulty("spike", torch.nan))
    for _ in range(2):  # the same command again meets the same step
        with pytest.raises(UserError, match="fit/penalty became NaN or infinite by step 9"):
            run(Regression(), reader, tmp_path, 30, log_every=100, checkpoint_every=3)
        assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == "step-00000006"


def test_a_faulty_run_is_not_evaluated(tmp_path: Path) -> None:
    evaluator = TableEvaluator({5: 1.0, 8: 9.0, 10: 9.0})
    reader = ToyReader(BATCH, faulty("spike", torch.nan))
    with pytest.raises(UserError, match="by step 10"):
        run(Regression(), reader, tmp_path, 30, evaluator, evaluate_every=5, log_every=100)
    assert saved(tmp_path, "best")["age"] == 5
    assert [row["score"] for row in rows(tmp_path)] == [1.0]


def test_only_the_first_fault_is_named(tmp_path: Path) -> None:
    """Later steps of a halted run may see other terms fail: they did not begin it."""

    def samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = faulty("spike", torch.nan)(numbers)
        batch["y"][torch.from_numpy(numbers // BATCH > BAD_STEP)] = torch.nan
        return batch

    with pytest.raises(UserError, match="the loss term fit/penalty became"):
        run(Regression(), ToyReader(BATCH, samples), tmp_path, 30, log_every=5)


def test_a_fault_in_one_phase_stops_the_other_too(tmp_path: Path) -> None:
    def samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = gan_samples(numbers)
        if numbers[0] // BATCH == BAD_STEP:
            batch["y"][0, 0, 0, 0] = torch.inf
        return batch

    method = ToyGAN(norm=True)
    states: list[dict[str, Tensor]] = []

    def before(step: int) -> None:
        states.append({name: value.clone() for name, value in method.named_parameters()})

    with pytest.raises(UserError, match="the loss term generator/l1 became"):
        run(method, ToyReader(BATCH, samples, before=before), tmp_path, 30, log_every=5)
    assert len(states) == 10
    assert not states_equal(states[BAD_STEP - 1], states[BAD_STEP])
    assert states_equal(states[BAD_STEP], states[BAD_STEP + 1])
    assert states_equal(states[BAD_STEP], dict(method.named_parameters()))


def test_batch_statistics_are_saved_as_they_were_before_the_fault(tmp_path: Path) -> None:
    """A forward pass spoils BatchNorm's running mean although no weight moves."""

    def samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = gan_samples(numbers)
        if numbers[0] // BATCH == BAD_STEP:
            batch["x"][0, 0, 0, 0] = torch.nan
        return batch

    with pytest.raises(UserError, match="the loss term generator/adversarial, generator/l1 became"):
        run(ToyGAN(norm=True), ToyReader(BATCH, samples), tmp_path, 30, log_every=5)
    state = saved(tmp_path, name="painter")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert state["body.1.num_batches_tracked"] == BAD_STEP
