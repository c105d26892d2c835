"""Iterations of several batches: what each phase sees, the same for any ranks and pieces, and after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from processes import launch
from safetensors.torch import load
from torch import nn
from toy import SEED, Killed, ToyGAN, ToyReader, gan_samples, newest_tensors, rows, run, saved

from hpcdistill.methods.base import Batch, Carry, Phase, Progress, Segment, Terms
from hpcdistill.training import batches as of_training
from hpcdistill.training.batches import CopyStream, Delivered, ahead, delivered

STEPS, BATCH, BATCHES = 7, 4, 3


class Eager(ToyGAN):
    """The generator is updated on each of three batches, the discriminator on the first; `seen`: phase, draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int]]] = []

    @property
    def phases(self) -> tuple[Phase, ...]:
        generator, discriminator = super().phases
        return (*(dataclasses.replace(generator, batch=number) for number in range(BATCHES)), discriminator)

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        assert "fake" not in carry  # of another batch
        self.seen.append(("generator", batch["number"].tolist()))
        return super().generator_loss(batch, carry, progress)

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.seen.append(("discriminator", batch["number"].tolist()))
        return super().discriminator_loss(batch, carry, progress)


def images(numbers: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """As readers deliver them: the loop adds the numbers of the draws."""
    return {name: value for name, value in gan_samples(numbers).items() if name != "number"}


def train(folder: Path, rank: int = 0, ranks: int = 1, killed: int | None = None, **options: Any) -> Eager:
    def before(batch: int) -> None:
        if batch == killed:
            raise Killed

    method = Eager()
    run(method, ToyReader(BATCH, images, rank, ranks, before), folder, STEPS, **options)
    return method


def test_each_phase_sees_its_batch(tmp_path: Path) -> None:
    """Step k takes the batches 3k, 3k + 1, 3k + 2: every draw of the run once."""
    method = train(tmp_path)
    expected = []
    for step in range(STEPS):
        draws = np.arange(step * BATCHES * BATCH, (step + 1) * BATCHES * BATCH).reshape(BATCHES, BATCH).tolist()
        expected += [*(("generator", part) for part in draws), ("discriminator", draws[0])]
    assert method.seen == expected
    assert [line["images"] for line in rows(tmp_path)] == [12 * (step + 1) for step in range(STEPS)]


def test_an_iteration_by_hand(tmp_path: Path) -> None:
    """Plain PyTorch: three updates of the generator, then one of D on the first one's image, of before its update."""
    train(tmp_path)
    method = ToyGAN()
    generator, critic = method.generator, method.discriminator
    adams = [
        torch.optim.Adam(module.parameters(), lr=2e-2, betas=(0.5, 0.999), eps=method.groups["generator"].optimizer.eps)
        for module in (generator, critic)
    ]
    reader, terms = ToyReader(BATCH, gan_samples), []
    for step in range(STEPS):
        for adam in adams:
            adam.param_groups[0]["lr"] = 2e-2 + (1e-5 - 2e-2) * max(0.0, (step / STEPS - 0.5) / 0.5)
        fakes = []
        for number in range(BATCHES):
            batch = reader[step * BATCHES + number]
            critic.eval().requires_grad_(False)  # frozen: the vectors of the spectral norm stand still
            fakes.append(generator(batch["x"]))
            l1 = 0.5 * (fakes[-1] - batch["y"]).abs().mean()
            terms.append(l1.item())
            _step(adams[0], (critic(fakes[-1]) - 1).square().mean() + l1)
        batch = reader[step * BATCHES]
        critic.train().requires_grad_(True)
        fake = method.pool.query(fakes[0].detach(), batch["number"])
        loss = 0.5 * (critic(batch["y"]) - 1).square().mean() + 0.5 * critic(fake).square().mean()
        _step(adams[1], loss, clip=0.5)
    for name, value in saved(tmp_path, name="painter").items():
        torch.testing.assert_close(value, generator.state_dict()[name], rtol=1e-8, atol=1e-10)
    means = np.reshape(terms, (STEPS, BATCHES)).mean(1)
    np.testing.assert_allclose([line["generator/l1"] for line in rows(tmp_path)], means, rtol=1e-6)


def _step(adam: torch.optim.Adam, loss: torch.Tensor, clip: float = 0.0) -> None:
    adam.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], clip)
    adam.step()


