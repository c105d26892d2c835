"""Figures 5 to 7 of the FESD paper, for any networks that translate: what each makes of the same test images.

Images are spread evenly over the set, and the place that is shown magnified is where the input has most contrast
between neighbouring pixels: no network is asked. Both directions are shown where a run has both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hpcdistill.data.test_sets import test_set_digest
from hpcdistill.deploy.candidates import Candidate, check_labels
from hpcdistill.errors import UserError
from hpcdistill.methods.gan_settings import A2B
from hpcdistill.methods.wavelet_kd_settings import ROLES
from hpcdistill.metrics.config import BACKWARDS
from hpcdistill.metrics.pictures import Pictures, first_side
from hpcdistill.metrics.real_side import load_translation_index
from hpcdistill.metrics.run_evaluators import check_size
from hpcdistill.metrics.sample_grid import busiest_crop
from hpcdistill.metrics.trained_translation import DEFAULT_SIZE
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.models.registry import load_generator
from hpcdistill.models.weights_file import generator_file
from hpcdistill.sweep.comparison import Captioned, colour
from hpcdistill.sweep.crop import SMALLEST_CROP, Wanted, check_inside, image_number
from hpcdistill.sweep.demos.base import Box
from hpcdistill.sweep.report import Image
from hpcdistill.sweep.translation_scores import Score, check_one_data_set, score_of
from hpcdistill.training.records import read_result, run_of, run_values

INPUT, TARGET = "input", "target"
SET = "data"  # what the evaluator calls the set


@dataclass(frozen=True)
class Method:
    """One of those that are compared, in one direction."""

    candidate: Candidate
    translator: nn.Module | Pictures
    score: Score | None
    number: int  # its colour

    @property
    def label(self) -> str:
        return self.candidate.label


@dataclass(frozen=True)
class Place:
    """A test image, and the place of it that is magnified."""

    number: int  # in its domain
    name: str
    box: Box


@dataclass(frozen=True)
class Shown:
    """What is shown of one image: the input, the target of a pair, and what each method makes of it."""

    place: Place
    pictures: tuple[Captioned, ...]


def with_teachers_beside(candidates: Sequence[Candidate], which: str) -> list[Candidate]:
    """The candidates, before each student the teachers that its run trained beside it or learned from.

    UserError when there is none at all, or one has the label of another.
    """
    found: list[Candidate] = []
    for candidate in candidates:
        files = _teachers_of(candidate, which)
        for file in files:
            name = f"teacher of {candidate.label}" + (f" ({file.stem})" if len(files) > 1 else "")
            found.append(Candidate(name, str(file), file, load_generator(file)[0]))
        found.append(candidate)
    if len(found) == len(candidates):
        raise UserError("--teachers: none of these is a student whose teacher is in its run's folder or beside it")
    check_labels([candidate.label for candidate in found])
    return found


class TranslationFigures:
    """What some networks make of a packed set's images: which are shown is known at once, `rows` are computed."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        images: Path,
        size: int | None = None,
        direction: str | None = None,
        pictures: int = 3,
        side: int | None = None,
        crops: Sequence[Wanted] = (),
        shown: Sequence[str] = (),
    ) -> None:
        """`pictures` images with places of `side` pixels (a quarter of the image) are chosen, unless some are named.

        `size` and `direction` are the runs' own. UserError for runs that do not belong together, and for images and
        places that are not there, before anything is computed.
        """
        self.candidates, self.images = list(candidates), images
        if taken := next((one.label for one in candidates if one.label in (INPUT, TARGET)), None):
            raise UserError(f"{taken}: the {taken} image is called so, which stands beside; write OTHER_LABEL=MODEL")
        kind = load_translation_index(images, None, "--images").kind
        check_one_data_set(candidates)
        self.size = _agreed(candidates, "size", size, _size_of) or _pictures_side(candidates)
        direction = _agreed(candidates, "direction", direction, _direction_of) or "AtoB"
        self.evaluator = TranslationEvaluator(
            {SET: images}, TranslationProtocol(kind, direction, self.size, "test"), [], None, None
        )
        self.domains = direction[0], direction[-1]
        self._side = min(self.size, side or max(SMALLEST_CROP, self.size // 4))
        self._methods = {backwards: self._columns(backwards) for backwards in (False, True)}
        self.directions = [backwards for backwards, methods in self._methods.items() if methods]
        self.named = bool(crops or shown)
        self._places = self._named_places(crops, shown) if self.named else self._spread(pictures)

    def title(self, backwards: bool) -> str:
        """`A to B`."""
        one, other = self.domains[:: -1 if backwards else 1]
        return f"{one} to {other}"

    def methods(self, backwards: bool) -> list[Method]:
        """The columns of a direction."""
        return self._methods[backwards]

    @cached_property
    def rows(self) -> dict[bool, list[Shown]]:
        """What is shown in each direction that has something. UserError for a network whose output is not finite."""
        return {backwards: found for backwards in self.directions if (found := self._rows(backwards))}

    def _rows(self, backwards: bool) -> list[Shown]:
        places = self._places[backwards]
        numbers = [place.number for place in places]
        made: list[tuple[Method, Tensor]] = []
        for method in self._methods[backwards] if places else ():
            try:
                outputs = self.evaluator.translations(method.translator, SET, numbers, backwards)
            except UserError as error:
                raise UserError(f"{method.label}: {error}") from None
            made.append((method, outputs))
        return [
            Shown(place, tuple(self._pictures(place, backwards, [(method, outputs[row]) for method, outputs in made])))
            for row, place in enumerate(places)
        ]

    def _pictures(self, place: Place, backwards: bool, made: Sequence[tuple[Method, Tensor]]) -> Iterator[Captioned]:
        yield INPUT, self._image(int(backwards), place.number), "", None
        if self.evaluator.paired(SET):
            yield TARGET, self._image(int(not backwards), place.number), "", None
        for method, output in made:
            said = f"{method.score.metric} {method.score.numbers}" if method.score else ""
            yield method.label, _pixels(output), said, colour(method.number)

    def _image(self, domain: int, number: int) -> Image:
        return _pixels(self.evaluator.image(SET, domain, number))

    def _names(self, backwards: bool) -> list[str]:
        """What the images of a direction, and files of their translations, are called."""
        return self.evaluator.test_sets[SET].names(int(backwards))

    def _columns(self, backwards: bool) -> list[Method]:
        """The methods that translate in this direction."""
        digest = test_set_digest(self.images)
        methods = []
        for number, candidate in enumerate(self.candidates, 1):
            translator: nn.Module | Pictures
            if candidate.network is None:
                if backwards:
                    continue
                translator = Pictures(candidate.path, self._names(backwards))
                methods.append(Method(candidate, translator, None, number))
            elif one := _in_direction(candidate, backwards):
                assert one.network is not None
                check_size(one.network, self.size, f"{one.label}: --size ")
                methods.append(Method(one, one.network, score_of(one.path, digest), number))
        return methods

    # --- which images, and where ----------------------------------------------------------------------------------

    def _spread(self, pictures: int) -> dict[bool, list[Place]]:
        """`pictures` images of each direction, evenly spread over the set."""
        found = {}
        for backwards in self.directions:
            names = self._names(backwards)
            shown = min(pictures, len(names))
            numbers = [place * len(names) // shown for place in range(shown)]
            found[backwards] = [self._chosen(backwards, number, names) for number in numbers]
        return found

    def _named_places(self, crops: Sequence[Wanted], shown: Sequence[str]) -> dict[bool, list[Place]]:
        """What the user named, in each direction that has it; UserError for what none has."""
        found: dict[bool, list[Place]] = {}
        words = [(wanted.image, "--crop", wanted) for wanted in crops] + [(word, "--show", None) for word in shown]
        names = {backwards: self._names(backwards) for backwards in self.directions}
        for word, option, wanted in words:
            having = [backwards for backwards in self.directions if _has(word, names[backwards])]
            if not having:  # which says so
                longest = max(names.values(), key=len)
                image_number(word, longest if word.isdecimal() else list(chain(*names.values())), option)
            for backwards in having:
                number = image_number(word, names[backwards], option)
                place = self._chosen(backwards, number, names[backwards])
                if wanted is not None:
                    check_inside(wanted, self.size, self.size)
                    place = replace(place, box=(wanted.top, wanted.left, wanted.side, wanted.side))
                found.setdefault(backwards, []).append(place)
        return {backwards: found.get(backwards, []) for backwards in self.directions}

    def _chosen(self, backwards: bool, number: int, names: Sequence[str]) -> Place:
        return Place(number, names[number], busiest_crop(self._image(int(backwards), number), self._side))


def _agreed(candidates: Sequence[Candidate], name: str, asked: Any, said: Callable[[Any, Any], Any]) -> Any:
    """What is `asked` for or else what all runs say; None where none says anything, UserError where they differ."""
    if asked is not None:
        return asked
    first: tuple[str, Any] | None = None
    for candidate in candidates:
        run = run_values(candidate.path)
        value = said(run.get("data") or {}, run.get("eval") or {})
        if value is not None and first is not None and value != first[1]:
            raise UserError(
                f"{first[0]} has {name} {first[1]} and {candidate.label} {value}; say with --{name} which is shown, or "
                "compare runs of one"
            )
        if value is not None and first is None:
            first = candidate.label, value
    return first[1] if first else None


def _size_of(data: Any, evaluation: Any) -> int | None:
    size = evaluation.get("size") or data.get("crop")
    return int(size) if size else None


def _direction_of(data: Any, _: Any) -> str | None:
    return str(data["direction"]) if data.get("direction") else None


def _pictures_side(candidates: Sequence[Candidate]) -> int:
    """The size where no run says one: that of given pictures, or the literature's."""
    folder = next((candidate.path for candidate in candidates if candidate.network is None), None)
    return first_side(folder) if folder else DEFAULT_SIZE


def _in_direction(candidate: Candidate, backwards: bool) -> Candidate | None:
    """The candidate, or what its run has for the other direction beside it; None where there is none."""
    file = candidate.path
    is_back = file.stem.endswith(BACKWARDS)
    if is_back == backwards:
        return candidate
    other = file.with_name(f"{file.stem}{BACKWARDS}.safetensors")
    if is_back or run_of(file) is None or not other.is_file():
        return None
    return replace(candidate, origin=str(other), path=other, network=load_generator(other)[0])


def _teachers_of(candidate: Candidate, which: str) -> list[Path]:
    """The files of a student's teachers, from a to b: those of its run, else of the run that taught it."""
    folder = run_of(candidate.path)
    if folder is None or not candidate.path.stem.startswith("student"):
        return []
    beside = sorted(candidate.path.parent.glob("*.safetensors"))
    if found := [file for file in beside if not file.stem.endswith(BACKWARDS) and file != candidate.path]:
        return found
    result = read_result(folder) or {}
    # Of a method with a teacher for each direction the one from a to b.
    teacher = result.get("teacher") or (result.get("teachers") or {}).get(ROLES[A2B.name])
    if isinstance(teacher, str) and any((folder.parent / teacher / "generators" / which).glob("*.safetensors")):
        return [generator_file(folder.parent / teacher, which)]
    return []


def _has(word: str, names: Sequence[str]) -> bool:
    return word in names or (word.isdecimal() and int(word) < len(names))


def _pixels(image: Tensor) -> Image:
    """uint8 `[3, H, W]` to `[H, W, 3]`."""
    return np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
