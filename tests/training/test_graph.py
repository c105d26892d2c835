"""`train.graph`: a captured step makes the weights and losses of a step that is not, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recording
import torch
from small_methods import METHODS, Ramp, build, image_distillation_of, omgd_of, samples_of, wavelet_kd_of
from torch import Tensor
from toy import (
    BATCH,
    SEED,
    Killed,
    Regression,
    SegmentedRegression,
    ToyGAN,
    ToyReader,
    fit,
    kill_at,
    newest_tensors,
    regression_samples,
    rows,
    run,
)

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, Method, OptimizerSettings, Progress, Segment, Terms
from hpcdistill.methods.output_distillation import OutputDistillation
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.training import graph
from hpcdistill.training.config import TrainConfig


def output_distillation(vgg: Path) -> Method:
    return OutputDistillation(OutputDistillation.Config(scale=2, weight_feature=1.0), {"teacher": FSRCNN(2)})


MADE: dict[str, Callable[[Path], Method]] = {name: partial(build, name) for name in METHODS} | {
    "omgd_cyclegan": partial(omgd_of, "cyclegan"),
    "omgd_pix2pix": partial(omgd_of, "pix2pix"),
    "wavelet_kd_cyclegan": partial(wavelet_kd_of, "cyclegan"),
    "wavelet_kd_pix2pix": partial(wavelet_kd_of, "pix2pix"),
    "image_distillation": image_distillation_of,
    "output_distillation": output_distillation,
}
STEPS = 12


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a CPU capture; how often each captured step has been replayed."""
    counts: list[int] = []

    def capture(step: graph.Action) -> graph.Action:
        replay = recording.record(step)
        number = len(counts)
        counts.append(0)

        def counted() -> None:
            counts[number] += 1
            replay()

        return counted

    monkeypatch.setitem(graph.CAPTURES, "cpu", capture)
    return counts


