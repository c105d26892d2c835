"""Evaluation over ranks: each image once, the same numbers as one process, and an end that every rank hears of."""

from __future__ import annotations

import contextlib
import errno
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from packed_sets import noise, write_set
from PIL import Image
from processes import launch
from torch import Tensor, nn

from hpcdistill import evaluate
from hpcdistill.data.config import DataConfig
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.metrics import run_evaluators, trained_translation
from hpcdistill.metrics.config import EvalConfig
from hpcdistill.metrics.run_evaluators import open_evaluator
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.models import registry
from hpcdistill.training.batch_norm import synchronise
from hpcdistill.training.evaluation import Evaluation, EvaluationStopped, until_stopped

SIDE = 16
SIZES = (1, 2, 5)  # images; fewer than ranks, as many, and a number that nothing divides
KINDS = ("sr", "paired")
pytestmark = pytest.mark.distributed


class Seen(nn.Module):
    """A network of random weights with BatchNorm, left in training mode, that counts the images it is given.

    `fault(image)` is asked for each and may change what comes out.
    """

    takes, channels = "image", 3

    def __init__(self, kind: str, fault: Callable[[Tensor], str | None] = lambda image: None) -> None:
        super().__init__()
        self.sr, self.fault = kind == "sr", fault
        if self.sr:
            self.takes, self.channels = "lr", 1
        torch.manual_seed(5)
        width = self.channels
        self.body = nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5))
        self.last = nn.Conv2d(6, width * (4 if self.sr else 1), 3, padding=1)
        self.body[1].running_mean.uniform_(-0.2, 0.2)
        synchronise(self)
        self.seen: Counter[str] = Counter()

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        faults = [self.fault(one) for one in image]
        self.seen.update(str(one.double().sum().item()) for one in image)
        output: Tensor = 0.3 * self.last(self.body(image))
        if self.sr:
            output = nn.functional.pixel_shuffle(output, 2) + 0.5
        if "nan" in faults:
            output[faults.index("nan")] = torch.nan
        return output[..., 1:] if "size" in faults else output


class RandomFeatures:
    """Takes Inception's place: a small random network, which counts its images."""

    frechet_name, kernel_name, origin, digest, dimensions = "frechet", "kernel", "random", "7", 4

    def __init__(self) -> None:
        torch.manual_seed(9)
        self.network = nn.Conv2d(3, 4, 5, stride=3).requires_grad_(False)
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        found: Tensor = self.network(images.float() / 255).relu().mean(dim=(2, 3))
        return found


class Distance(nn.Module):
    """Takes LPIPS's place."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean(dim=(1, 2, 3))

    def check_size(self, height: int, width: int) -> None:
        pass


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`<kind>-<count>` for every kind and size; no weights anywhere but the stand-ins above."""
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr(run_evaluators, "lpips_if_there", lambda device: Distance())
    monkeypatch.setattr(run_evaluators, "features_if_there", None)  # `opened` sets it; put back after the test
    for count in SIZES:
        (tmp_path / f"sr-{count}").mkdir()
        for number in range(count):
            Image.fromarray(noise(20, 24, number)).save(tmp_path / f"sr-{count}" / f"image{number}.png")
        pairs = [{"a.png": noise(20, 18, number), "b.png": noise(20, 18, number + 50)} for number in range(count)]
        write_set(tmp_path / f"paired-{count}", "paired", pairs)
    return tmp_path


def opened(folder: Path, kind: str, generators: dict[str, Seen], features: Any = None, samples: int = 0) -> Any:
    """The evaluator that a run would make."""
    run_evaluators.features_if_there = lambda name, device: features  # type: ignore[assignment]
    needs = Needs("lr-hr", scale=2, channels=1) if kind == "sr" else Needs("paired")
    data = DataConfig(eval={"set": str(folder)}, crop=SIDE)
    return open_evaluator(data, EvalConfig(samples=samples), "set", needs, dict(generators), Accelerator(cpu=True))


def pair_of(kind: str, **options: Any) -> dict[str, Seen]:
    return {"student": Seen(kind, **options), "teacher": Seen(kind, **options)}


def measure(sets: Path, kind: str, count: int) -> tuple[Evaluation, Counter[str], int, list[Any]]:
    """An evaluation, twice with one evaluator; which images the student saw in the second, and the real side's."""
    generators, features = pair_of(kind), RandomFeatures() if count > 1 else None
    made = opened(sets / f"{kind}-{count}", kind, generators, features)
    made(generators, Accelerator(cpu=True))
    images = features.images if features else 0
    generators["student"].seen.clear()
    evaluation = made(generators, Accelerator(cpu=True))
    rows = []
    if kind == "paired":
        rows = [list(row.values()) for row in made.evaluator.evaluate(generators["teacher"], "set").per_image]
    return evaluation, generators["student"].seen, images, rows