@pytest.mark.parametrize("killed", [8, 10, 18])
def test_a_run_killed_within_an_iteration_resumes(killed: int, tmp_path: Path) -> None:
    """At the last, the middle and the first of a step's batches."""
    train(tmp_path / "undisturbed", checkpoint_every=2)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed=killed, checkpoint_every=2)
    train(tmp_path / "killed", checkpoint_every=2)
    assert newest_tensors(tmp_path / "killed") == newest_tensors(tmp_path / "undisturbed")  # bytes
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")


@pytest.mark.distributed
def test_ranks_and_accumulation_change_nothing(tmp_path: Path) -> None:
    runs = [(1, 1), (1, 2), (2, 1), (2, 2)]

    def work(rank: int, of: int) -> None:
        for ranks, pieces in runs:
            if ranks == of:
                options = {"accumulation": pieces, "checkpoint_every": STEPS, "gradient_norms_every": 2}
                train(tmp_path / f"{ranks}x{pieces}", rank, of, **options)

    assert launch(1, work) == [0]
    assert launch(2, work) == [0, 0]
    reference = rows(tmp_path / "1x1")
    tensors = newest_tensors(tmp_path / "1x1")
    for ranks, pieces in runs[1:]:
        folder = tmp_path / f"{ranks}x{pieces}"
        for left, right in zip(reference, rows(folder), strict=True):
            assert left == pytest.approx(right, rel=1e-6, abs=1e-12)
        for file, content in newest_tensors(folder).items():
            one, other = load(tensors[file]), load(content)
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-10)


def test_batches_of_an_iteration_come_together() -> None:
    batches = [{"x": torch.tensor(number)} for number in range(6)]
    assert [[int(one["x"]) for one in taken or []] for taken in delivered(batches, 2, 1.0)] == [[0, 1], [2, 3], [4, 5]]


def test_what_delivers_them_is_closed_with_them() -> None:
    """Whoever holds the loader's iterator: its processes end when the run's batches are closed."""
    ended: list[bool] = []

    def loader() -> Iterator[Batch]:
        try:
            while True:
                yield {"x": torch.zeros(1)}
        finally:
            ended.append(True)

    held = loader()
    taken = delivered(held, 2, 1.0)
    next(taken)
    assert not ended
    taken.close()
    assert ended


class Recorded:
    """A stream that copies nothing, and records what is asked of it."""

    done: ClassVar[list[str]] = []

    def __init__(self, device: torch.device) -> None:
        assert device == torch.device("cuda")

    def started(self, batches: Iterator[Delivered]) -> Iterator[tuple[Delivered, str]]:
        for number, taken in enumerate(batches):
            self.done.append(f"copy {number}")
            yield taken, f"event {number}"

    def hand_over(self, batches: Delivered, copied: str) -> None:
        self.done.append(copied)


def endless(ended: list[bool], stop_at: int) -> Generator[Delivered]:
    try:
        for number in itertools.count():
            yield None if number == stop_at else [{"x": torch.tensor(number)}]
    finally:
        ended.append(True)


