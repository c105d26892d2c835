"""When teacher and student are updated: k student updates for each of the teacher, and the blocks of DCD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import ToyReader, rows, run
from translation import (
    BATCH,
    Phases,
    Scores,
    distilled,
    double_samples,
    moved,
    resumed,
    resumed_blocks,
    samples,
    state_of,
)

from hpcdistill.methods.base import Carry
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.models.registry import load_generator
from hpcdistill.run import load_run
from hpcdistill.sweep.estimates import load_estimates
from hpcdistill.training.segments import batches_a_step, place_segments

ROOT = Path(__file__).resolve().parents[2] / "configs"
ESTIMATES = load_estimates(ROOT / "estimates.yaml")


def updates(row: str, *more: str, batch_size: int = 1) -> dict[str, int]:
    """Updates by group of the run of a configuration, and the batches it reads; the standard splits."""
    loaded = load_run([str(ROOT / f"{name}.yaml") for name in (row, *more)])
    steps = ESTIMATES.steps(loaded.config)
    assert steps is not None
    assert loaded.config.train.batch_size == batch_size
    method = loaded.untrained()
    counts = dict.fromkeys(method.groups, 0)
    for stretch in place_segments(method.segments(), steps, evaluated=True):
        for phase in stretch.segment.phases:
            counts[phase.group] += stretch.end - stretch.start
    return {**counts, "batches": steps * batches_a_step(method.segments())}


def told(teacher: int, student: int, batches: int) -> dict[str, int]:
    return {"teacher": teacher, "student": student, "discriminator": teacher, "batches": batches}


HORSES, WINTERS = 1334, 1231  # images of the larger domain: an epoch
ROWS = [f"{row}/{data}" for row in ("dcd", "fesd") for data in ("horse2zebra", "summer2winter")]


@pytest.mark.parametrize("row", ROWS)
def test_updates_of_every_reading(row: str) -> None:
    """As counted by hand; those of the released code on horse2zebra are the printed 266,800 and 1,067,200."""
    images = HORSES if row.endswith("horse2zebra") else WINTERS
    online = updates(row, "variants/fesd-online-4")
    assert updates(row) == online == told(200 * images, 800 * images, 800 * images)
    assert updates(row, "variants/fesd-online-1") == told(100 * images, 100 * images, 100 * images)
    if images == HORSES:
        assert (online["teacher"], online["student"]) == (266_800, 1_067_200)
        assert updates(row, "variants/fesd-blocks") == told(266_800, 1_067_200, 1_334_000)
        assert updates(row, "variants/fesd-online-1") == told(133_400, 133_400, 133_400)
    else:
        assert (online["teacher"], online["student"]) == (246_200, 984_800)
        assert updates(row, "variants/fesd-blocks-6") == told(243_738, 974_952, 1_218_690)
        assert updates(row, "variants/fesd-online-1") == told(123_100, 123_100, 123_100)


def test_updates_of_omgd() -> None:
    """The released code's: 266,800 of the teacher and 1,067,200 of the student on horse2zebra; pairs all at once."""
    assert updates("omgd/horse2zebra") == told(266_800, 1_067_200, 1_334_000)
    assert updates("omgd/summer2winter") == told(243_738, 974_952, 1_218_690)
    pairs = updates("omgd/edges2shoes", batch_size=4)
    steps = 200 * 49_825 // 4
    assert pairs == {"deep": steps, **told(steps, steps, steps)}


