"""The loop's arithmetic against Adam, schedules, clipping and averages written out in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from processes import launch
from torch import Tensor, nn
from toy import (
    BATCH,
    PENALTY,
    SEED,
    Regression,
    TableEvaluator,
    ToyGAN,
    ToyReader,
    fit,
    gan_samples,
    regression_samples,
    rows,
    run,
    saved,
    sr_samples,
)

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, OptimizerSettings, Phase, Progress, Terms
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.evaluation import Evaluation
from hpcdistill.training.metrics_log import MetricsLog, RunningMeans
from hpcdistill.training.optimization import Averages, TermGradients, learning_rate

STEPS = 12


@dataclass
class Reference:
    """What each step of the regression should give: [step] -> numbers."""

    weights: list[NDArray[np.float64]] = field(default_factory=list)  # w and b after the step
    averages: list[NDArray[np.float64]] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    term_norms: list[tuple[float, float]] = field(default_factory=list)  # of error and penalty
    rates: list[float] = field(default_factory=list)


def reference(settings: OptimizerSettings, ema: float = 0.0, steps: int = STEPS) -> Reference:
    """Kingma and Ba's algorithm 1 on the toy regression, line by line."""
    line = Regression().line.linear
    theta = np.append(line.weight.detach().numpy().ravel(), line.bias.detach().numpy())
    average, m, v = theta.copy(), np.zeros(5), np.zeros(5)
    beta1, beta2 = settings.betas
    result = Reference()
    for step in range(steps):
        batch = {name: value.numpy() for name, value in regression_samples(np.arange(BATCH) + step * BATCH).items()}
        x = np.column_stack([batch["x"], np.ones(BATCH)])
        residual = x @ theta - batch["y"]
        of_error = 2 / BATCH * x.T @ residual
        of_penalty = 2 * PENALTY * np.append(theta[:4], 0)
        gradient = of_error + of_penalty
        norm = float(np.sqrt((gradient**2).sum()))
        if settings.clip_norm and norm > settings.clip_norm:
            gradient = gradient * settings.clip_norm / norm
        share = step / steps
        first, last = settings.learning_rate, settings.final_learning_rate
        rate = {
            "constant": first,
            "cosine": last + (first - last) / 2 * (1 + math.cos(math.pi * share)),
            "linear": first if share < settings.decay_from else first - (first - last) * (2 * share - 1),  # from 0.5
        }[settings.schedule]
        result.error.append(float((residual**2).mean()))
        result.penalty.append(PENALTY * float((theta[:4] ** 2).sum()))
        result.norms.append(norm)
        result.term_norms.append((float(np.linalg.norm(of_error)), float(np.linalg.norm(of_penalty))))
        result.rates.append(rate)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        theta = theta - rate * m_hat / (np.sqrt(v_hat) + settings.eps)
        average = ema * average + (1 - ema) * theta
        result.weights.append(theta)
        result.averages.append(average)
    return result


def flat(state: Mapping[str, Tensor]) -> NDArray[np.float64]:
    return np.append(state["linear.weight"].numpy().ravel(), state["linear.bias"].numpy())


