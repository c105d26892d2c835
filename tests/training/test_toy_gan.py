"""A GAN in the loop: two groups, spectral norm, a replay pool, on one and on two processes."""

from __future__ import annotations

import copy
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from processes import kill_self_at, launch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from toy import (
    BATCH,
    POOL_SIZE,
    Critic,
    Killed,
    ToyGAN,
    ToyReader,
    gan_samples,
    kill_at,
    newest_tensors,
    rows,
    run,
    saved,
)

from hpcdistill.methods.base import Batch, Carry, Progress, Terms
from hpcdistill.ranks import signals
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.metrics_log import RunningMeans
from hpcdistill.training.optimization import Freezer

STEPS = 24
SAVED = "step-00000010"  # the newest checkpoint of a run that is killed at step 13
LOSSES = ("generator/adversarial", "generator/l1", "discriminator/real", "discriminator/fake")


def train_gan(folder: Path, ranks: int, killed_at: int | None = None) -> list[int]:
    """STEPS steps with a checkpoint every 5, in processes of their own; the exit codes."""

    def work(rank: int, of: int) -> None:
        reader = ToyReader(BATCH, gan_samples, rank, of, before=kill_self_at(killed_at, folder / "checkpoints" / SAVED))
        run(ToyGAN(), reader, folder, STEPS, checkpoint_every=5)

    return launch(ranks, work)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The finished run on 1 and on 2 processes."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        assert train_gan(folder, ranks) == [0] * ranks
    return folders


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run killed when it had done 13 steps, 10 of them in a checkpoint, on 1 and on 2 processes."""
    folders = {ranks: tmp_path_factory.mktemp(f"killed{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        assert all(code != 0 for code in train_gan(folder, ranks, killed_at=13))
        assert max((folder / "checkpoints").iterdir()).name == SAVED
        assert rows(folder)[-1]["step"] >= 12
    return folders


def assert_close(first: Path, second: Path) -> None:
    """Same losses and same final tensors (weights, spectral-norm vectors, Adam's moments, pool) but for rounding."""
    one, two = rows(first), rows(second)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, STEPS + 1))
    for name in LOSSES:
        np.testing.assert_allclose([row[name] for row in one], [row[name] for row in two], rtol=0, atol=1e-5)
    left, right = newest_tensors(first), newest_tensors(second)
    assert left.keys() == right.keys()
    for name in left:
        tensors, others = load(left[name]), load(right[name])
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[key], rtol=0, atol=1e-9, msg=lambda m, n=f"{name} {key}": n + m)


