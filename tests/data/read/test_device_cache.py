"""Sets kept on the training device: the host's batches to the bit, made without reading anything back."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import Rgb, noise, write_set
from streams import Batch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcdistill.data.config import DataConfig
from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.data.read import device as device_cache
from hpcdistill.data.read.augmentation import OPERATIONS
from hpcdistill.data.read.device import chosen_cache, free_memory, gathered, steps, symmetric_table, unit_table
from hpcdistill.data.read.reader import open_reader
from hpcdistill.ops.bicubic import downsample_uint8

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = ((48, 36), (24, 60), (36, 36), (60, 24), (24, 24))
SCALES = (2, 3, 4)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NEEDS = {
    "luma": Needs("lr-hr", 4, (4,)),
    "rgb": Needs("lr-hr", 4, (4,), 3),
    "x2": Needs("lr-hr", 2, (2,)),
    "x3": Needs("lr-hr", 3, (3,), 3),
    "two scales": Needs("lr-hr", 4, (2, 4)),
    "hr only": Needs("lr-hr", 2, (), 3),
    "paired": Needs("paired"),
    "unpaired": Needs("unpaired"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "upright": {"flip": False, "rotate": False},
    "flipped": {"rotate": False},
    "rotated": {"flip": False},
    "another size": {"patch": 24, "load_size": 20, "crop": 20},
    "some left out": {"patch": 36, "on_error": "skip", "direction": "BtoA"},
    "epochs": {"samples_per_epoch": 13},
    "held out": {"held_out": 2},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Images of noise in several sizes, and pairs stored in both ways."""
    folder = tmp_path_factory.mktemp("sets")
    hr = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    sr = [{"hr.png": one} | {f"lr{s}.png": downsample_uint8(one, s) for s in SCALES} for one in hr]
    write_set(folder / "lr-hr", "lr-hr", sr, scales=SCALES)
    pairs: list[dict[str, Rgb]] = [{"ab.png": noise(20, 48, seed)} for seed in range(3)]
    pairs += [{"a.png": noise(18, 30, seed), "b.jpg": noise(18, 30, 50 + seed)} for seed in range(4)]
    write_set(folder / "paired", "paired", pairs)
    domains = [{"a.png": noise(20 + n, 30, n)} for n in range(5)] + [{"b.png": noise(30, 24, 90 + n)} for n in range(3)]
    write_set(folder / "unpaired", "unpaired", domains)
    kinds: tuple[Kind, ...] = ("lr-hr", "paired", "unpaired")
    return {kind: folder / kind for kind in kinds}


def opened(sets: dict[Kind, Path], name: str, cache: str, device: torch.device = CPU, **options: Any) -> Any:
    needs = NEEDS[name]
    loop = {"seed": 3, "batch_size": 6} | {
        key: options.pop(key) for key in ("batch_size", "rank", "ranks") & options.keys()
    }
    config = DataConfig(**{"patch": 12, "load_size": 26, "crop": 16, "cache": cache, **options})
    return open_reader([str(sets[needs.kind])], needs, config, **loop, device=device)


def alike(one: Batch, other: Batch) -> bool:
    """Names, order, bits, types and memory."""
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name])
        and one[name].dtype == other[name].dtype == torch.float32
        and one[name].stride() == other[name].stride()
        for name in one
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, given, id=f"{name}, {which}")
        for name, needs in NEEDS.items()
        for which, given in OPTIONS.items()
        if needs.kind == "lr-hr" or "held_out" not in given
    ],
)
def test_the_batches_are_those_from_the_host(sets: dict[Kind, Path], name: str, options: dict[str, Any]) -> None:
    host, kept = (opened(sets, name, cache, **options) for cache in ("none", "device"))
    assert host.samples == kept.samples
    for step in range(12):
        assert alike(host[step], kept[step])