SETTINGS = {
    "constant": OptimizerSettings(learning_rate=0.05, schedule="constant"),
    "cosine": OptimizerSettings(learning_rate=0.1, final_learning_rate=0.01, betas=(0.5, 0.9)),
    "linear": OptimizerSettings(learning_rate=0.1, final_learning_rate=0.0, schedule="linear", eps=1e-3),
    "clipped": OptimizerSettings(learning_rate=0.05, schedule="constant", clip_norm=1.5, eps=0.5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_equals_adam_by_hand(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    expected = reference(settings)
    method = Regression(settings)
    weights = []
    fit(tmp_path, STEPS, method, before=lambda step: weights.append(flat(method.line.state_dict())))
    weights.append(flat(saved(tmp_path)))
    # Clipping divides by the norm + 1e-6, as PyTorch does.
    np.testing.assert_allclose(weights[1:], expected.weights, rtol=0, atol=1e-6 if settings.clip_norm else 1e-12)
    lines = rows(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["images"] for line in lines] == list(range(BATCH, BATCH * STEPS + 1, BATCH))
    columns = {
        "fit/error": expected.error,
        "fit/penalty": expected.penalty,
        "gradient_norm/line": expected.norms,
        "learning_rate/line": expected.rates,
    }
    for column, values in columns.items():
        np.testing.assert_allclose([line[column] for line in lines], values, rtol=1e-6, err_msg=column)
    if settings.clip_norm:
        assert min(expected.norms) < settings.clip_norm < max(expected.norms)  # some steps are clipped, some are not


def test_averages_equal_the_recursion_by_hand(tmp_path: Path) -> None:
    settings = SETTINGS["constant"]
    expected = reference(settings, ema=0.8)
    fit(tmp_path, STEPS, Regression(settings), ema=0.8)
    state = saved(tmp_path)
    np.testing.assert_allclose(flat(state), expected.averages[-1], rtol=0, atol=1e-12)
    assert state["age"] == STEPS  # buffers are not averaged
    assert np.abs(expected.averages[-1] - expected.weights[-1]).max() > 0.01


def test_an_average_of_a_network_with_shared_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, layer)
    averages = Averages({"a": module}, 0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    averages.update(torch.tensor(False))
    average = averages.generators["a"]
    assert isinstance(average, nn.Sequential)
    torch.testing.assert_close(average[1].weight.detach(), start + 0.5)


def test_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    expected = reference(SETTINGS["cosine"])
    for pieces in (1, 2, 4):
        folder = tmp_path / str(pieces)
        fit(folder, STEPS, Regression(SETTINGS["cosine"]), accumulation=pieces, log_every=3)
        np.testing.assert_allclose(flat(saved(folder)), expected.weights[-1], rtol=0, atol=1e-12)
        assert saved(folder)["age"] == STEPS * pieces  # it did run in pieces
        for number, line in enumerate(rows(folder)):
            np.testing.assert_allclose(
                line["fit/error"], np.mean(expected.error[3 * number : 3 * number + 3]), rtol=1e-6
            )


def test_lines_hold_the_true_means(tmp_path: Path) -> None:
    expected = reference(SETTINGS["cosine"], steps=10)
    fit(tmp_path, 10, Regression(SETTINGS["cosine"]), log_every=4)
    lines = rows(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line, part in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 10)), strict=True):
        np.testing.assert_allclose(line["fit/error"], np.mean(expected.error[part]), rtol=1e-6)
        np.testing.assert_allclose(line["fit/penalty"], np.mean(expected.penalty[part]), rtol=1e-6)
        np.testing.assert_allclose(line["gradient_norm/line"], np.mean(expected.norms[part]), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 1e-3, 500: 1e-3, 999: 1e-3}),
        # 1e-5 + 9.9e-4 (1 + cos(pi t)) / 2: t = 1/4 gives 1e-5 + 9.9e-4 * 0.8535533906
        ("cosine", {0: 1e-3, 250: 8.550178567e-4, 500: 5.05e-4, 750: 1.549821433e-4, 1000: 1e-5, 1200: 1e-5}),
        # constant up to 0.6, then 9.9e-4 less over 400 steps: 2.475e-6 a step
        ("linear", {0: 1e-3, 600: 1e-3, 601: 9.97525e-4, 800: 5.05e-4, 999: 1.2475e-5, 1000: 1e-5}),
    ],
)
def test_schedules_by_hand(schedule: str, rates: dict[int, float]) -> None:
    settings = OptimizerSettings(learning_rate=1e-3, final_learning_rate=1e-5, schedule=schedule, decay_from=0.6)
    for step, rate in rates.items():
        assert learning_rate(settings, step, 1000) == pytest.approx(rate, rel=1e-9), step


def test_gradient_norms_of_terms(tmp_path: Path) -> None:
    expected = reference(SETTINGS["constant"], steps=6)
    for every in (3, 0):
        fit(tmp_path / str(every), 6, Regression(SETTINGS["constant"]), gradient_norms_every=every)
    lines = rows(tmp_path / "3")
    for step in (3, 6):
        measured = [lines[step - 1][f"gradient/fit/{term}"] for term in ("error", "penalty")]
        np.testing.assert_allclose(measured, expected.term_norms[step - 1], rtol=1e-6)
    assert [line["step"] for line in lines if "gradient/fit/error" in line] == [3, 6]
    # Measuring changes nothing.
    np.testing.assert_array_equal(flat(saved(tmp_path / "3")), flat(saved(tmp_path / "0")))


def test_gradient_norms_without_a_gradient() -> None:
    weight, other, still = (nn.Parameter(torch.full((2,), 3.0)) for _ in range(3))
    still.requires_grad_(False)
    terms = {"both": (weight * other).sum(), "other": other.sum(), "none": torch.tensor(1.0)}
    accelerator = make_accelerator(TrainConfig(device="cpu", trackers=()))
    norms = TermGradients([weight, still], 1, accelerator).add(terms)
    assert {name: round(norm.item(), 5) for name, norm in norms.items()} == {"both": 4.24264, "other": 0, "none": 0}
    sum(terms.values()).backward()  # the graph is still there