@pytest.mark.distributed
def test_one_and_two_processes_train_the_same(undisturbed: dict[int, Path]) -> None:
    assert_close(undisturbed[1], undisturbed[2])
    losses = rows(undisturbed[1])
    assert losses[-1]["generator/l1"] < 0.5 * losses[0]["generator/l1"]  # and it does train
    pool = load(newest_tensors(undisturbed[2])["memory/pool.safetensors"])
    assert pool["filled"] == POOL_SIZE < BATCH * STEPS
    # The pool holds fakes of many steps, the last one among them: it was shuffled, not only filled.
    assert len({round(float(image.sum()), 9) for image in pool["images"]}) == POOL_SIZE


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one(
    ranks: int, killed: dict[int, Path], undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(killed[ranks], tmp_path / "run")
    assert train_gan(folder, ranks) == [0] * ranks
    resumed = newest_tensors(folder)
    assert "memory/pool.safetensors" in resumed
    vectors = load(resumed["networks/discriminator.safetensors"])
    assert "body.0.parametrizations.weight.0._u" in vectors
    assert resumed == newest_tensors(undisturbed[ranks])  # bytes
    assert rows(folder) == rows(undisturbed[ranks])
    assert (folder / "generators/last/painter.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_resumes_on_another_number_of_processes(
    before: int, after: int, killed: dict[int, Path], undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(killed[before], tmp_path / "run")
    assert train_gan(folder, after) == [0] * after
    assert_close(folder, undisturbed[1])


@pytest.mark.distributed
def test_means_that_cross_a_checkpoint_are_of_all_ranks() -> None:
    def work(rank: int, ranks: int) -> None:
        accelerator = make_accelerator(TrainConfig(device="cpu", batch_size=2, trackers=()))
        means = RunningMeans(accelerator.device)
        means.add({"loss": torch.tensor(1.0 + 10 * rank)})  # ranks: 1, 11
        of_first_rank = broadcast_object_list([means.state(accelerator)])[0]  # what a checkpoint holds
        resumed = RunningMeans(accelerator.device)
        resumed.load(of_first_rank)
        resumed.add({"loss": torch.tensor(3.0 + 10 * rank)})  # 3, 13
        assert resumed.read(accelerator) == {"loss": 7.0}

    assert launch(2, work) == [0, 0]


@pytest.mark.distributed
def test_a_nan_on_one_rank_stops_all_with_the_terms_name(tmp_path: Path) -> None:
    def work(rank: int, ranks: int) -> None:
        def samples(numbers: np.ndarray) -> dict[str, Tensor]:
            batch = gan_samples(numbers)
            batch["y"][numbers == 6 * BATCH + 7] = torch.nan  # step 6, the last sample: rank 1 has it
            return batch

        with pytest.raises(ValueError, match="the loss term generator/l1 became NaN or infinite by step 10") as error:
            run(ToyGAN(), ToyReader(BATCH, samples, rank, ranks), tmp_path, STEPS, log_every=10)
        assert "\n" not in str(error.value)

    assert launch(2, work) == [0, 0]
    good = tmp_path / "good"
    with pytest.raises(Killed):
        run(ToyGAN(), ToyReader(BATCH, gan_samples, before=kill_at(6)), good, STEPS, checkpoint_every=6)
    before = load(newest_tensors(good)["networks/generator.safetensors"])
    for name, tensor in saved(tmp_path, name="painter").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)


@pytest.mark.distributed
def test_a_stop_signal_on_one_rank_stops_all_at_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PACE", 0.0)  # agree after every step

    def work(rank: int, ranks: int) -> None:
        def before(step: int) -> None:
            if (step, rank) == (3, 1):
                signal.raise_signal(signal.SIGTERM)

        outcome = run(ToyGAN(), ToyReader(BATCH, gan_samples, rank, ranks, before), tmp_path, STEPS)
        assert (outcome.finished, outcome.position.step) == (False, 4)

    assert launch(2, work) == [0, 0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


class Watched(ToyGAN):
    """Compares each group's state at the ends of the other's phase."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.at_phase_start: dict[str, dict[str, Tensor]] = {}
        self.checks = 0

    def state(self, group: str) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.groups[group].module.state_dict().items()}

    def started(self, group: str, other: str) -> None:
        """`group`'s phase begins: `other`'s is over, in which nothing of `group` may have moved."""
        assert all(parameter.requires_grad for parameter in self.groups[group].module.parameters())
        assert not any(parameter.requires_grad for parameter in self.groups[other].module.parameters())
        assert all(parameter.grad is None for parameter in self.parameters())
        if group in self.at_phase_start:
            frozen, now = self.at_phase_start.pop(group), self.state(group)
            assert [name for name in frozen if not torch.equal(frozen[name], now[name])] == []
            self.checks += 1
        self.at_phase_start[other] = self.state(other)
        self.own = self.state(group)

    def ended(self, group: str) -> None:
        """What the phase's own forward passes have moved: its statistics and its spectral-norm vectors."""
        now = self.state(group)
        moved = {name for name in now if not torch.equal(now[name], self.own[name])}
        assert {
            name for name in now if name.endswith(("0._u", "_v", "running_mean")) and now[name].numel() > 1
        } <= moved

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.started("generator", "discriminator")
        terms = super().generator_loss(batch, carry, progress)
        self.ended("generator")
        return terms

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.started("discriminator", "generator")
        terms = super().discriminator_loss(batch, carry, progress)
        self.ended("discriminator")
        return terms


def test_nothing_of_a_frozen_group_moves(tmp_path: Path) -> None:
    method = Watched()
    run(method, ToyReader(BATCH, gan_samples), tmp_path, 6)
    assert method.checks == 11  # two a step, but for the first phase


def test_a_frozen_network_normalises_as_in_training() -> None:
    torch.manual_seed(0)
    critic, image = Critic(norm=True), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    norm = critic.body[1]
    reference = copy.deepcopy(critic)
    freezer = Freezer({"critic": critic, "other": nn.Linear(1, 1)})
    freezer.only("other")
    verdict = critic(image)
    with torch.no_grad():  # by hand: the batch's statistics, spectral norm with the vectors as they are
        spectral = reference.body[0].parametrizations.weight[0]
        weight = reference.body[0].parametrizations.weight.original
        sigma = torch.dot(spectral._u, weight.flatten(1) @ spectral._v)
        hidden = nn.functional.conv2d(image, weight / sigma, reference.body[0].bias, stride=2, padding=1)
        mean, variance = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), keepdim=True, unbiased=False)
        hidden = nn.functional.leaky_relu((hidden - mean) / (variance + norm.eps).sqrt(), 0.2)
        spectral = reference.body[3].parametrizations.weight[0]
        weight = reference.body[3].parametrizations.weight.original
        sigma = torch.dot(spectral._u, weight.flatten(1) @ spectral._v)
        expected = nn.functional.conv2d(hidden, weight / sigma, reference.body[3].bias, stride=2, padding=1)
    torch.testing.assert_close(verdict.detach(), expected)
    assert norm.num_batches_tracked == 0


