"""`train.deterministic`: bit-equal repeats, and everything as it was afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import SEED, ToyGAN, ToyReader, gan_samples, rows, run
from translation import distilled, samples

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Method
from hpcdistill.training import determinism
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.determinism import deterministic, prepare_determinism

CPU = torch.device("cpu")
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, ":4096:8")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def switches() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize(
    ("build", "reader"),
    [
        (ToyGAN, ToyReader(8, gan_samples)),
        (distilled, ToyReader(2, samples)),
    ],
)
def test_two_runs_are_equal_to_the_bit(build: Callable[[], Method], reader: ToyReader, tmp_path: Path) -> None:
    """And close to one without it."""
    before = switches()
    seen = []
    tensors, lines = [], []
    for name in ("first", "second"):
        torch.manual_seed(SEED)
        method = build()
        next(iter(method.generators.values())).register_forward_pre_hook(lambda *_: seen.append(switches()))
        run(method, reader, tmp_path / name, 2, deterministic=True)
        [folder] = (tmp_path / name / "checkpoints").glob("step-*")
        tensors.append({str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))})
        lines.append(rows(tmp_path / name))
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2
    assert tensors[0].keys() == tensors[1].keys()
    for file, values in tensors[0].items():
        assert all(torch.equal(value, tensors[1][file][key]) for key, value in values.items()), file
    assert set(seen) == {(True, False, True, False, False)}
    assert switches() == before
    torch.manual_seed(SEED)
    run(build(), reader, tmp_path / "without", 1, deterministic=False)
    [without] = rows(tmp_path / "without")
    for name, value in lines[0][0].items():
        assert value == pytest.approx(without[name], rel=1e-4), name


@pytest.mark.parametrize("wrong", [None, ValueError("x"), RuntimeError("x")])
def test_everything_is_as_it_was_afterwards(wrong: Exception | None) -> None:
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = switches()
    assert before == (True, True, False, True, True)
    try:
        with deterministic(True, CPU):
            assert switches() == (True, False, True, False, False)
            if wrong:
                raise wrong
    except (ValueError, RuntimeError) as error:
        assert error is wrong  # noqa: PT017
    finally:
        found = switches()
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(False)
    assert found == before


def test_a_run_without_it_touches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = switches()
    with deterministic(False, CPU):
        assert switches() == before
    assert capsys.readouterr().err == ""


def test_an_operation_without_a_deterministic_form_is_one_line() -> None:
    message = "max_unpooling2d_forward_out does not have a deterministic implementation, but you set"
    with pytest.raises(UserError) as error, deterministic(True, CPU):
        raise RuntimeError(message)
    assert str(error.value) == (
        "train.deterministic: max_unpooling2d_forward_out cannot be repeated bit for bit on cpu; "
        "use train.deterministic=false"
    )
    # PyTorch's own words, so that a change of them is noticed.
    pooled, places = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    with pytest.raises(UserError, match="cannot be repeated"), deterministic(True, CPU):
        torch.nn.functional.max_unpool2d(pooled, places, 2)


def test_cublas_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"CUDA has started already .* `export CUBLAS_WORKSPACE_CONFIG=:4096:8`"):
        prepare_determinism()
    assert VARIABLE not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    make_accelerator(TrainConfig(device="cpu", trackers=()))
    assert VARIABLE not in os.environ
    make_accelerator(TrainConfig(device="cpu", trackers=(), deterministic=True))
    assert os.environ[VARIABLE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare_determinism()  # a second stage of the process
    for value, fine in ((":16:8", True), (":4096:2:16:8", False)):
        monkeypatch.setenv(VARIABLE, value)
        if fine:
            prepare_determinism()
        else:
            with pytest.raises(UserError, match=f"CUBLAS_WORKSPACE_CONFIG is {value}, with which cuBLAS does not"):
                prepare_determinism()


def test_the_module_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with deterministic(True, CPU):
        pass
    with deterministic(True, torch.device("cuda")):
        pass
    on_cpu, on_gpu = capsys.readouterr().err.splitlines()
    assert determinism.COST_ON_CPU in on_cpu
    assert "not measured" in on_gpu
