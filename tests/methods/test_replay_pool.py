"""The replay pool against CycleGAN's, written as the loop it stands for; on one rank, on simulated ones, on two."""

from __future__ import annotations

import pytest
import torch
from processes import launch
from torch import Tensor

from hpcdistill.data import counter
from hpcdistill.methods import replay_pool
from hpcdistill.methods.replay_pool import ReplayPool
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig

SHAPE = (2, 3, 4)


class LoopPool:
    """CycleGAN's: one image after the other, with Python's ifs."""

    def __init__(self, size: int, seed: int = 0, part: int = 0) -> None:
        self.size, self.seed, self.part = size, seed, part
        self.images: list[Tensor] = []
        self.exchanged = 0

    def query(self, fakes: Tensor, numbers: Tensor) -> Tensor:
        returned = fakes.clone()
        for place in sorted(range(len(numbers)), key=lambda i: int(numbers[i])):
            fake = fakes[place].clone()
            if len(self.images) < self.size:
                self.images.append(fake)
                continue
            words = counter.draw(self.seed, 6, numbers[place : place + 1].numpy(), self.part)
            if counter.below(words[0], 2)[0]:
                slot = counter.below(words[1], self.size)[0]
                returned[place] = self.images[slot]
                self.images[slot] = fake
                self.exchanged += 1
        return returned


