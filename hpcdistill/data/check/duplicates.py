"""Images that packed data sets hold more than once, by the pixels they decode to and not by their files.

What is compared is a sample: the HR image, one image of a domain, or a pair, which is a duplicate when both of its
halves are equal. A side of a pair alone is only counted: edge maps and label maps of different photographs may well be
equal. A duplicate is no fault of the data set, but one in the images a model is evaluated on makes its score one of
memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcdistill.data.check.verify import Pixels, Report

_SIDES = ("a", "b")


@dataclass(frozen=True)
class Occurrence:
    """Where an image, or a pair, lies."""

    folder: Path
    recipe: str
    split: str
    key: str
    source: str  # the image's name before it was packed
    role: str  # hr, a, b, or "pair"


@dataclass(frozen=True)
class Duplicate:
    """Equal images; `occurrences` has two or more, in the order of the data sets and their samples.

    `repeated`: all in one data set, or in training splits only. `leak`: across splits, or across data sets.
    """

    kind: Literal["repeated", "leak"]
    occurrences: tuple[Occurrence, ...]

    def line(self) -> str:
        """One line for people."""
        first, *others = self.occurrences
        # Of a leak, what is worth saying is where it leads.
        other = next((occurrence for occurrence in others if occurrence.folder != first.folder), others[0])
        what = "pair" if first.role == "pair" else "image"
        where = "" if other.folder == first.folder else f" of {other.folder}"
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"{self.kind}: {first.split} {what} '{first.source}' of {first.folder} is also "
            f"{other.split} {what} '{other.source}'{where}{more}"
        )


@dataclass(frozen=True)
class Findings:
    """All duplicates of some data sets."""

    duplicates: tuple[Duplicate, ...]  # leaks first
    sides: dict[str, dict[str, int]]  # a, b -> groups of equal sides of pairs that differ: {"repeated": n, "leak": n}

    def count(self, kind: Literal["repeated", "leak"]) -> int:
        """The number of groups of a kind."""
        return sum(duplicate.kind == kind for duplicate in self.duplicates)

    def count_in(self, report: Report, kind: Literal["repeated", "leak"]) -> int:
        """The number of groups of a kind that an image of `report` is in."""
        return sum(
            duplicate.kind == kind and any(occurrence.folder == report.folder for occurrence in duplicate.occurrences)
            for duplicate in self.duplicates
        )


def find_duplicates(reports: Sequence[Report]) -> Findings:
    """Equal images inside and between the data sets of `reports`; copies of one data set are compared once."""
    different = list({report.digest: report for report in reversed(reports)}.values())[::-1]
    groups = _groups((report, pixels, role, digest) for report, pixels, role, digest in _samples(different))
    duplicates = [Duplicate(_kind(occurrences), tuple(occurrences)) for occurrences in groups]
    whole = {
        frozenset((occurrence.folder, occurrence.key) for occurrence in duplicate.occurrences)
        for duplicate in duplicates
    }
    paired = [report for report in different if report.kind == "paired"]
    sides = {}
    for side in _SIDES:
        halves = _groups(
            (report, pixels, side, pixels.digests[side])
            for report in paired
            for pixels in report.pixels
            if side in pixels.digests
        )
        kinds = Counter(
            _kind(occurrences)
            for occurrences in halves
            if frozenset((occurrence.folder, occurrence.key) for occurrence in occurrences) not in whole
        )
        sides[side] = {"repeated": kinds["repeated"], "leak": kinds["leak"]}
    return Findings(tuple(sorted(duplicates, key=lambda duplicate: duplicate.kind)), sides)


_Item = tuple[Report, Pixels, str, bytes]


def _samples(reports: Sequence[Report]) -> Iterator[_Item]:
    """What is compared, with its role and digest."""
    for report in reports:
        for pixels in report.pixels:
            if report.kind != "paired":
                yield from ((report, pixels, role, digest) for role, digest in pixels.digests.items())
            elif len(pixels.digests) == len(_SIDES):
                yield report, pixels, "pair", b"".join(pixels.digests[side] for side in _SIDES)


def _groups(items: Iterator[_Item]) -> list[list[Occurrence]]:
    """The occurrences of each digest that comes more than once, in the order of the first."""
    occurrences: dict[bytes, list[tuple[Report, Pixels, str]]] = defaultdict(list)
    for report, pixels, role, digest in items:
        occurrences[digest].append((report, pixels, role))
    return [
        [
            Occurrence(report.folder, report.recipe, report.split, pixels.sample.key, pixels.sample.source, role)
            for report, pixels, role in found
        ]
        for found in occurrences.values()
        if len(found) > 1
    ]


def _kind(occurrences: Sequence[Occurrence]) -> Literal["repeated", "leak"]:
    one_set = len({occurrence.folder for occurrence in occurrences}) == 1
    return "repeated" if one_set or {occurrence.split for occurrence in occurrences} == {"train"} else "leak"