def test_the_next_batches_are_copied_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of step k + 1 begins before step k is made; that a signal came is known in its turn."""
    monkeypatch.setattr(of_training, "CopyStream", Recorded)
    monkeypatch.setattr(Recorded, "done", [])
    ended: list[bool] = []
    taken = ahead(endless(ended, stop_at=3), torch.device("cuda"))
    for step in range(4):
        batches = next(taken)
        Recorded.done.append(f"step {step}")
        assert batches is None if step == 3 else batches and int(batches[0]["x"]) == step
    expected = ["copy 0"]
    for step in range(4):
        expected += [f"copy {step + 1}", f"event {step}", f"step {step}"]
    assert Recorded.done == expected
    assert not ended
    taken.close()
    assert ended


def test_none_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_training, "CopyStream", Recorded)
    for device in ("cpu", "cuda"):
        batches = ahead(delivered([{"x": torch.tensor(number)} for number in range(5)], 2, 1.0), torch.device(device))
        assert [[int(one["x"]) for one in taken or []] for taken in batches] == [[0, 1], [2, 3], [4]]
        assert list(ahead(delivered([], 2, 1.0), torch.device(device))) == []


def test_a_cpu_reads_none_ahead() -> None:
    asked: list[int] = []
    ended: list[bool] = []
    batches = (asked.append(number) or taken for number, taken in enumerate(endless(ended, 9)))
    taken = ahead(batches, torch.device("cpu"))
    next(taken)
    assert asked == [0]
    taken.close()


class Stream:
    """Stands in for a CUDA stream: `asked` is what was asked of any of them."""

    asked: ClassVar[list[tuple[str, str]]] = []
    current = "computing"

    def __init__(self, name: object) -> None:
        self.name = name if isinstance(name, str) else "copying"

    def record_event(self) -> str:
        self.asked.append((self.name, "record"))
        return "event"

    def wait_event(self, event: str) -> None:
        self.asked.append((self.name, f"wait for {event}"))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        Stream.current, before = self.name, Stream.current
        yield
        Stream.current = before


def test_batches_are_read_and_copied_in_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their memory is kept until the stream that computes is through with them."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(Stream, "asked", [])
    for name, value in (("Stream", Stream), ("stream", Stream.used), ("current_stream", lambda _: Stream("computing"))):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: Stream.asked.append((stream.name, "keep")))
    read: list[str] = []
    batches = (read.append(Stream.current) or [{"x": torch.ones(1), "y": torch.ones(2)}] for _ in range(2))
    copies = CopyStream(cpu)
    for taken, event in copies.started(batches):  # type: ignore[arg-type]
        assert Stream.current == "computing"
        copies.hand_over(taken, event)
        assert [list(batch) for batch in taken or []] == [["x", "y"]]
    assert read == ["copying"] * 2
    one = [("copying", "record"), ("computing", "wait for event"), *[("computing", "keep")] * 2]
    assert Stream.asked == [*one, *one, ("copying", "record")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_with_what_was_copied() -> None:
    """While another stream writes the next batches; nothing waits for it."""
    device = torch.device("cuda", 0)
    pinned = [{"x": torch.full((1 << 22,), float(number)).pin_memory()} for number in range(30)]
    sums = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for taken in ahead(delivered(pinned, 2, 1.0), device):
            for batch in taken or []:
                torch.cuda._sleep(1 << 20)
                sums.append(batch["x"].double().sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [float(one) for one in sums] == [number * float(1 << 22) for number in range(30)]


class Resting(ToyGAN):
    """The generator alone for two steps, both for three, D alone for four; D's rate follows its own steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.groups["discriminator"] = dataclasses.replace(self.groups["discriminator"], course="own")

    def segments(self) -> tuple[Segment, ...]:
        generator, discriminator = self.phases
        alone = dataclasses.replace(discriminator, before=None)
        return (Segment("g", (generator,), 2), Segment("both", self.phases, 3), Segment("d", (alone,), 4))

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        carry["fake"] = self.generator(batch["x"]).detach()
        return super().discriminator_loss(batch, carry, progress)


def test_a_rate_follows_the_run_or_the_groups_own_steps(tmp_path: Path) -> None:
    """From 0.02 along the second half to 1e-5: D's by its seven steps, which begin with the run's third."""
    run(Resting(), ToyReader(BATCH, gan_samples), tmp_path, 9)

    def rate(done: int, steps: int) -> float:
        return 2e-2 - (2e-2 - 1e-5) * max(0.0, 2 * done / steps - 1)

    lines = rows(tmp_path)
    assert [line["learning_rate/generator"] for line in lines] == pytest.approx([rate(n, 9) for n in range(9)])
    assert [line["learning_rate/discriminator"] for line in lines] == pytest.approx(
        [rate(max(0, n - 2), 7) for n in range(9)]
    )
