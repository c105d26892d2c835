"""The synchronised BatchNorm on forked ranks against one nn.BatchNorm2d on the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from processes import launch
from torch import Tensor, distributed, nn
from toy import BATCH, ToyGAN, ToyReader, gan_samples, newest_tensors, rows, run

from hpcdistill.settings import identity_values
from hpcdistill.training.batch_norm import SynchronisedBatchNorm2d, synchronise
from hpcdistill.training.config import TrainConfig

SAMPLES, CHANNELS, STEPS = 8, 3, 3


def network(**options: Any) -> nn.Sequential:
    """Two BatchNorms in a row, so that the first one's gradient passes through the second's all_reduce."""
    torch.manual_seed(5)
    built = nn.Sequential(
        nn.Conv2d(2, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS, **options),
        nn.Tanh(),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS, **options),
    ).double()
    for part in built.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.normal_(part.weight, 1, 0.5)
            nn.init.normal_(part.bias)
    return built


def images(step: int) -> Tensor:
    """[SAMPLES, 2, 5, 4], of another mean and spread in every sample: ranks differ in both."""
    drawn = torch.randn(SAMPLES, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    place = torch.arange(SAMPLES, dtype=torch.float64)[:, None, None, None]
    return (1 + place) * drawn + 3 * place


def loss_of(outputs: Tensor, first: int) -> Tensor:
    """A mean over samples in which each sample counts differently."""
    place = torch.arange(first, first + len(outputs), dtype=torch.float64)
    return (outputs.pow(3).mean((1, 2, 3)) * place.cos()).mean() + (outputs - 0.3).abs().mean()


def step_of(module: nn.Module, batch: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The outputs and the input's gradient; the parameters' are in place."""
    module.zero_grad()
    batch = batch.clone().requires_grad_()
    outputs = module(batch)
    loss_of(outputs, first).backward()
    assert batch.grad is not None
    return outputs.detach(), batch.grad