def test_the_discriminators_norms_are_of_its_own_weights(tmp_path: Path) -> None:
    with torch.enable_grad():
        batch = ToyReader(BATCH, gan_samples)[0]
        copy = ToyGAN()
        fake = copy.generator(batch["x"])
        copy.discriminator.eval()  # the frozen discriminator's spectral-norm vectors stand still
        term = 0.5 * (fake - batch["y"]).abs().mean()
        gradients = torch.autograd.grad(term, list(copy.generator.parameters()))
        expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    fit(tmp_path, 1, ToyGAN(), gradient_norms_every=1)
    [line] = rows(tmp_path)
    assert line["gradient/generator/l1"] == pytest.approx(expected, rel=1e-6)
    assert line["gradient/discriminator/real"] > 0
    assert line["gradient/discriminator/fake"] > 0


class Dtypes(PlainSR):
    """Notes the types of the terms, of what the first layer gives, and of what the group gives to the losses."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        super().__init__(PlainSR.Config(scale=2))
        self.terms: set[torch.dtype] = set()
        self.outputs: set[torch.dtype] = set()
        self.layers: dict[bool, set[torch.dtype]] = {True: set(), False: set()}  # training -> types
        self.student.feature[0].register_forward_hook(
            lambda module, inputs, output: self.layers[self.student.training].add(output.dtype)
        )

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        terms = super().student_loss(batch, carry, progress)
        # As in the group's own phase, and as in another's, where it is frozen.
        self.outputs |= {self.call("student", batch["lr2"]).dtype, self.student(batch["lr2"]).dtype}
        self.terms |= {term.dtype for term in terms.values()}
        return terms


class EvaluationDtypes:
    """Passes a batch through the generator, in eval mode as evaluators do."""

    selects, larger_is_better = None, True

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, stop: Any = None) -> Evaluation:
        for generator in generators.values():
            with torch.no_grad():
                self.output = generator.eval()(sr_samples(np.arange(2))["lr2"])
        return Evaluation({})

    def protocol(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bf16_trains_with_losses_in_float32_and_evaluates_in_float32(precision: str, tmp_path: Path) -> None:
    method, evaluator = Dtypes(), EvaluationDtypes()
    run(method, ToyReader(4, sr_samples), tmp_path, 4, evaluator, evaluate_every=2, precision=precision)
    assert method.terms == method.outputs == {torch.float32}
    assert method.layers[True] == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert method.layers[False] == {torch.float32}
    assert evaluator.output.dtype == torch.float32
    losses = [line["student/reconstruction"] for line in rows(tmp_path) if "images" in line]
    assert len(losses) == 4
    assert losses[3] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in method.parameters())


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        torch.manual_seed(SEED)
        method = PlainSR(PlainSR.Config(scale=2))
        run(method, ToyReader(4, sr_samples), tmp_path / precision, 3, precision=precision)
    fp32, bf16 = ([line["student/reconstruction"] for line in rows(tmp_path / name)] for name in ("fp32", "bf16"))
    np.testing.assert_allclose(bf16, fp32, rtol=0.05)
    assert bf16 != fp32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU"),
        ({"batch_size": 6, "accumulation": 4}, r"train.accumulation: 6 samples over 1 ranks .* choose a divisor of 6"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_accelerator(TrainConfig(device="cpu", **options))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(UserError, match=r"train\.device: no CUDA device is visible; use train\.device=cpu"):
        make_accelerator(TrainConfig(device="cuda"))


@pytest.mark.distributed
def test_a_batch_that_the_ranks_do_not_divide() -> None:
    def work(rank: int, ranks: int) -> None:
        with pytest.raises(UserError, match=r"train.batch_size: 7 is global .* over 2 ranks; use 6$"):
            make_accelerator(TrainConfig(device="cpu", batch_size=7))

    assert launch(2, work) == [0, 0]


@pytest.mark.parametrize(
    ("scores", "larger", "best"),
    [
        ({2: 1.0, 4: 3.0, 6: 3.0, 8: 2.0}, True, 4),  # of equals the first stays
        ({2: 4.0, 4: 1.0, 6: 1.0, 8: 2.0}, False, 4),
        ({2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}, False, 2),
        ({2: math.nan, 4: 1.0, 6: math.nan, 8: 0.5}, True, 4),
        ({2: math.inf, 4: 1.0, 6: math.nan, 8: 2.0}, False, 4),
        ({}, None, 8),  # nothing selects: the last are the best
    ],
)
def test_the_best_weights_are_the_evaluators_choice(
    scores: dict[int, float], larger: bool | None, best: int, tmp_path: Path
) -> None:
    evaluator = TableEvaluator(scores, bool(larger), None if larger is None else "score")
    outcome = fit(tmp_path, 8, evaluator=evaluator, evaluate_every=2)
    assert outcome.finished
    assert outcome.position.best is not None
    assert outcome.position.last is not None
    assert (outcome.position.best["step"], outcome.position.last["step"]) == (best, 8)
    assert saved(tmp_path, "best")["age"] == best
    assert saved(tmp_path, "last")["age"] == 8
    assert [row["step"] for row in rows(tmp_path) if "score" in row] == [2, 4, 6, 8]


def test_the_last_step_is_always_evaluated(tmp_path: Path) -> None:
    evaluator = TableEvaluator({7: 1.0})
    outcome = fit(tmp_path, 7, evaluator=evaluator, evaluate_every=5)
    assert outcome.position.last == {"step": 7, "metrics": {"score": 1.0}}


def test_frozen_networks_stay_in_eval_mode() -> None:
    method = Regression()
    method.add_module("teacher", nn.Sequential(nn.Dropout(0.5)).eval())
    estimator = nn.Dropout(0.5)  # belongs to a group without being the method's own
    method.groups["line"].module.add_module("estimator", estimator)
    for mode in (True, False):
        method.train(mode)
        assert (method.training, method.line.training, estimator.training) == (mode,) * 3
        assert not method.get_submodule("teacher.0").training
    assert method.train() is method


def test_metrics_lines_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    accelerator = make_accelerator(TrainConfig(device="cpu", trackers=()))
    log = MetricsLog(tmp_path / "metrics.jsonl", accelerator)
    log.write({"step": 1, "a": math.inf, "b": math.nan, "c": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 0.5}\n'


def test_no_means_without_steps() -> None:
    accelerator = make_accelerator(TrainConfig(device="cpu", trackers=()))
    means = RunningMeans(accelerator.device)
    assert means.read(accelerator) == {}
    means.load(means.state(accelerator))
    assert means.read(accelerator) == {}


class Watched(Regression):
    """A regression that notes its progress and keeps its first weight at or above a floor after each update."""

    FLOOR = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, float]] = []
        self.draws: list[list[int]] = []
        self.after: list[int] = []

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("fit", "line", self.loss, after=self.floor),)

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.seen.append((int(progress.step), int(progress.steps), float(progress.share)))
        self.draws.append(torch.randint(1000, (3,), generator=progress.generator()).tolist())
        assert self.draws[-1] == torch.randint(1000, (3,), generator=progress.generator()).tolist()
        return super().loss(batch, carry, progress)

    def floor(self, progress: Progress) -> None:
        assert not torch.is_grad_enabled()
        self.after.append(int(progress.step))
        self.line.linear.weight[0, 0].clamp_(min=self.FLOOR)


def test_a_method_sees_its_progress_and_acts_after_its_update(tmp_path: Path) -> None:
    method = Watched()
    with torch.no_grad():
        method.line.linear.weight[0, 0] = -3.0
    fit(tmp_path / "run", 4, method)
    assert method.seen == [(0, 4, 0.0), (1, 4, 0.25), (2, 4, 0.5), (3, 4, 0.75)]
    assert method.after == [0, 1, 2, 3]
    # From -3 a step of 0.05 could not bring it above the floor.
    assert saved(tmp_path / "run")["linear.weight"][0, 0] >= Watched.FLOOR


def test_a_shared_draw_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    """Other micro-batches, a kill: the same draws, each step its own."""
    whole, cut = Watched(), Watched()
    fit(tmp_path / "whole", 4, whole)
    fit(tmp_path / "cut", 4, cut, killed=3, checkpoint_every=2)
    resumed = Watched()
    fit(tmp_path / "cut", 4, resumed, checkpoint_every=2, accumulation=2)
    assert len({tuple(draws) for draws in whole.draws}) == 4
    assert cut.draws == whole.draws[:3]
    assert resumed.draws == [whole.draws[2]] * 2 + [whole.draws[3]] * 2