def test_updates_of_wavelet_kd() -> None:
    """200 epochs of everything, as its scripts: 266,800 on horse2zebra."""
    for data, steps, size in (
        ("horse2zebra", 266_800, 1),
        ("summer2winter", 246_200, 1),
        ("edges2shoes-r", 200 * 47_977 // 4, 4),
        ("edges2shoes", 200 * 49_825 // 4, 4),
    ):
        found = updates(f"wavelet_kd/{data}", batch_size=size)
        assert found == {"student": steps, "discriminator": steps, "batches": steps}


@pytest.mark.parametrize(
    ("row", "variants", "blocks", "epochs", "images"),
    [
        ("fesd/horse2zebra", ["fesd-blocks"], 20, 10, HORSES),
        ("fesd/summer2winter", ["fesd-blocks-6"], 33, 6, WINTERS),
        ("omgd/horse2zebra", [], 20, 10, HORSES),
        ("omgd/summer2winter", [], 33, 6, WINTERS),
    ],
)
def test_the_blocks_of_the_released_code(row: str, variants: list[str], blocks: int, epochs: int, images: int) -> None:
    loaded = load_run([str(ROOT / f"{name}.yaml") for name in (row, *(f"variants/{name}" for name in variants))])
    steps = ESTIMATES.steps(loaded.config)
    assert steps is not None
    stretches = place_segments(loaded.untrained().segments(), steps, evaluated=True)
    lengths = [stretch.end - stretch.start for stretch in stretches]
    assert lengths == [epochs * images, 4 * epochs * images] * blocks
    assert [stretch.segment.put_back for stretch in stretches] == [(), ("teacher", "teacher_b2a")] * blocks


def test_the_original_trains_for_as_long_as_the_teacher() -> None:
    pairs = (("edges2shoes", 49_825), ("edges2shoes-r", 47_977))
    for data, images in (("horse2zebra", HORSES), ("summer2winter", WINTERS), *pairs):
        config = load_run([str(ROOT / "original" / f"{data}.yaml")]).config
        steps = round(200 * images / config.train.batch_size)
        assert (ESTIMATES.steps(config), config.method.optimizer.decay_from) == (steps, 0.5)  # type: ignore[attr-defined]
        assert config.method.optimizer.schedule == "linear"  # type: ignore[attr-defined]
        short = load_run([str(ROOT / "original" / f"{data}.yaml"), str(ROOT / "variants" / "schedule-100.yaml")])
        assert ESTIMATES.steps(short.config) == 100 * images


def test_the_usual_number_is_as_good_as_unset() -> None:
    config = DistilledGAN.Config
    assert config(student_steps=1) == config()
    assert config(schedule="blocks", blocks=2, student_steps=4) == config(schedule="blocks", blocks=2)
    assert [config(student_steps=3).students_updates, config().students_updates] == [3, 1]
    assert config(schedule="blocks", blocks=2, student_steps=1).students_updates == 1
    assert [config(student_steps=3).version, config(schedule="blocks", blocks=2).version] == [1, 2]


# --- online ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_k_student_updates_by_hand(family: str, tmp_path: Path) -> None:
    """Two iterations of three student updates, written out with PyTorch's Adam. The first batch's teacher images are
    those of before the teacher's update; on the other batches the teacher is asked as it is then."""
    k, steps = 3, 2
    values = {"family": family, "student_steps": k, "optimizer": {"schedule": "constant"}}
    method = distilled(**values).double()
    run(method, ToyReader(BATCH, double_samples), tmp_path, steps)
    hand = distilled(**values).double()
    adams = {
        name: torch.optim.Adam(group.module.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for name, group in hand.groups.items()
    }
    phases = Phases(hand)
    for step in range(steps):
        batches = []
        for number in range(step * k, step * k + k):
            numbers = torch.arange(number * BATCH, (number + 1) * BATCH)
            batches.append({**double_samples(numbers.numpy()), "number": numbers})
        first = Carry()
        order = [("teacher", 0), *(("student", number) for number in range(k)), ("discriminator", 0)]
        for name, number in order:
            phases.carry = first if number == 0 else Carry()
            loss = torch.stack([term.double() for term in phases.run(name, batches[number]).values()]).sum()
            adams[name].zero_grad()
            loss.backward()
            adams[name].step()
    # A bias before an instance norm has no gradient: Adam makes steps of what rounding leaves of it.
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, hand.state_dict()[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m)
    apart = distilled(family=family, optimizer={"schedule": "constant"}).double()
    run(apart, ToyReader(BATCH, double_samples), tmp_path / "apart", steps)
    assert not torch.allclose(_weights(method.student), _weights(apart.student), rtol=1e-4)


def _weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_killed_within_the_student_s_batches_resumes_bit_equal(tmp_path: Path) -> None:
    def train(folder: Path, before: Callable[[int], None]) -> None:
        run(distilled(student_steps=3), ToyReader(BATCH, samples, before=before), folder, 5, checkpoint_every=2)

    assert [row["step"] for row in resumed(train, tmp_path, 10)] == [1, 2, 3, 4, 5]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks(tmp_path: Path) -> None:
    """Two steps of the teacher and D, eight of the student, in turn; the student learns from the best teacher so far.

    Steps end at 2 | 10 | 12 | 20 | 22 | 23. The best are the second block's first teacher, in the third block still;
    the third teacher goes on from the second block's last.
    """
    method = distilled(schedule="blocks", block_steps=2, blocks=3)
    names = [(segment.name, segment.steps) for segment in method.segments()]
    blocks = [("teacher0", 2), ("student0", 8), ("teacher1", 2), ("student1", 8), ("teacher2", 2), ("student2", None)]
    assert names == blocks
    teachers: list[dict[str, Tensor]] = []  # after so many steps, before a block's own weights are taken
    scores = Scores({1: 1.0, 2: 5.0, 11: 7.0, 12: 6.0, 13: 7.0, 21: 2.0, 22: 3.0, 23: 7.0})

    def before(step: int) -> None:
        scores.before(step)
        teachers.append(state_of(method.translators))

    run(method, ToyReader(BATCH, samples, before=before), tmp_path, 23, scores, evaluate_every=1)
    lines = [row for row in rows(tmp_path) if "images" in row]
    phases = [sorted({key.split("/")[0] for key in row if key.endswith(("/gan", "/real"))}) for row in lines]
    assert phases == ([["discriminator", "teacher"]] * 2 + [["student"]] * 8) * 2 + phases[:2] + [["student"]]
    assert "discriminator/fake_student" not in lines[0]
    assert len({states_key(teachers[step]) for step in (0, 1, 2, 11, 12, 21, 22)}) == 7  # it learns in its blocks
    assert {states_key(teachers[step]) for step in range(3, 11)} == {states_key(teachers[2])}
    assert {states_key(teachers[step]) for step in range(13, 20)} == {states_key(teachers[11])}
    assert states_key(teachers[20]) == states_key(teachers[12])
    assert moved(method.translators, teachers[22]) == set()
    for name, step in (("student", 1), ("teacher", 11)):
        file = tmp_path / "generators" / ("best" if name == "student" else "best-teacher") / f"{name}.safetensors"
        assert load_generator(file)[1]["step"] == step


def test_the_run_is_cut_into_blocks_and_each_rate_follows_its_own_steps(tmp_path: Path) -> None:
    """30 steps in 3 blocks: 2 + 8 each; six of the teacher, 24 of the student, each constant for half of them."""
    method = distilled(schedule="blocks", blocks=3)
    run(method, ToyReader(BATCH, samples), tmp_path, 30, Scores({0: 1.0}), evaluate_every=100)
    lines = [row for row in rows(tmp_path) if "images" in row]
    done = {"teacher": 0, "student": 0}
    for line in lines:
        [name] = {key.split("/")[0] for key in line if key.endswith("/gan")}
        steps = {"teacher": 6, "student": 24}[name]
        expected = 2e-4 * min(1.0, 2 - 2 * done[name] / steps)
        assert line[f"learning_rate/{name}"] == pytest.approx(expected)
        assert line["learning_rate/discriminator"] == line["learning_rate/teacher"]
        done[name] += 1
    assert done == {"teacher": 6, "student": 24}
    assert [line["step"] for line in lines if "teacher/gan" in line] == [1, 2, 11, 12, 21, 22]


def states_key(state: dict[str, Tensor]) -> bytes:
    return b"".join(value.numpy().tobytes() for value in state.values())


@pytest.mark.parametrize("killed", [5, 11, 14])
def test_killed_blocks_resume_bit_equal(killed: int, tmp_path: Path) -> None:
    lines = resumed_blocks(distilled, tmp_path, killed)
    assert [row["step"] for row in lines if "teacher/gan" in row] == [1, 2, 11, 12]
