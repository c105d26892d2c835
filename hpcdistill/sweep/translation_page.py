"""The page and the picture of `TranslationFigures`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hpcdistill.errors import plural
from hpcdistill.metrics.cost import Cost, image_cost
from hpcdistill.metrics.sample_grid import outlined, sample_grid
from hpcdistill.sweep.comparison import Captioned, colour
from hpcdistill.sweep.demos.base import Box, cut, view
from hpcdistill.sweep.report import Block, Commands, Crops, Facts, Image, Page, Row, Section, Table, Text
from hpcdistill.sweep.translation_figures import Method, Shown, TranslationFigures

WIDTH = 192  # pixels that a picture has at least in the PNG
OVERVIEW = 320  # and, where a whole factor makes it so, what a page shows where the magnified place is
_RULE = (
    "Images are spread evenly over the set, by their order alone. Magnified is the place where the input has most "
    "contrast between neighbouring pixels. No network was asked, and nobody chose by eye."
)
_NAMED = (
    "These images were named by who made this page; where no place was named, the one magnified is where the input has "
    "most contrast between neighbouring pixels."
)


def translation_page(figures: TranslationFigures, which: str, command: str) -> Page:
    """The page: for each direction a table of what the runs measured, and the images, whole and magnified."""
    labels = ", ".join(candidate.label for candidate in figures.candidates)
    name = "/".join(figures.images.absolute().parts[-2:])  # "test" alone says little
    made = Section("How it was made", (
        Facts((
            *((candidate.label, candidate.origin) for candidate in figures.candidates),
            ("Images", f"{figures.images}, resized to {figures.size}x{figures.size}"), ("Weights", which),
            *_protocols(figures),
        )),
        Commands((("This page", command),)),
    ))  # fmt: skip
    return Page(
        title="What each method makes of an image",
        kicker="hpcdistill figures: image translation",
        lead=f"{labels} on the images of {name}, of runs the {which} weights. Pictures are magnified as they are, "
        "every pixel a square.",
        sections=(*(_section(figures, backwards) for backwards in figures.rows), made),
        footer="This page needs no network and no other file.",
    )


def translation_picture(figures: TranslationFigures) -> Image:
    """All as one picture, as papers print it: a row of the whole images and, below, one of the magnified places.

    Both are magnified by whole factors; in the input a line around the place shows where it is.
    """
    rows: list[dict[str, Image]] = []
    for backwards, shown in figures.rows.items():
        heads = {method.label: _head(method) for method in figures.methods(backwards)}
        for one in shown:
            rows += _picture_rows(one, heads, figures.title(backwards) + "\n" if heads else "")
            heads = {}  # once, above the first image of the direction
    return sample_grid(rows, zoom=1)


def _head(method: Method) -> str:
    """The label and, each on a line, the metric and its numbers: in one they would be wider than a picture."""
    score = method.score
    return f"{method.label}\n{score.metric}\n{score.numbers}" if score else method.label


def _picture_rows(shown: Shown, heads: Mapping[str, str], title: str) -> Iterator[dict[str, Image]]:
    """`heads`: more than the label to be written above the pictures; `title`: above the input."""
    size, side = shown.pictures[0][1].shape[0], shown.place.box[2]
    whole = max(1, -(-WIDTH // size))
    zoom = max(1, whole * size // side)
    label, image, *_ = shown.pictures[0]
    row = {f"{title}{label} {shown.place.name}": outlined(_magnified(image, whole), _scaled(shown.place.box, whole))}
    yield row | {heads.get(label, label): _magnified(image, whole) for label, image, *_ in shown.pictures[1:]}
    yield {f"{label}, x{zoom}": _magnified(cut(image, shown.place.box), zoom) for label, image, _, _ in shown.pictures}


def _magnified(image: Image, zoom: int) -> Image:
    """Every pixel a square of `zoom` pixels a side."""
    magnified: Image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return magnified


def _scaled(box: Box, zoom: int) -> Box:
    top, left, height, width = box
    return top * zoom, left * zoom, height * zoom, width * zoom


def _section(figures: TranslationFigures, backwards: bool) -> Section:
    shown = figures.rows[backwards]
    count = figures.evaluator.count("data", backwards)
    blocks: list[Block] = [_table(figures.methods(backwards), figures.title(backwards))]
    if len({method.score.basis for method in figures.methods(backwards) if method.score}) > 1:
        blocks.append(Text((_OTHER_PROTOCOLS,), tone="caution"))
    blocks.append(Text((_NAMED if figures.named else _RULE,)))
    blocks += [_crops(one) for one in shown]
    return Section(f"{figures.title(backwards)}: {len(shown)} of {plural(count, 'image')}", tuple(blocks))


_OTHER_PROTOCOLS = "The numbers of the table were measured by different protocols (below): they do not compare."


def _table(methods: Sequence[Method], title: str) -> Table:
    """What each run measured of itself, and what its network takes; what no run has is no column."""
    metrics = list(dict.fromkeys(method.score.metric for method in methods if method.score))
    columns: dict[str, list[str]] = {}
    if len(metrics) > 1:
        columns["Metric"] = [method.score.metric if method.score else "-" for method in methods]
    if metrics:
        columns["Best"] = [_number(method.score.best if method.score else None) for method in methods]
        columns["Last"] = [_number(method.score.last if method.score else None) for method in methods]
        columns["Evaluations"] = [str((method.score and method.score.evaluations) or "-") for method in methods]
    costs = [_cost(method) for method in methods]
    columns["Parameters"] = [f"{cost.params:,}" if cost else "-" for cost in costs]
    columns["MACs"] = [f"{cost.macs / 1e9:.3f} G" if cost else "-" for cost in costs]
    measured = {0: "what the networks take", 1: f"{(*metrics, '')[0]} of the whole set, as the runs measured it"}
    return Table(
        f"{title}: {measured.get(len(metrics), 'the whole set, as the runs measured it')}",
        ("Method", *columns),
        tuple(
            Row((method.label, *(cells[place] for cells in columns.values())), colour(method.number))
            for place, method in enumerate(methods)
        ),
        (_OF_RESULTS if metrics else "")
        + "MACs for 256x256 by the literature's rule, which charges a transposed convolution at its output's size.",
    )


_OF_RESULTS = (
    "Numbers are from each run's result.json; a dash: not known on this set. Best is of the weights that were chosen "
    "on a test set from so many evaluations, last of those after the last step. "
)


def _cost(method: Method) -> Cost | None:
    network = method.candidate.network
    return None if network is None or method.candidate.exported else image_cost(network)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _crops(shown: Shown) -> Crops:
    """An image: whole by every method, and the place magnified by every method."""
    name, box = shown.place.name, shown.place.box
    top, left, height, width = box
    crops: list[Captioned] = [(label, cut(image, box), "", series) for label, image, _, series in shown.pictures]
    where = f"{width} x {height} pixels, {left} from the left and {top} from the top"
    image = shown.pictures[0][1]
    zoom = max(1, OVERVIEW // image.shape[0])  # a browser would smooth it
    views = view(name, "whole", None, shown.pictures), view(name, where, _scaled(box, zoom), crops)
    note = f"{image.shape[1]} x {image.shape[0]} pixels"
    return Crops(name, _magnified(image, zoom), f"The input {name}", views, note)


def _protocols(figures: TranslationFigures) -> tuple[tuple[str, str], ...]:
    """How the runs measured, each way once."""
    found: dict[str, list[str]] = {}
    for backwards in figures.rows:
        for method in figures.methods(backwards):
            if method.score and method.score.protocol:
                labels = found.setdefault(method.score.protocol, [])
                labels += [method.label] if method.label not in labels else []
    return tuple((f"Measured ({', '.join(labels)})", protocol) for protocol, labels in found.items())