def batches(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """(fakes, numbers) of successive batches, each in an order of its own."""
    result = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        numbers = torch.arange(step * size, (step + 1) * size)[torch.randperm(size, generator=generator)]
        result.append((torch.rand(size, *SHAPE, generator=generator).to(dtype), numbers))
    return result


# Batches smaller and larger than the pool: in the large ones a slot is exchanged several times within one batch.
@pytest.mark.parametrize(("size", "batch"), [(50, 1), (7, 4), (5, 8), (3, 16), (1, 6), (4, 4)])
@pytest.mark.parametrize(("seed", "part"), [(0, 0), (11, 2)])
def test_equals_the_loop(size: int, batch: int, seed: int, part: int) -> None:
    pool, loop = ReplayPool(size, *SHAPE, seed=seed, part=part), LoopPool(size, seed, part)
    for fakes, numbers in batches(-(-120 // batch), batch):
        before = fakes.clone()
        result = pool.query(fakes, numbers)
        assert torch.equal(result, loop.query(fakes, numbers))
        assert torch.equal(fakes, before)
        kept = len(loop.images)
        assert pool.filled == kept
        assert torch.equal(pool.images[:kept], torch.stack(loop.images))
        assert not pool.images[kept:].any()
    assert loop.exchanged > 20


def test_half_of_the_images_are_exchanged_and_all_slots_are_used() -> None:
    pool = ReplayPool(4, *SHAPE)
    pool.query(torch.zeros(4, *SHAPE), torch.arange(4))
    numbers = torch.arange(4, 4004)
    fakes = numbers.float().view(-1, 1, 1, 1).expand(-1, *SHAPE)
    result = pool.query(fakes, numbers)
    assert 0.46 < (result != fakes)[:, 0, 0, 0].float().mean() < 0.54
    assert (pool.images[:, 0, 0, 0] > 3900).all()


def simulated(monkeypatch: pytest.MonkeyPatch, pools: list[ReplayPool], fakes: Tensor, numbers: Tensor) -> Tensor:
    """The query of each rank, as if the others had brought their shares of the batch."""
    whole = {fakes.shape[1:]: fakes, numbers.shape[1:]: numbers}
    monkeypatch.setattr(replay_pool, "gather", lambda tensor: whole[tensor.shape[1:]])
    results = []
    for rank, pool in enumerate(pools):
        monkeypatch.setattr(replay_pool, "_rank", lambda rank=rank: rank)
        results.append(pool.query(fakes.chunk(len(pools))[rank], numbers.chunk(len(pools))[rank]))
    return torch.cat(results)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_for_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    loop, pools = LoopPool(5), [ReplayPool(5, *SHAPE) for _ in range(ranks)]
    for fakes, numbers in batches(20, 8):
        assert torch.equal(simulated(monkeypatch, pools, fakes, numbers), loop.query(fakes, numbers))
        for pool in pools:
            assert torch.equal(pool.images[: pool.filled], torch.stack(loop.images))


@pytest.mark.distributed
def test_two_processes() -> None:
    def work(rank: int, ranks: int) -> None:
        make_accelerator(TrainConfig(device="cpu", batch_size=8, trackers=()))
        for dtype in (torch.float32, torch.bfloat16):
            pool, loop = ReplayPool(5, *SHAPE), LoopPool(5)
            for fakes, numbers in batches(12, 8, dtype):
                fakes = fakes.contiguous(memory_format=torch.channels_last)
                result = pool.query(fakes.chunk(ranks)[rank], numbers.chunk(ranks)[rank])
                assert torch.equal(result, loop.query(fakes, numbers).chunk(ranks)[rank])
                assert torch.equal(pool.images[: pool.filled], torch.stack(loop.images).float())

    assert launch(2, work) == [0, 0]


def test_a_pool_goes_on_from_its_state() -> None:
    undisturbed = ReplayPool(6, *SHAPE)
    done = batches(12, 5)
    expected = [undisturbed.query(*batch) for batch in done]
    for middle in (1, 7):  # while it fills up, and when it is full
        stopped = ReplayPool(6, *SHAPE)
        for batch in done[:middle]:
            stopped.query(*batch)
        state = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
        assert set(state) == {"images", "filled"}
        resumed = ReplayPool(6, *SHAPE)
        resumed.load_state_dict(state)
        for batch, images in zip(done[middle:], expected[middle:], strict=True):
            assert torch.equal(resumed.query(*batch), images)
        assert torch.equal(resumed.images, undisturbed.images)


def test_size_0_hands_everything_back() -> None:
    pool = ReplayPool(0, *SHAPE)
    fakes = torch.rand(3, *SHAPE, requires_grad=True)
    result = pool.query(fakes, torch.arange(3))
    assert torch.equal(result, fakes)
    assert not result.requires_grad
    assert pool.images.numel() == 0


def test_results_have_no_gradients_and_are_copies() -> None:
    pool = ReplayPool(3, *SHAPE)
    (fakes, numbers), *_ = batches(1, 8)
    result = pool.query(fakes.requires_grad_(), numbers)
    assert not result.requires_grad
    assert not pool.images.requires_grad
    kept = pool.images.clone()
    result.zero_()
    assert torch.equal(pool.images, kept)
    assert fakes.detach().all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_half_precision_goes_through_unchanged(layout: torch.memory_format) -> None:
    pool, loop = ReplayPool(6, *SHAPE).to(memory_format=layout), LoopPool(6)
    for fakes, numbers in batches(10, 4, torch.bfloat16):
        result = pool.query(fakes.contiguous(memory_format=layout), numbers)
        assert result.dtype == torch.bfloat16
        assert result.is_contiguous(memory_format=layout)
        assert torch.equal(result, loop.query(fakes, numbers))


def test_pools_of_other_parts_and_seeds_decide_otherwise() -> None:
    results = []
    for seed, part in ((0, 0), (0, 1), (1, 0)):
        pool = ReplayPool(4, *SHAPE, seed=seed, part=part)
        results.append(torch.cat([pool.query(*batch) for batch in batches(10, 4)]))
    first, second, third = results
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_host_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read by the host")

    pool, loop = ReplayPool(3, *SHAPE), LoopPool(3)
    given = batches(6, 4)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "numpy", "cpu", "nonzero"):
            patch.setattr(Tensor, name, refused)
        results = [pool.query(*batch) for batch in given]
        with pytest.raises(AssertionError, match="read by the host"):
            bool(torch.ones(1))
    for batch, result in zip(given, results, strict=True):
        assert torch.equal(result, loop.query(*batch))


def test_other_shapes_are_refused() -> None:
    pool = ReplayPool(3, *SHAPE)
    with pytest.raises(ValueError, match=r"this pool takes \[B, 2, 3, 4\] and \[B\] numbers, not \[2, 2, 4, 4\]"):
        pool.query(torch.zeros(2, 2, 4, 4), torch.arange(2))
    with pytest.raises(ValueError, match=r"and \[3\]"):
        pool.query(torch.zeros(2, *SHAPE), torch.arange(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_without_synchronisation() -> None:
    pool, loop = ReplayPool(5, *SHAPE).cuda(), LoopPool(5)
    given = [(fakes.cuda(), numbers.cuda()) for fakes, numbers in batches(20, 8)]
    pool.query(*given[0])  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [pool.query(*batch) for batch in given[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loop.query(*batches(1, 8)[0])
    for batch, result in zip(batches(20, 8)[1:], results, strict=True):
        assert torch.equal(result.cpu(), loop.query(*batch))