def test_release_gives_back_what_was_there() -> None:
    module = nn.Sequential(
        spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    module[0].bias.requires_grad_(False)  # a method's own choice
    other = nn.Linear(3, 3)
    freezer = Freezer({"a": module, "b": other})
    for group, active in (("a", True), ("b", False), (None, True)):
        if group:
            freezer.only(group)
        else:
            freezer.release()
        assert [parameter.requires_grad for parameter in module.parameters()] == [False] + [active] * 5
        assert [module[1].track_running_stats, module[2].track_running_stats] == [active, False]
        assert module[0].parametrizations.weight[0].training is active
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_parameter_of_two_groups_trains_in_both_phases() -> None:
    shared = nn.Linear(2, 2)
    freezer = Freezer({"a": nn.Sequential(shared, nn.Linear(2, 2)), "b": nn.Sequential(shared)})
    for group in ("a", "b", "a"):
        freezer.only(group)
        assert shared.weight.requires_grad


def test_carry_refuses_gradients() -> None:
    carry = Carry()
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"carry\['fake'\] still has gradients; detach it"):
        carry["fake"] = weight * 2
    assert len(carry) == 0
    carry["fake"] = (weight * 2).detach()
    assert carry["fake"].tolist() == [2.0, 2.0]


def test_the_pool_hands_back_what_it_keeps() -> None:
    PartialState(cpu=True)
    pool = ToyGAN().pool
    fakes = gan_samples(np.arange(200))["x"]
    numbers = torch.arange(200)
    assert torch.equal(pool.query(fakes[:POOL_SIZE], numbers[:POOL_SIZE]), fakes[:POOL_SIZE])
    later = pool.query(fakes[POOL_SIZE:], numbers[POOL_SIZE:])
    known = {tuple(fake.flatten().tolist()): number for number, fake in enumerate(fakes)}
    returned = [known[tuple(image.flatten().tolist())] for image in later]
    exchanged = sum(number != place for place, number in enumerate(returned, POOL_SIZE))
    assert 50 < exchanged < 100  # half of 150
    kept = [known[tuple(image.flatten().tolist())] for image in pool.images]
    assert sorted(returned + kept) == list(range(200))  # every fake is in one place