def frozen(module: nn.Module) -> None:
    """As the loop's Freezer does it."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats = False


def join() -> None:
    PartialState(cpu=True)  # Accelerate joins the ranks


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.37, "eps": 1e-3},
    "average": {"momentum": None},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "frozen": {},
}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_is_one_batch_norm_over_the_whole_batch(ranks: int) -> None:
    """Outputs, gradients of inputs and parameters, running statistics over three batches: float64, 1e-10."""

    def work(rank: int, of: int) -> None:
        join()
        assert distributed.is_initialized() is (of > 1)
        share = SAMPLES // of
        first = rank * share
        for case, options in CASES.items():
            reference, module = network(**options), network(**options)
            synchronise(module)
            if case == "frozen":
                frozen(reference)
                frozen(module)
            for step in range(STEPS):
                batch = images(step)
                outputs, gradient = step_of(reference, batch, 0)
                own_outputs, own_gradient = step_of(module, batch[first : first + share], first)
                close = {"rtol": 1e-9, "atol": 1e-10}
                torch.testing.assert_close(own_outputs, outputs[first : first + share], **close)
                # The whole loss is the mean of the ranks': each gradient of their sum is so many times as large.
                torch.testing.assert_close(own_gradient / of, gradient[first : first + share], **close)
                for own, whole in zip(module.parameters(), reference.parameters(), strict=True):
                    assert own.grad is not None
                    averaged = own.grad.clone()
                    if of > 1:
                        distributed.all_reduce(averaged)
                    torch.testing.assert_close(averaged / of, whole.grad, **close)
                for name, value in module.state_dict().items():
                    torch.testing.assert_close(value, reference.state_dict()[name], **close)
            if case == "frozen":
                assert all(torch.equal(a, b) for a, b in zip(module.buffers(), network().buffers(), strict=True))

    assert launch(ranks, work) == [0] * ranks


@pytest.mark.distributed
def test_one_value_a_rank_is_enough() -> None:
    def work(rank: int, of: int) -> None:
        join()
        module = SynchronisedBatchNorm2d(1, affine=False, eps=0).double()
        value = torch.tensor([1.0, 5.0], dtype=torch.float64)[rank].view(1, 1, 1, 1)
        assert module(value).item() == pytest.approx([-1, 1][rank])
        assert (module.running_mean.item(), module.running_var.item()) == pytest.approx((0.3, 0.9 + 0.1 * 8))

    assert launch(2, work) == [0, 0]


@pytest.mark.distributed
def test_eval_mode_sends_nothing() -> None:
    """One rank alone goes through: a collective call would wait for the other, and sending is forbidden anyway."""

    def work(rank: int, of: int) -> None:
        join()
        if rank == 1:
            return

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a collective call in eval mode")

        distributed.all_reduce = refuse
        reference, module = network().eval(), network().eval()
        synchronise(module)
        assert torch.equal(module(images(0)), reference(images(0)))
        with pytest.raises(AssertionError, match="a collective call"):
            module.train()(images(0))

    assert launch(2, work) == [0, 0]


@pytest.mark.distributed
def test_statistics_are_float32_under_autocast() -> None:
    """bfloat16 in, bfloat16 out, what lies between in float32: 1000 + noise would be lost in bfloat16 (8 bits)."""

    def work(rank: int, of: int) -> None:
        join()
        module = SynchronisedBatchNorm2d(2)
        batch = (100 + torch.randn(SAMPLES, 2, 16, 16, generator=torch.Generator().manual_seed(1))).bfloat16()
        share = batch.chunk(of)[rank]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = module(share)
        assert outputs.dtype == torch.bfloat16
        wide = batch.double()
        mean, variance = wide.mean((0, 2, 3)), wide.var((0, 2, 3))
        assert module.running_mean.dtype == module.running_var.dtype == torch.float32
        torch.testing.assert_close(module.running_mean.double(), 0.1 * mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(module.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5, atol=0)
        spread = wide.var((0, 2, 3), keepdim=True, unbiased=False)
        expected = (share.double() - wide.mean((0, 2, 3), keepdim=True)) / (spread + module.eps).sqrt()
        torch.testing.assert_close(outputs, expected.bfloat16(), rtol=0.01, atol=0.01)

    assert launch(2, work) == [0, 0]


def test_synchronising_changes_the_class_alone() -> None:
    module = nn.ModuleDict({"net": network(), "norm": nn.BatchNorm2d(2), "other": nn.BatchNorm1d(2)})
    module["again"] = module["norm"]
    module["norm"].eval()
    before, state = dict(module.named_parameters()), copy.deepcopy(module.state_dict())
    synchronise(module)
    assert all(before[name] is parameter for name, parameter in module.named_parameters())
    assert list(module.state_dict()) == list(state)
    kinds = [type(module["net"][1]), type(module["net"][4]), type(module["norm"])]
    assert kinds == [SynchronisedBatchNorm2d] * 3
    assert module["again"] is module["norm"]
    assert type(module["other"]) is nn.BatchNorm1d
    assert (module["norm"].training, module["net"][1].training) == (False, True)
    # There and back: the state of one is the state of the other, and copies (averaged weights) keep the class.
    other = network()
    other.load_state_dict(module["net"].state_dict())
    module["net"].load_state_dict(network().state_dict())
    assert type(copy.deepcopy(module["net"])[1]) is SynchronisedBatchNorm2d
    root = nn.BatchNorm2d(1)
    synchronise(root)
    assert isinstance(root, SynchronisedBatchNorm2d)
    with pytest.raises(ValueError, match="4D"):
        root(torch.zeros(2, 1))


def test_the_default_is_no_part_of_a_runs_identity() -> None:
    assert identity_values(TrainConfig()) == {}
    assert identity_values(TrainConfig(batch_norm="sync")) == {}
    assert identity_values(TrainConfig(batch_norm="local")) == {"batch_norm": "local"}


@pytest.mark.distributed
def test_local_depends_on_the_ranks_and_sync_does_not(tmp_path: Path) -> None:
    """A GAN with BatchNorm in both networks, in the loop."""

    def work(rank: int, of: int) -> None:
        for kind in ("sync", "local"):
            reader = ToyReader(BATCH, gan_samples, rank, of)
            run(ToyGAN(norm=True), reader, tmp_path / f"{kind}{of}", 6, batch_norm=kind, checkpoint_every=6)

    for ranks in (1, 2):
        assert launch(ranks, work) == [0] * ranks
    losses = {
        case: torch.tensor([row["generator/l1"] for row in rows(tmp_path / case)])
        for case in ("sync1", "sync2", "local1", "local2")
    }
    torch.testing.assert_close(losses["sync1"], losses["sync2"], rtol=1e-6, atol=0)
    assert torch.equal(losses["sync1"], losses["local1"])
    assert (losses["local1"] - losses["local2"]).abs().max() > 1e-4
    assert newest_tensors(tmp_path / "sync1").keys() == newest_tensors(tmp_path / "sync2").keys()
