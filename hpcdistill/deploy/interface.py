"""What a deployed network eats and gives, in a few words that travel with it: range, order and sizes.

No runtime checks them: 0 .. 255 in place of 0 .. 1, or BGR, go in without a word and a wrong picture comes out.
"""

from __future__ import annotations

from hpcdistill.deploy.description import Description
from hpcdistill.errors import plural


def in_words(about: Description) -> dict[str, str]:
    """Short texts by what they are of: input, output, sizes, origin, for files that people look into."""
    axes = f"[batch, {about.channels}, height, width], float32"
    enlarged = "" if about.scale == 1 else f"{about.scale} times as high and wide, "
    clamped = ", not clamped" if about.colour == "luma" else ""
    texts = {
        "task": about.task + ("" if about.scale == 1 else f" x{about.scale}"),
        "input": f"{axes}: {_values(about)}",
        "output": f"as the input, {enlarged}nominally in the same range{clamped}",
        "sizes": sizes_in_words(about),
        "network": about.network,
        "method": about.method + ("" if about.steps is None else f", {plural(about.steps, 'step')}"),
        "training_data": about.data,
        "licence": about.licence,
    }
    if about.run:
        texts["run"] = about.run
    return texts


def sizes_in_words(about: Description) -> str:
    """What heights and widths it takes."""
    least = f"of {plural(about.smallest, 'pixel')} or more"
    return f"any height and width {least}" if about.multiple == 1 else f"multiples of {about.multiple}, {least}"


def _values(about: Description) -> str:
    if about.colour == "luma":
        return "luma Y of BT.601, studio swing: (16 + 65.481 R + 128.553 G + 24.966 B) / 255 for R, G, B in [0, 1]"
    return f"R, G, B in this order, in [{about.low:g}, {about.high:g}]"
