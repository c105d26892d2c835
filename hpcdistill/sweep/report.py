"""A report: one HTML page made of plain data. It needs no network, no other file and no script.

A `Page` has sections, a section has blocks (`Text`, `Cards`, `Table`, `Charts`, `Crops`, `Facts`, `Commands`,
`Download`); the
template report.html.j2 has a macro for each, of the class's name. All text is escaped.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image as PillowImage

from hpcdistill.data.images import encode_png
from hpcdistill.storage import write_bytes
from hpcdistill.sweep.charts import DASHES, Chart, chart_svg

Image = NDArray[np.uint8]  # [H, W, 3] RGB

TILES = 7  # pictures side by side
_OVERVIEW_QUALITY = 82  # JPEG; an overview only shows where the crops come from


@dataclass(frozen=True)
class Text:
    """Paragraphs; `tone` "caution" sets them in a box that is not overlooked."""

    paragraphs: tuple[str, ...]
    tone: Literal["plain", "caution"] = "plain"


@dataclass(frozen=True)
class Card:
    """One number to be seen first. `series` ties it to the curve of the same colour."""

    label: str
    value: str
    unit: str
    note: str
    series: int | None = None


@dataclass(frozen=True)
class Cards:
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Row:
    """A line of a table: the first cell names it."""

    cells: tuple[str, ...]
    series: int | None = None


@dataclass(frozen=True)
class Table:
    """Columns after the first are numbers, set flush right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.columns) for row in self.rows)


@dataclass(frozen=True)
class Charts:
    """Charts side by side, below each other where the page is narrow."""

    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Crop:
    """A picture shown with its pixels left square; `alt` says what is on it."""

    label: str
    image: Image
    note: str
    alt: str
    series: int | None = None


@dataclass(frozen=True)
class View:
    """One place of a picture, `box` (top, left, height, width) in its pixels, by several methods; None: all of it."""

    label: str
    box: tuple[int, int, int, int] | None
    crops: tuple[Crop, ...]

    @property
    def columns(self) -> int:
        """Pictures side by side: at most TILES, and no line of them much shorter than the others."""
        lines = -(-len(self.crops) // TILES)
        return -(-len(self.crops) // max(1, lines))


@dataclass(frozen=True)
class Crops:
    """A picture, marked with the places that are shown magnified below it."""

    title: str
    overview: Image
    overview_alt: str
    views: tuple[View, ...]
    note: str = ""

    @property
    def letters(self) -> dict[int, str]:
        """What marks each view that has a box, by its number: A, B, ..."""
        boxed = [number for number, view in enumerate(self.views) if view.box is not None]
        return dict(zip(boxed, "ABCDEFGH", strict=False))

    def frame(self, view: View) -> dict[str, float]:
        """The view's box in percent of the overview."""
        assert view.box is not None
        height, width = self.overview.shape[:2]
        parts = zip(("top", "left", "height", "width"), view.box, (height, width, height, width), strict=True)
        return {side: round(100 * value / whole, 3) for side, value, whole in parts}


@dataclass(frozen=True)
class Facts:
    """What is to be known about how something was made: (name, value)."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Commands:
    """Lines to type into a shell, each with what it does."""

    commands: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Download:
    """A file that the page carries inside, offered under `name`."""

    label: str
    name: str
    content: bytes


Block = Text | Cards | Table | Charts | Crops | Facts | Commands | Download


@dataclass(frozen=True)
class Section:
    """`title` may be empty: its blocks then follow what is above without a heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    title: str
    kicker: str  # a few words above the title
    lead: str  # one paragraph below it
    sections: tuple[Section, ...]
    footer: str = ""


def render(page: Page) -> str:
    """The whole page as HTML."""
    blocks = [block for section in page.sections for block in section.blocks]
    charts = [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]
    drawings = {id(chart): Markup(chart_svg(chart, f"chart-{number}")) for number, chart in enumerate(charts)}
    return template("report.html.j2").render(page=page, drawings=drawings).strip() + "\n"


def write_page(path: Path, page: Page) -> None:
    """Render `page` into the file `path`, whole or not at all; its folder is made."""
    content = render(page).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def png_address(image: Image) -> str:
    """`[H, W, 3]` as a `data:` address, lossless."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def jpeg_address(image: Image) -> str:
    """`[H, W, 3]` as a `data:` address, for pictures that are not to be judged."""
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, "JPEG", quality=_OVERVIEW_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_address(content: bytes) -> str:
    """Any bytes as a `data:` address, to be saved."""
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def dash_array(series: int) -> str:
    """The dashes of a series as SVG wants them, for the swatch in a legend; "none" for a solid line."""
    return " ".join(f"{2 * length:g}" for length in DASHES[series]) or "none"


@cache
def template(name: str) -> Template:
    """The page template `name` beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        png_address=png_address,
        jpeg_address=jpeg_address,
        file_address=file_address,
        dash_array=dash_array,
        identity=id,
    )
    return environment.get_template(name)
