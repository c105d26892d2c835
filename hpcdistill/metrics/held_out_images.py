"""The images that `data.held_out` keeps out of training, as a test set: whole, with their packed LR images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcdistill.data import held_out
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.fetch.transfer import shown
from hpcdistill.data.index import load_index
from hpcdistill.errors import UserError
from hpcdistill.metrics.sr_test_sets import Image, PackedTestSet, SRImages


class HeldOutImages(SRImages):
    """What `held_out.without` leaves out of the packed sets at `places`, in their order."""

    def __init__(self, places: Sequence[str], count: int, scale: int) -> None:
        """UserError for an address, a set without this scale, and a `count` that leaves nothing to train on."""
        if remote := next((place for place in places if is_remote(place)), None):
            raise UserError(
                f"{shown(remote)}: data.held_out reads whole images from folders; copy the set here first with "
                "`python shards/stage.py ADDRESS --to FOLDER`"
            )
        sets = [PackedTestSet(Path(place), scale) for place in places]
        held = held_out.numbered([load_index(Path(place)) for place in places], count)
        self._images = [(images, index) for images, chosen in zip(sets, held, strict=True) for index in chosen]
        names = [images.names[index] for images, index in self._images]
        if len(set(names)) < len(names):  # two sets may have a 0001.png each
            names = [f"{number:03d}-{name}" for number, name in enumerate(names)]
        super().__init__(Path(places[0]), scale, names, ", ".join(dict.fromkeys(images.lr for images in sets)))

    def is_gray(self, index: int) -> bool:
        images, place = self._images[index]
        return images.is_gray(place)

    def read(self, index: int) -> tuple[str, Image, Image]:
        images, place = self._images[index]
        _, hr, lr = images.read(place)
        return self.names[index], hr, lr