def trained(name: str, vgg: Path, folder: Path, steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
    """The lines of metrics.jsonl and the last checkpoint."""
    torch.manual_seed(SEED)
    method = MADE[name](vgg).double()
    if len(method.segments()) > 1 or "evaluate_every" in options:
        options = {"evaluator": Ramp(), **options}
    samples = samples_of("plain_sr" if name == "output_distillation" else name)
    run(method, ToyReader(2, samples), folder, steps, **options)
    return rows(folder), newest_tensors(folder)


@pytest.mark.parametrize("name", MADE)
def test_every_method_is_captured_and_learns_the_same(name: str, tmp_path: Path, vgg: Path, replays: list[int]) -> None:
    eager = trained(name, vgg, tmp_path / "eager")
    captured = trained(name, vgg, tmp_path / "captured", graph="on")
    assert captured == eager
    assert sum(replays) > 0


# --- options and interruptions ---------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"ema": 0.9},
    {"accumulation": 2},
    {"gradient_norms_every": 3},
    {"log_every": 5, "checkpoint_every": 7},
    {"evaluate_every": 3},
    {"channels_last": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("name", ["pix2pix", "privileged_student"])
def test_options_change_nothing(
    name: str, options: dict[str, Any], tmp_path: Path, vgg: Path, replays: list[int]
) -> None:
    eager = trained(name, vgg, tmp_path / "eager", **options)
    assert trained(name, vgg, tmp_path / "captured", graph="on", **options) == eager
    measured = STEPS // options.get("gradient_norms_every", 1000)
    assert replays == [STEPS - graph.WARM_UP - measured]


@pytest.mark.parametrize("name", ["pix2pix", "privileged_teacher"])
def test_autocast_is_captured(name: str, tmp_path: Path, vgg: Path, replays: list[int]) -> None:
    def one(folder: str, **options: Any) -> list[dict[str, Any]]:
        def samples(numbers: Any) -> dict[str, Tensor]:
            return {key: x.float() for key, x in samples_of(name)(numbers).items()}

        run(build(name, vgg).float(), ToyReader(2, samples), tmp_path / folder, STEPS, precision="bf16", **options)
        return rows(tmp_path / folder)

    assert one("captured", graph="on") == one("eager")
    assert replays == [STEPS - graph.WARM_UP]


@pytest.mark.parametrize("modes", [("on", "off"), ("off", "on"), ("on", "on")])
def test_a_run_goes_on_with_or_without(modes: tuple[str, str], tmp_path: Path, vgg: Path, replays: list[int]) -> None:
    """Killed after step 9, of which the checkpoint of step 7 is left."""
    whole = trained("cyclegan", vgg, tmp_path / "whole")
    for mode, before in zip(modes, (kill_at(9), None), strict=True):
        reader = ToyReader(2, samples_of("cyclegan"), before=before)
        options = {"checkpoint_every": 7, "graph": mode}
        if before:
            with pytest.raises(Killed):
                run(build("cyclegan", vgg), reader, tmp_path / "cut", STEPS, **options)
        else:
            run(build("cyclegan", vgg), reader, tmp_path / "cut", STEPS, **options)
    assert (rows(tmp_path / "cut"), newest_tensors(tmp_path / "cut")) == whole
    assert len(replays) == modes.count("on")


def test_dropout_is_drawn_anew_at_each_step(tmp_path: Path, replays: list[int]) -> None:
    for folder, mode in (("eager", "off"), ("captured", "on")):
        fit(tmp_path / folder, STEPS, Regression(dropout=0.5), graph=mode)
    assert rows(tmp_path / "captured") == rows(tmp_path / "eager")
    assert replays == [STEPS - graph.WARM_UP]


def test_the_rate_of_each_step_is_taken(tmp_path: Path, replays: list[int]) -> None:
    """Each of Adam's updates is the rate when the gradient never changes."""
    settings = OptimizerSettings(learning_rate=1e-3, schedule="linear", decay_from=0.0)

    class Slope(Regression):
        def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
            return {"slope": self.call("line", torch.ones_like(batch["x"])).mean()}

    method = Slope(settings)
    before = method.line.linear.bias.item()
    fit(tmp_path, STEPS, method, graph="on")
    rates = [line["learning_rate/line"] for line in rows(tmp_path)]
    assert rates[-1] < 0.1 * rates[0]
    assert before - method.line.linear.bias.item() == pytest.approx(sum(rates), rel=1e-5)
    assert replays


def test_a_spoilt_step_is_masked_in_a_graph(tmp_path: Path, replays: list[int]) -> None:
    def spiked(numbers: Any) -> dict[str, Tensor]:
        spike = torch.where(torch.from_numpy(numbers) == 8 * BATCH, torch.inf, 0.0).double()
        return regression_samples(numbers) | {"spike": spike}

    said, weights = [], []
    for folder, mode in (("eager", "off"), ("captured", "on")):
        method = Regression()
        with pytest.raises(UserError) as error:
            run(method, ToyReader(BATCH, spiked), tmp_path / folder, STEPS, log_every=6, graph=mode)
        said.append(str(error.value).replace(folder, ""))
        weights.append(method.line.state_dict())
    assert said[0] == said[1]
    assert "the loss term fit/penalty became NaN or infinite by step 12" in said[0]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert replays == [STEPS - graph.WARM_UP]


def test_each_segment_is_captured_for_itself(tmp_path: Path, replays: list[int]) -> None:
    """The second one's loss is another, the third one is too short, the fourth begins with other weights."""

    def segments(method: SegmentedRegression) -> tuple[Segment, ...]:
        def doubled(batch: Batch, carry: Carry, progress: Progress) -> Terms:
            return {name: 2 * term for name, term in method.loss(batch, carry, progress).items()}

        def enter() -> None:
            with torch.no_grad():
                method.line.linear.weight.mul_(0.5)

        first = method.phases
        second = (type(first[0])("fit", "line", doubled),)
        return (
            Segment("one", first, 6),
            Segment("two", second, 5),
            Segment("short", first, 2),
            Segment("four", first, on_enter=enter, load=(("line", "last"),), put_back=("line",)),
        )

    for folder, mode in (("eager", "off"), ("captured", "on")):
        fit(tmp_path / folder, 18, SegmentedRegression(segments), graph=mode)
    assert rows(tmp_path / "captured") == rows(tmp_path / "eager")
    assert newest_tensors(tmp_path / "captured") == newest_tensors(tmp_path / "eager")
    assert replays == [3, 2, 2]


# --- what cannot be captured -----------------------------------------------------------------------------------------


class Trap(Regression):
    """A regression whose error is weighted by `weight(self, batch, progress)`."""

    def __init__(self, weight: Callable[[Trap, Batch, Progress], Any]) -> None:
        super().__init__()
        self.weight, self.calls, self.random = weight, 0, torch.Generator()

    def loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.calls += 1
        terms = super().loss(batch, carry, progress)
        return {"error": terms["error"] * self.weight(self, batch, progress)}


def _other_operations(method: Trap, batch: Batch, progress: Progress) -> Any:
    return batch["x"].square().mean() if method.calls % 2 else batch["x"].abs().mean()


TRAPS: dict[str, tuple[Callable[[Trap, Batch, Progress], Any], str]] = {
    "a branch on the host's step": (lambda m, b, p: 2.0 if p.number > 8 else 1.0, "progress.number"),
    "a shared draw": (lambda m, b, p: torch.rand((), generator=p.generator(), dtype=torch.float64), "generator"),
    "a draw of its own": (
        lambda m, b, p: torch.rand((), generator=m.random, dtype=torch.float64),
        "draws from a generator of its own (rand)",
    ),
    "another device": (lambda m, b, p: 1.0 + torch.ones(2, device="meta").ndim, "computes on meta (ones)"),
    "a counter of its own": (lambda m, b, p: 1 / (1 + m.calls), "another number, shape or tensor"),
    "a tensor made on the host": (lambda m, b, p: torch.tensor(0.5), "another number, shape or tensor"),
    "a value read back": (lambda m, b, p: 1 + float(b["y"].mean()), "reads from the device (_local_scalar_dense)"),
    "a mask": (lambda m, b, p: b["y"][b["y"] > 0].sum(), "reads from the device (index)"),
    "other operations": (_other_operations, "in one step where the step before ran"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_found_and_explained(
    name: str, tmp_path: Path, replays: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line, once, and the run's result is that without a graph."""
    weight, reason = TRAPS[name]
    fit(tmp_path / "eager", STEPS, Trap(weight))
    capsys.readouterr()
    fit(tmp_path / "auto", STEPS, Trap(weight), graph="auto")
    said = [line for line in capsys.readouterr().err.splitlines() if "train.graph" in line]
    assert len(said) == 1
    assert said[0].startswith("train.graph: off: ")
    assert reason in said[0]
    assert replays == []
    assert rows(tmp_path / "auto") == rows(tmp_path / "eager")
    with pytest.raises(UserError, match=r"train.graph: on, but .*; use train.graph=auto, or off"):
        fit(tmp_path / "on", STEPS, Trap(weight), graph="on")


def test_a_finding_names_the_line(tmp_path: Path, replays: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    line = _other_operations.__code__.co_firstlineno + 1
    fit(tmp_path, STEPS, Trap(_other_operations), graph="auto")
    assert f"training/test_graph.py:{line} runs " in capsys.readouterr().err.replace("\n", " ")


def test_what_the_device_counts_is_no_trap(tmp_path: Path, replays: list[int]) -> None:
    for folder, mode in (("eager", "off"), ("captured", "on")):
        fit(tmp_path / folder, STEPS, Trap(lambda method, batch, progress: 1 + progress.share), graph=mode)
    assert rows(tmp_path / "captured") == rows(tmp_path / "eager")
    assert replays == [STEPS - graph.WARM_UP]


def test_a_capture_that_fails_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the backward pass and the update of the second phase."""
    calls: list[int] = []
    norm = torch.nn.utils.get_total_norm

    def failing_norm(gradients: Any) -> Tensor:
        calls.append(len(gradients))
        if len(calls) == 2:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
        return norm(gradients)

    def failing(step: graph.Action) -> graph.Action:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "get_total_norm", failing_norm)
            return recording.record(step)

    fit(tmp_path / "eager", STEPS, ToyGAN())
    monkeypatch.setitem(graph.CAPTURES, "cpu", failing)
    capsys.readouterr()
    fit(tmp_path / "captured", STEPS, ToyGAN(), graph="auto")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("train.graph: off: the capture failed: CUDA error: operation not permitted") == 1
    assert len(calls) == 2
    assert "more of it" not in said
    assert rows(tmp_path / "captured") == rows(tmp_path / "eager")
    assert newest_tensors(tmp_path / "captured") == newest_tensors(tmp_path / "eager")


def test_a_cpu_has_no_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "auto", 2, graph="auto")
    assert "train.graph: off: the device is a CPU" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train.graph: on, but the device is a CPU"):
        fit(tmp_path / "on", 2, graph="on")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_processes": 2}, "2 processes exchange gradients"),
        ({"scaler": object()}, "loss scaler"),
        ({"deepspeed": "zero2.json"}, "DeepSpeed"),
        ({}, None),
    ],
)
def test_what_a_configuration_forbids(changed: dict[str, Any], reason: str | None) -> None:
    accelerator: Any = SimpleNamespace(
        device=torch.device("cuda"), num_processes=changed.get("num_processes", 1), scaler=changed.get("scaler")
    )
    config = TrainConfig(deepspeed=changed.get("deepspeed"))
    found = graph.reason_against(config, accelerator)
    assert found is None if reason is None else found is not None and reason in found
