"""Runs of several segments: their places, their phases, the weights they take back, and resuming in any of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from torch import Tensor
from toy import SegmentedRegression, TableEvaluator, ToyGAN, fit, newest_tensors, rows, saved, states_equal

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Batch, Carry, Phase, Progress, Segment, Terms
from hpcdistill.training.evaluation import Evaluation
from hpcdistill.training.segments import place_segments

STEPS = 14
# By age: the best of the first segment is age 3; the second begins there (3) and has its best at age 6, step 8.
SCORES = {3: 5.0, 5: 1.0, 6: 9.0, 7: 10.0}
OPTIONS: dict[str, Any] = {"evaluate_every": 1, "log_every": 1}


def segments(method: SegmentedRegression, judged: str | None = None) -> tuple[Segment, ...]:
    """Five steps, five that begin with the best weights, and the rest, which begins with the last."""

    def entering(name: str) -> Any:
        def on_enter() -> None:
            method.entered.append((name, int(method.line.age)))
            method.line.linear.bias.data.add_(0.25)  # what a method does here must survive a resume

        return on_enter

    def phase(name: str) -> tuple[Phase, ...]:
        return (Phase(name, "line", method.loss),)

    return (
        Segment("first", phase("one"), steps=5),
        Segment("second", phase("two"), 5, load=(("line", "best"),), judged=judged, on_enter=entering("second")),
        Segment("third", phase("three"), load=(("line", "last"),), on_enter=entering("third")),
    )


def train(folder: Path, method: SegmentedRegression | None = None, **options: Any) -> SegmentedRegression:
    """STEPS steps, evaluated after each by SCORES; of the three segments above where no other method is given."""
    method = method or SegmentedRegression(segments)
    fit(folder, STEPS, method, **({"evaluator": TableEvaluator(SCORES)} | OPTIONS | options))
    return method


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder)
    return folder


def test_each_segment_has_its_phases_and_its_start(tmp_path: Path) -> None:
    method = SegmentedRegression(segments)
    states: list[dict[str, Tensor]] = []

    def before(step: int) -> None:
        states.append({name: value.clone() for name, value in method.line.state_dict().items()})

    train(tmp_path, method, before=before)
    assert method.entered == [("second", 3), ("third", 8)]  # five steps from age 3 on
    phases = [
        next(key for key in row if key.endswith("/error")).split("/")[0] for row in rows(tmp_path) if "images" in row
    ]
    assert phases == ["one"] * 5 + ["two"] * 5 + ["three"] * 4
    # The batch of step 6 finds one step after age 3.
    assert [int(state["age"]) for state in states] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11]


class OwnScore(TableEvaluator):
    """The table's value is the line's own; another metric, which falls from the start, chooses the run's best."""

    def __call__(self, generators: Any, accelerator: Any, stop: Any = None) -> Evaluation:
        [score] = super().__call__(generators, accelerator).metrics.values()
        return Evaluation({"other/set/psnr": -float(generators["line"].age), "line/set/psnr": score})


def test_a_segment_takes_the_best_by_the_metric_it_names(undisturbed: Path, tmp_path: Path) -> None:
    """As with the selected metric; also after a kill when the best on disk is the second segment's own."""
    table = OwnScore(SCORES, selects="other/set/psnr")
    for step in (9, None):
        method = SegmentedRegression(lambda m: segments(m, "line"))
        train(tmp_path, method, evaluator=table, checkpoint_every=5, killed=step)
    assert newest_tensors(tmp_path) == newest_tensors(undisturbed)
    assert saved(tmp_path, "best")["age"] == 1
    assert states_equal(saved(tmp_path, "best-line"), saved(undisturbed, "best"))


@pytest.mark.parametrize(("every", "killed"), [(5, 9), (4, 6), (3, 8), (100, 11), (10, 10), (5, 5)])
def test_a_resumed_segment_begins_as_it_did(every: int, killed: int, undisturbed: Path, tmp_path: Path) -> None:
    """With a checkpoint at 5 and a kill at 9 the best on disk is the second segment's own; it must not be loaded."""
    for step in (killed, None):
        train(tmp_path / "run", checkpoint_every=every, killed=step)
    assert newest_tensors(tmp_path / "run") == newest_tensors(undisturbed)
    assert rows(tmp_path / "run") == rows(undisturbed)
    for which in ("best", "last"):
        assert states_equal(saved(tmp_path / "run", which), saved(undisturbed, which))


def test_on_enter_is_not_run_again_in_the_middle_of_a_segment(tmp_path: Path) -> None:
    assert train(tmp_path, checkpoint_every=7, killed=8).entered == [("second", 3)]
    assert train(tmp_path, checkpoint_every=7).entered == [("third", 8)]


def test_last_weights_with_averages_are_the_averages(tmp_path: Path) -> None:
    def two(method: SegmentedRegression) -> tuple[Segment, ...]:
        def on_enter() -> None:
            seen.append({name: value.clone() for name, value in method.line.state_dict().items()})

        phases = method.phases
        return (Segment("a", phases, steps=6), Segment("b", phases, load=(("line", "last"),), on_enter=on_enter))

    seen: list[dict[str, Tensor]] = []
    fit(tmp_path / "whole", 9, SegmentedRegression(two), ema=0.8)
    # The first six of nine steps of a run without segments: what would be evaluated is in the checkpoint.
    fit(tmp_path / "part", 9, ema=0.8, checkpoint_every=6, killed=6)
    averages = load(newest_tensors(tmp_path / "part")["averages/line.safetensors"])
    assert states_equal(seen[0], {name: averages[name] for name in seen[0]})


