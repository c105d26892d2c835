"""Images held out of training: which, by hand; that no reader touches them; that nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from packed_sets import Rgb, encode, noise, numbered, write_set
from streams import LUMA, RGB, SIDE, lr_hr, numbers, same

from hpcdistill.data import held_out
from hpcdistill.data.config import DataConfig
from hpcdistill.data.read.reader import Reader, open_reader
from hpcdistill.errors import UserError
from hpcdistill.metrics.held_out_images import HeldOutImages


def opened(places: Path | Sequence[Path], held: int, **options: object) -> Reader:
    loop = {name: options.pop(name) for name in ("batch_size", "rank", "ranks") if name in options}
    config = DataConfig(**{"patch": 8, "rotate": False, "held_out": held, **options})
    places = [places] if isinstance(places, Path) else places
    return open_reader([str(place) for place in places], RGB, config, 3, **{"batch_size": 2, **loop})


def damaged(sample: dict[str, Rgb]) -> dict[str, bytes]:
    """Files whose sizes can be told, but not their pixels: whoever decodes one ends with an error."""
    return {suffix: encode(noise(*image.shape[:2], 5), suffix)[:60] for suffix, image in sample.items()}


@pytest.mark.parametrize(
    ("total", "count", "chosen"),
    [(10, 0, []), (10, 1, [5]), (10, 2, [2, 7]), (3, 2, [0, 2]), (490, 4, [61, 183, 306, 428])],
)
def test_they_are_the_middles_of_equal_parts(total: int, count: int, chosen: list[int]) -> None:
    assert held_out.positions(total, count) == chosen


def test_any_number_of_them_is_as_many_different_ones() -> None:
    for total in range(1, 40):
        for count in range(total):
            chosen = held_out.positions(total, count)
            assert len(set(chosen)) == count
            assert all(0 <= place < total for place in chosen)


@pytest.mark.parametrize("count", [4, 5])
def test_something_must_be_left_to_train_on(count: int) -> None:
    with pytest.raises(UserError, match=f"data.held_out={count}: the training sets have 4 images, so none is left"):
        held_out.positions(4, count)


@pytest.mark.parametrize("reader", ["indexed", "stream"])
def test_something_usable_must_be_left(tmp_path: Path, reader: str) -> None:
    """The middle one of three is held out, and the others are smaller than the patch."""
    write_set(tmp_path, "lr-hr", lr_hr([numbered(side, side, side) for side in (8, 16, 8)]), scales=(2, 4))
    with pytest.raises(UserError):
        opened(tmp_path, 1, patch=12, on_error="skip", reader=reader)


@pytest.mark.parametrize(
    "options", [*({"cache": one} for one in ("none", "ram", "device")), {"reader": "stream"}], ids=str
)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("first", [0, 3])
def test_no_reader_decodes_or_delivers_one(
    tmp_path: Path, options: dict[str, str], rank: int, ranks: int, first: int
) -> None:
    """The two of ten are damaged: decoding one would raise. Every rank has the rest, also when it goes on at step 3."""
    samples: list[dict[str, Rgb] | dict[str, bytes]] = list(lr_hr([numbered(SIDE, SIDE, n) for n in range(10)]))
    for place in (2, 7):
        samples[place] = damaged(samples[place])  # type: ignore[arg-type]
    write_set(tmp_path, "lr-hr", samples, scales=(2, 4))
    reader = opened(tmp_path, 2, rank=rank, ranks=ranks, **options)
    assert reader.samples == 8
    seen = {number for batch in reader.loader(first, first + 40) for number in numbers(batch)}
    assert seen == {0, 1, 3, 4, 5, 6, 8, 9}


def test_a_damaged_one_that_is_trained_on_does_end_the_reader(tmp_path: Path) -> None:
    """What the test above would see."""
    samples = lr_hr([numbered(SIDE, SIDE, n) for n in range(10)])
    write_set(tmp_path, "lr-hr", [*samples[:3], damaged(samples[3]), *samples[4:]], scales=(2, 4))
    with pytest.raises(UserError, match="image3"):
        opened(tmp_path, 2, cache="ram")


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_training_is_that_of_the_sets_without_them(tmp_path: Path, cache: str) -> None:
    """Two joined sets of 4 and 5: of nine, three are held out, the second of each third."""
    one, other = [lr_hr([noise(24, 24, start + n) for n in range(size)]) for start, size in ((0, 4), (9, 5))]
    for name, samples in (("one", one), ("other", other)):
        write_set(tmp_path / name, "lr-hr", samples, scales=(2, 4))
    write_set(tmp_path / "less", "lr-hr", [one[0], one[2], one[3]], scales=(2, 4))
    write_set(tmp_path / "fewer", "lr-hr", [other[1], other[2], other[4]], scales=(2, 4))
    found = opened([tmp_path / "one", tmp_path / "other"], 3, cache=cache)
    expected = opened([tmp_path / "less", tmp_path / "fewer"], 0, cache=cache)
    assert same(list(found.loader(0, 12)), list(expected.loader(0, 12)))


def test_they_are_evaluated_whole_with_their_packed_lr(tmp_path: Path) -> None:
    one, other = [lr_hr([noise(24, 32, start + n) for n in range(size)]) for start, size in ((0, 4), (9, 5))]
    for name, samples in (("one", one), ("other", other)):
        write_set(tmp_path / name, "lr-hr", samples, scales=(2, 4))
    images = HeldOutImages([str(tmp_path / "one"), str(tmp_path / "other")], 3, LUMA.scale)
    assert len(images) == 3
    for (name, hr, lr), (expected_name, sample) in zip(
        images, [("000-image1", one[1]), ("001-image0", other[0]), ("002-image3", other[3])], strict=True
    ):
        assert name in (expected_name, expected_name.partition("-")[2])
        np.testing.assert_array_equal(hr, sample["hr.png"])
        np.testing.assert_array_equal(lr, sample["lr4.png"])


def test_names_that_clash_are_numbered(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_set(tmp_path / name, "lr-hr", lr_hr([noise(24, 24, n) for n in range(2)]), scales=(2, 4))
    images = HeldOutImages([str(tmp_path / "one"), str(tmp_path / "other")], 2, 4)
    assert images.names == ("000-image1", "001-image1")


def test_an_address_cannot_be_evaluated_on() -> None:
    with pytest.raises(UserError, match=r"data\.held_out reads whole images from folders"):
        HeldOutImages(["https://data.example/packed"], 2, 4)


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_translation_names_a_validation_split_instead(kind: str) -> None:
    held_out.check_kind(0, kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.held_out=3: is for super-resolution"):
        held_out.check_kind(3, kind)  # type: ignore[arg-type]