@pytest.mark.parametrize("name", ["luma", "unpaired"])
def test_of_any_rank_from_any_step_in_any_order(sets: dict[Kind, Path], name: str) -> None:
    """300 draws a batch of two ranks: a block of 512 draws ends within most of them; and more than a block."""
    for rank in (0, 1):
        host, kept = (opened(sets, name, cache, batch_size=600, rank=rank, ranks=2) for cache in ("ram", "device"))
        for step in (4, 0, 1, 2, 4, 3):
            assert alike(host[step], kept[step])
        assert all(map(alike, host.loader(5, 8), kept.loader(5, 8)))
    host, kept = (opened(sets, name, cache, batch_size=1100) for cache in ("ram", "device"))
    assert alike(host[1], kept[1])


def test_no_process_reads_ahead(sets: dict[Kind, Path]) -> None:
    """A forked one could not use a GPU."""
    batches = iter(opened(sets, "luma", "device").loader(0, 3, workers=2, pin_memory=True))
    next(batches)
    assert not multiprocessing.active_children()
    assert len(list(batches)) == 2


def test_each_operation_by_numpy() -> None:
    """Transposed first, then rows and columns backwards, as `augmentation` defines it."""
    image = np.random.default_rng(0).integers(0, 256, (3, 9, 11)).astype(np.uint8)
    top, left, side, before = 2, 4, 5, 7  # `before`: elements of other images
    flat = torch.from_numpy(np.concatenate((np.zeros(before, np.uint8), image.ravel(), np.zeros(4, np.uint8))))
    for operation in OPERATIONS[True, True]:
        expected = image[:, top : top + side, left : left + side]
        expected = expected.transpose(0, 2, 1) if operation & 1 else expected
        expected = np.flip(expected, [axis for bit, axis in ((2, 1), (4, 2)) if operation & bit])
        plan = steps(*(np.array([n]) for n in (before + top * 11 + left, 99, 11, operation)), side)
        assert np.array_equal(gathered(flat, torch.from_numpy(plan), counts(3, side), None)[0], expected)


def counts(channels: int, side: int) -> tuple[torch.Tensor, ...]:
    numbers = torch.arange(side)
    return torch.arange(channels)[:, None, None], numbers[:, None], numbers


def test_addresses_of_more_than_32_bits() -> None:
    """A set of 3 GB, of which the system gives us only the page that is written to."""
    flat = torch.from_numpy(np.empty(3 << 30, np.uint8))
    first = flat.numel() - 16
    flat[first:] = torch.arange(16, dtype=torch.uint8)
    plan = steps(*(np.array([n]) for n in (first, 16, 4, 0)), 4)
    assert gathered(flat, torch.from_numpy(plan), counts(1, 4), None).ravel().tolist() == list(range(16))


def nearest_float32(value: Fraction) -> np.float32:
    """The float32 that is nearest to `value`, found in exact fractions."""
    about = np.float32(float(value))
    near = [about, np.nextafter(about, np.float32(-2)), np.nextafter(about, np.float32(2))]
    return min(near, key=lambda one: abs(Fraction(float(one)) - value))


def test_what_8_bits_become_is_rounded_once() -> None:
    """Division, not multiplication by a rounded reciprocal, which a GPU does and which is off for many of them."""
    assert unit_table().tolist() == [nearest_float32(Fraction(n, 255)) for n in range(256)]
    shifted = [nearest_float32(Fraction(float(nearest_float32(Fraction(2 * n, 255)))) - 1) for n in range(256)]
    assert symmetric_table().tolist() == shifted
    values = np.arange(256, dtype=np.float32)
    assert (values * np.float32(1 / 255) != values / np.float32(255)).sum() > 50


# Nothing waits for the device.


class Operations(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


READS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
    "repeat_interleave",
)