def test_best_weights_that_were_never_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.eval: is empty, but the segment second goes on from the best") as error:
        fit(tmp_path, STEPS, SegmentedRegression(segments))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()  # said before the first step


def test_there_is_an_evaluation_before_the_best_weights_are_taken(tmp_path: Path) -> None:
    method = train(tmp_path, evaluator=TableEvaluator({5: 1.0}), evaluate_every=1000)
    assert [row["step"] for row in rows(tmp_path) if "score" in row] == [5, STEPS]
    assert method.entered[0] == ("second", 5)


@pytest.mark.parametrize(
    ("lengths", "steps", "message"),
    [
        ((4, 5), 10, "the method's segments take 9 steps, the run has 10"),
        ((8, None), 5, "the method's segments take 8 steps, the run has 5"),
        ((None, None), 6, "the method's segments take 12 steps, the run has 6"),
    ],
)
def test_segments_that_do_not_fill_the_run(
    lengths: tuple[int | None, ...], steps: int, message: str, tmp_path: Path
) -> None:
    method = SegmentedRegression(lambda m: tuple(Segment(f"s{n}", m.phases, steps=n) for n in lengths))
    with pytest.raises(UserError, match=f"train.steps: {message}; make them equal"):
        fit(tmp_path, steps, method)


@pytest.mark.parametrize(
    ("share", "steps", "start"),
    [(0.25, 10, 8), (0.1, 10, 9), (0.01, 10, 9), (0.5, 1, 0), (0.99, 100, 1)],  # of 10 steps 2.5 is 2: to the even one
)
def test_a_share_of_the_run_is_rounded_and_one_step_at_least(share: float, steps: int, start: int) -> None:
    segments = (Segment("main", ()), Segment("finish", (), share=share))
    main, finish = place_segments(segments, steps, evaluated=True)
    assert (main.start, main.end, finish.start, finish.end) == (0, start, start, steps)


def test_a_segment_of_no_steps_is_passed_over(tmp_path: Path) -> None:
    method = SegmentedRegression(lambda m: tuple(Segment(f"s{n}", m.phases, steps=n) for n in (0, 3, 0, 2)))
    assert fit(tmp_path, 5, method).position.step == 5


class Alternating(ToyGAN):
    """Blocks of one network's steps, then of the other's."""

    def segments(self) -> tuple[Segment, ...]:
        generator, discriminator = (dataclasses.replace(phase, before=None) for phase in self.phases)
        blocks = ((generator,), (discriminator,)) * 2
        return tuple(Segment(f"block{number}", phases, steps=3) for number, phases in enumerate(blocks))

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        carry["fake"] = self.generator(batch["x"]).detach()
        return super().discriminator_loss(batch, carry, progress)


def test_alternating_blocks_resume(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    fit(undisturbed, 12, Alternating(), checkpoint_every=5)
    fit(killed, 12, Alternating(), killed=7, checkpoint_every=5)
    fit(killed, 12, Alternating(), checkpoint_every=5)
    assert newest_tensors(killed) == newest_tensors(undisturbed)
    lines = rows(undisturbed)
    assert rows(killed) == lines  # the resting group's learning rate too
    names = [sorted({key.split("/")[0] for key in line if "/l1" in key or "/real" in key}) for line in lines]
    assert names == ([["generator"]] * 3 + [["discriminator"]] * 3) * 2
    rates = [line["learning_rate/generator"] for line in lines]
    assert rates == [line["learning_rate/discriminator"] for line in lines]
    assert rates[6] > rates[7] > rates[11]


def putting_back(method: SegmentedRegression) -> tuple[Segment, ...]:
    """Five steps, four from the best weights that are put back at their end, and the rest."""
    return (
        Segment("first", method.phases, steps=5),
        Segment("second", method.phases, steps=4, load=(("line", "best"),), put_back=("line",)),
        Segment("third", method.phases),
    )


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_segment_puts_back_what_stood_before_it(ema: float, tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []

    def state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in method.line.state_dict().items()}

    class Kept(SegmentedRegression):
        def segments(self) -> tuple[Segment, ...]:
            first, second, third = putting_back(self)
            return first, second, dataclasses.replace(third, on_enter=lambda: states.append(state()))

    method = Kept(putting_back)
    train(tmp_path, method, before=lambda step: states.append(state()), ema=ema)
    # A segment is entered after its first batch was asked for. The third finds the weights of step 5, not of step 9.
    assert [int(found["age"]) for found in states] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 5, 5, 6, 7, 8, 9]
    assert states_equal(states[10], states[5])


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(("every", "killed"), [(6, 7), (9, 9), (9, 11), (100, 8)])
def test_what_is_put_back_survives_a_kill(every: int, killed: int, ema: float, tmp_path: Path) -> None:
    for name, step in (("undisturbed", None), ("killed", killed), ("killed", None)):
        train(tmp_path / name, SegmentedRegression(putting_back), killed=step, checkpoint_every=every, ema=ema)
    assert newest_tensors(tmp_path / "killed") == newest_tensors(tmp_path / "undisturbed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")


def test_the_run_s_end_is_a_segment_s_end(tmp_path: Path) -> None:
    """The last weights are those that the last segment puts back, not the ones it worked with."""
    method = SegmentedRegression(
        lambda m: (
            Segment("first", m.phases, steps=3),
            Segment("second", m.phases, steps=2, put_back=("line",)),
        )
    )
    fit(tmp_path / "run", 5, method, **OPTIONS)
    alone = SegmentedRegression(lambda m: (Segment("all", m.phases),))
    fit(tmp_path / "alone", 5, alone, **OPTIONS)
    assert int(saved(tmp_path / "run")["age"]) == 3 != int(saved(tmp_path / "alone")["age"])
