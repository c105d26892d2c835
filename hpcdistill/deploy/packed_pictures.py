"""The images of a packed set as files: what a model that is to teach from a folder of its pictures translates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpcdistill.data.outputs import check_images_out, save_image
from hpcdistill.data.progress import ProgressBar
from hpcdistill.data.read.domains import DomainImages
from hpcdistill.metrics.real_side import load_translation_index

SIDES = {"AtoB": ("A", "B"), "BtoA": ("B", "A")}  # inputs and outputs, in the folders that the recipe `paired` knows


def unpack_inputs(packed: Path, out: Path, direction: str) -> tuple[Path, Path]:
    """Write what is translated of the set `packed`, as large as it is there, to a folder in `out`.

    Returns it and the folder for what is made of it: `A` and `B` or, with `direction` BtoA, `B` and `A`: the pairs have
    the sides of the set. UserError for a set that is none of images to translate, and where files of others are in the
    way.
    """
    index = load_translation_index(packed, None, "pictures")
    images = DomainImages([packed], [index], index.kind, direction, load_size=1)  # but nothing is resized
    names, (folder, made) = images.names(0), [out / side for side in SIDES[direction]]
    check_images_out(folder, names, [packed], "--out")
    folder.mkdir(parents=True, exist_ok=True)
    with ProgressBar(f"unpacking {packed}", total=len(names), unit="images") as progress:
        for number, name in enumerate(names):
            save_image(folder, name, np.ascontiguousarray(images.stored(0, number)))
            progress.advance()
    images.packed.close()
    return folder, made