@pytest.mark.parametrize("name", NEEDS)
def test_nothing_is_read_back_and_each_role_is_read_once(sets: dict[Kind, Path], name: str) -> None:
    """No scalar read, and a handful of kernels: with a GPU, launching them is what a batch costs."""
    batches = iter(opened(sets, name, "device").loader(0, 40))
    next(batches)
    with Operations() as operations:
        for _ in range(30):  # of 6 draws: within the first block, whose plan has been sent
            next(batches)
    assert not any(operations.seen[read] for read in READS)
    needs = NEEDS[name]
    colour = needs.channels == 3 or needs.kind != "lr-hr"
    roles = 1 + len(needs.lr_scales) if needs.kind == "lr-hr" else 1  # both sides of a pair at once
    assert operations.seen["take"] == 30 * roles * (1 + colour)  # and once the table
    assert operations.seen["addcmul"] == 30 * roles * 3
    assert operations.seen["_to_copy"] == 30 * roles * colour  # to integers; nothing is sent


def test_what_is_counted_would_be_seen() -> None:
    with Operations() as operations:
        float(torch.ones(1) + 1)
    assert operations.seen["_local_scalar_dense"] == 1


@pytest.mark.parametrize("name", NEEDS)
def test_a_device_whose_memory_cannot_be_read(sets: dict[Kind, Path], name: str) -> None:
    """Torch's device `meta` holds no numbers: asking for one is an error, also where it is no operation."""
    kept, host = opened(sets, name, "device", torch.device("meta")), opened(sets, name, "none")
    for step in (0, 100):  # of two blocks
        expected = host[step]
        for key, value in kept[step].items():
            assert (value.device.type, value.shape, value.dtype) == ("meta", expected[key].shape, torch.float32)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", NEEDS)
def test_a_gpu_gives_the_same_and_is_not_waited_for(sets: dict[Kind, Path], name: str) -> None:
    host, kept = opened(sets, name, "none"), opened(sets, name, "device", torch.device("cuda", 0))
    batches = iter(kept.loader(0, 100))
    found = [next(batches)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        found += [next(batches) for _ in range(99)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, batch in enumerate(found):
        assert alike({key: value.cpu() for key, value in batch.items()}, host[step])


# Whether it fits.


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many bytes are free on the device."""

    def free(size: int) -> None:
        monkeypatch.setattr(device_cache, "free_memory", lambda device: size)

    return free


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("luma", 4 * (1 + 1 / 16)),  # bytes a pixel of HR: float32, and the LR
        ("rgb", 3 * (1 + 1 / 16)),
        ("unpaired", 8 * 3 * 26 * 26),
    ],
)
def test_where_it_does_not_fit_it_is_kept_in_ram(
    sets: dict[Kind, Path], name: str, needed: float, memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of what is free."""
    if NEEDS[name].kind == "lr-hr":
        needed *= sum(height * width for height, width in SIZES)
    memory(2 * int(needed))
    assert opened(sets, name, "device")._on_device
    assert not capsys.readouterr().err
    memory(2 * int(needed) - 2)
    kept = opened(sets, name, "device")
    assert not kept._on_device
    [line] = capsys.readouterr().err.splitlines()
    assert "data.cache: device" in line
    assert "kept in ram" in line
    assert alike(kept[3], opened(sets, name, "none")[3])


def test_auto_is_the_device_on_a_gpu_with_room(
    memory: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says which; on a CPU nothing changes and nothing is said."""
    memory(8 << 30)
    assert chosen_cache("auto", 1, CPU) == "none"
    assert [chosen_cache(name, 1 << 40, CUDA) for name in ("none", "ram")] == ["none", "ram"]
    assert not capsys.readouterr().err
    assert chosen_cache("auto", 2 << 30, CUDA) == "device"
    [line] = capsys.readouterr().err.splitlines()
    assert "2.0 GiB of the 8.0 GiB that are free on cuda, are kept there" in line
    assert chosen_cache("auto", (2 << 30) + 1, CUDA) == "none"
    [line] = capsys.readouterr().err.splitlines()
    assert "more than 25%: they are read at every draw" in line


def test_free_memory_is_shared_by_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hpcdistill.data.read.device.psutil.virtual_memory", lambda: type("Free", (), {"available": 900})
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for ranks in ("1", "2", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append((free_memory(CPU), free_memory(CUDA)))
    assert found == [(900, 800), (450, 800), (300, 400)]