def written(folder: Path, name: str, ranks: int) -> list[Any]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def forget_features(sets: Path) -> None:
    for file in (sets / "root" / "features").glob("*"):
        file.unlink()


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_image_once_and_the_same_numbers(sets: Path, ranks: int) -> None:
    expected = {(kind, count): measure(sets, kind, count) for kind in KINDS for count in SIZES}
    forget_features(sets)

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        found = []
        for kind, count in expected:
            evaluation, seen, images, rows = measure(sets, kind, count)
            found.append([evaluation.metrics, seen, images, rows])
        (sets / f"found-{rank}.json").write_text(json.dumps(found))

    assert launch(ranks, work) == [0] * ranks
    found = written(sets, "found", ranks)
    for number, ((kind, count), (evaluation, seen, images, rows)) in enumerate(expected.items()):
        one = found[0][number]
        for rank in range(1, ranks):
            assert (found[rank][number][0], found[rank][number][3]) == (one[0], one[3])  # to the bit
        assert one[0] == pytest.approx(evaluation.metrics, rel=1e-6)
        assert list(one[0]) == list(evaluation.metrics)
        assert [row[0] for row in one[3]] == [row[0] for row in rows]
        assert [row[1:] for row in one[3]] == [pytest.approx(row[1:], rel=1e-6) for row in rows]
        together: Counter[str] = sum((Counter(each[number][1]) for each in found), Counter())
        assert together == seen
        assert set(seen.values()) == {1}
        assert len(seen) == count, kind
        # Features: of each real image once, of each output of two generators once.
        assert sum(each[number][2] for each in found) == images == (3 * count if kind == "paired" and count > 1 else 0)
        assert max(sum(each[number][1].values()) for each in found) == -(-count // ranks)


def test_sample_pictures_are_rank_0_s(sets: Path) -> None:
    expected = {}
    for kind in KINDS:
        generators = pair_of(kind)
        made = opened(sets / f"{kind}-5", kind, generators, samples=3)
        expected[kind] = made(generators, Accelerator(cpu=True)).pictures

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        for kind, pictures in expected.items():
            generators = pair_of(kind)
            made = opened(sets / f"{kind}-5", kind, generators, samples=3)
            found = made(generators, Accelerator(cpu=True)).pictures
            assert list(found) == (list(pictures) if rank == 0 else [])
            for name in found:
                np.testing.assert_allclose(found[name].astype(float), pictures[name].astype(float), atol=1)

    assert all(expected.values())
    assert launch(2, work) == [0, 0]


def fault_of(image: np.ndarray[Any, Any], fault: str) -> Callable[[Tensor], str | None]:
    """The fault for that 8-bit image alone."""
    wanted = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 127.5 - 1
    return lambda given: fault if torch.equal(given, wanted) else None


def raised(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_rank_s_failure_is_every_rank_s(sets: Path, ranks: int) -> None:
    """Image 1 belongs to rank 1: an output of another size, one that is not finite, and a file that is damaged."""
    resized = np.asarray(Image.fromarray(noise(20, 18, 1)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    second = [0]

    def second_call(image: Tensor) -> str | None:
        """For SR, which is given one image at a time: rank 1's first is the set's second."""
        return "nan" if second[0] else None

    def messages(rank: int, ranks: int) -> list[str]:
        accelerator = Accelerator(cpu=True)
        found = []
        for fault in ("size", "nan"):
            generators = pair_of("paired", fault=fault_of(resized, fault))
            made = opened(sets / "paired-5", "paired", generators, RandomFeatures())
            found.append(raised(lambda made=made, generators=generators: made(generators, accelerator)))
            assert all(generator.training for generator in generators.values())
            good = pair_of("paired")
            assert made(good, accelerator).metrics.keys() == {
                f"{name}/set/{metric}" for name in good for metric in ("frechet", "kernel", "psnr", "l1", "lpips")
            }
        second[0] = rank == 1 or ranks == 1
        generators = pair_of("sr", fault=second_call)
        made = opened(sets / "sr-2", "sr", generators)
        found.append(raised(lambda: made(generators, accelerator)))
        assert all(generator.training for generator in generators.values())
        second[0] = False
        assert len(made(generators, accelerator).metrics) == 4
        for kind in KINDS:
            found.append(raised(lambda kind=kind: opened(sets / f"broken-{kind}", kind, pair_of(kind))))
        return found

    broken = io.BytesIO()
    Image.fromarray(noise(20, 18, 1)).save(broken, "PNG")
    content = bytearray(broken.getvalue())
    content[len(content) // 2] ^= 255
    (sets / "broken-sr").mkdir()
    Image.fromarray(noise(20, 24, 0)).save(sets / "broken-sr" / "image0.png")
    (sets / "broken-sr" / "image1.png").write_bytes(bytes(content[: len(content) // 2]))
    good = {"a.png": noise(20, 18, 0), "b.png": noise(20, 18, 7)}
    write_set(sets / "broken-paired", "paired", [good, {**good, "a.png": bytes(content)}, good])

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        (sets / f"messages-{rank}.json").write_text(json.dumps(messages(rank, ranks)))

    assert launch(ranks, work) == [0] * ranks
    found = written(sets, "messages", ranks)
    assert found == [found[0]] * ranks
    size, nan, sr, file, packed = found[0]
    assert "evaluate a network that keeps their size" in size
    assert nan.startswith("image1: the generator's output is not finite")
    assert sr.startswith("image1: the network's output is not finite")
    assert "image1.png" in file
    assert "image1" in packed or "000001" in packed


def test_a_failure_counts_more_than_a_stop() -> None:
    """Of several failures that of the first rank; a system's error keeps its number."""
    endings = [EvaluationStopped(), OSError(errno.EIO, "input/output error", "shard-00000.tar"), UserError("later")]

    def work(rank: int, ranks: int) -> None:
        Accelerator(cpu=True)
        with pytest.raises(OSError, match=r"shard-00000\.tar") as caught, shared_work(ranks, "cpu"):
            raise endings[rank]
        assert caught.value.errno == errno.EIO
        with pytest.raises(EvaluationStopped), shared_work(ranks, "cpu"):
            list(until_stopped([], lambda: rank == 0))
        with shared_work(ranks, "cpu"):
            pass

    assert launch(3, work) == [0, 0, 0]


class Stop:
    """Asked `at` times it says no, and then yes."""

    def __init__(self, at: int | None) -> None:
        self.at, self.asked = at, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.at is not None and self.asked > self.at


@pytest.mark.parametrize(("ranks", "stopped"), [(1, 0), (2, 0), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_on_one_rank_ends_it_on_all(sets: Path, kind: str, ranks: int, stopped: int) -> None:
    """Wherever it comes; the evaluation that is then made from the start is whole."""
    expected = {count: measure(sets, kind, count)[0].metrics for count in (2, 5)}

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        for count in (2, 5):
            generators = pair_of(kind)

            def evaluator(generators: Any = generators, count: int = count) -> Any:
                accelerator.wait_for_everyone()
                if rank == 0:
                    forget_features(sets)
                accelerator.wait_for_everyone()
                return opened(sets / f"{kind}-{count}", kind, generators, RandomFeatures(), samples=2)

            asked = Stop(None)
            assert evaluator()(generators, accelerator, asked).metrics == pytest.approx(expected[count], rel=1e-6)
            # Where the stopped rank is asked, which all must know: the first and the last places, and between.
            places = int(accelerator.reduce(torch.tensor(asked.asked if rank == stopped else 0), "sum"))
            if ranks == 1 and count == 5:
                # Once at each beginning, then before each image (SR), or each four images and each subset of KID.
                sr = 2 * (1 + 5) + (1 + 2)
                assert places == (sr if kind == "sr" else 2 * ((1 + 2) + (1 + 100)) + (1 + 2) + 2 * (1 + 1))
            for at in sorted({0, 1, 2, 3, 4, 5, 6, places // 2, places - 1} & set(range(places))):
                made = evaluator()
                with pytest.raises(EvaluationStopped):
                    made(generators, accelerator, Stop(at if rank == stopped else None))
                assert all(part.training for generator in generators.values() for part in generator.modules())
                if at in (0, 4, places - 1):
                    again = made(generators, accelerator, Stop(None))
                    assert again.metrics == pytest.approx(expected[count], rel=1e-6)
        (sets / f"done-{rank}").touch()

    assert launch(ranks, work) == [0] * ranks
    assert len(list(sets.glob("done-*"))) == ranks


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluate_command_over_ranks(sets: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 prints what one process prints, the others nothing; every output is written by one of them."""
    monkeypatch.setattr(trained_translation, "features_if_there", lambda name, device: RandomFeatures())
    monkeypatch.setattr(trained_translation, "lpips_if_there", lambda device: Distance())
    monkeypatch.setattr(registry, "load_generator", lambda path: (Seen(kind), {}))
    monkeypatch.setattr(Seen, "scale", 2, raising=False)
    (sets / "net.safetensors").touch()

    def work(rank: int, ranks: int) -> None:
        torch.set_num_threads(1)
        options = ["--device", "cpu", "--json", "--save-images", str(sets / f"out{ranks}")]
        options += ["--size", str(SIDE)] if kind == "paired" else []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert evaluate.main([str(sets / "net.safetensors"), "--data", str(sets / f"{kind}-5"), *options]) == 0
        (sets / f"said{ranks}-{rank}.json").write_text(said.getvalue() or "null")

    def images(ranks: int) -> dict[str, Any]:
        return {file.name: np.asarray(Image.open(file)).astype(float) for file in (sets / f"out{ranks}").iterdir()}

    reports, drawn = {}, {}
    for ranks in (1, 2):
        assert launch(ranks, work) == [0] * ranks
        reports[ranks], *others = written(sets, f"said{ranks}", ranks)
        assert others == [None] * (ranks - 1)
        drawn[ranks] = images(ranks)
        forget_features(sets)
    one, two = reports[1], reports[2]
    assert [row["name"] for row in two["per_image"]] == [f"image{number}" for number in range(5)]
    assert two.keys() == one.keys()
    for rows in zip(two.pop("per_image"), one.pop("per_image"), strict=True):
        assert rows[0].pop("name") == rows[1].pop("name")
        assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert len(drawn[1]) == 5
    assert drawn[2].keys() == drawn[1].keys()
    for name, image in drawn[1].items():
        np.testing.assert_allclose(drawn[2][name], image, atol=1)
