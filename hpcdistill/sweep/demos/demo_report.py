"""The demo's page: what is said and shown of its runs. How it looks is `report`'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcdistill.metrics.sample_grid import busiest_crop
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos.demo_rows import COLUMNS, SERIES, TITLES, Image, Measured, cells, clock, compared, verdict
from hpcdistill.sweep.report import (
    Card,
    Cards,
    Charts,
    Commands,
    Crop,
    Crops,
    Facts,
    Page,
    Row,
    Section,
    Table,
    Text,
    View,
)

if TYPE_CHECKING:
    from hpcdistill.data.index import Index
    from hpcdistill.metrics.sr_evaluation import SRImages

CROP = 72  # pixels; a multiple of 8, so that a crop begins with a whole pixel of what is given


@dataclass(frozen=True)
class Stage:
    """One finished training, read from its run folder."""

    result: Mapping[str, Any]  # result.json
    log: Sequence[Mapping[str, Any]]  # metrics.jsonl
    session: Mapping[str, Any]  # the last one of environment.json
    command: str

    def curve(self, key: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of the lines that have `key`."""
        return tuple((float(line["step"]), float(line[key])) for line in self.log if key in line)


@dataclass(frozen=True)
class Story:
    """Everything the page is made of."""

    rows: Sequence[Measured]  # bicubic first
    stages: Mapping[str, Stage]  # "fsrcnn", "teacher", "dssd"
    images: SRImages  # the photographs, in the order of each row's pictures
    train_set: Index
    test_set: Index
    trained_notes: Mapping[str, Any]  # of the longer training's file; empty without it
    trained_file: str  # its path in the clone
    paper_steps: int  # a stage's steps by the paper's recipe
    batch_size: int
    patch: int
    command: str  # that made the page

    @property
    def trained(self) -> Measured | None:
        return next((row for row in self.rows if row.name == "dssd-trained"), None)


def demo_page(story: Story) -> Page:
    """The demo's page."""
    bicubic, plain = story.rows[0], story.rows[1]
    lead = (
        f"Photographs at a quarter of their width and height, enlarged again: by bicubic interpolation, and by a "
        f"network of {plain.params:,} parameters. Two such networks were trained by the command that made this page, "
        f"for {plain.steps:,} steps each; the second learned from a teacher that sees the original."
    )
    if story.trained:
        lead += " A third was trained for longer and comes with the code."
    return Page(
        title="Small networks, large pictures",
        kicker=f"hpcdistill demo: x{story.images.scale} super-resolution",
        lead=lead,
        sections=(
            Section("", (_cards(story.rows), Text(_caution(story), tone="caution"))),
            Section("The same place, enlarged by each", _crops(story)),
            Section("What was measured", (_results(story.rows), _by_image(story.rows))),
            Section("How the training went", (_charts(story, bicubic), *_gradients(story))),
            Section("How it was made", (_facts(story), _commands(story))),
        ),
        footer=f"Made by `{story.command}` of hpcdistill. This page needs no network and no other file.",
    )


def _cards(rows: Sequence[Measured]) -> Cards:
    return Cards(
        tuple(
            Card(
                TITLES[row.name],
                f"{row.psnr:.2f}",
                "dB",
                "the baseline: nothing is learned" if row is rows[0] else compared(row, rows[0]),
                SERIES[row.name],
            )
            for row in rows
        )
    )


def _caution(story: Story) -> tuple[str, ...]:
    """What such numbers are worth, in the numbers' own terms."""
    bicubic, plain = story.rows[0], story.rows[1]
    teacher_steps = story.stages["teacher"].result["steps"]
    by_photo = [row["psnr"] for row in bicubic.per_image]
    share = plain.steps / story.paper_steps
    return (
        " ".join(verdict(story.rows)),
        f"The paper's recipe has {story.paper_steps:,} steps; {plain.steps:,} are {_percent(share)} of them. "
        f"From one of these photographs to another, bicubic alone changes by {max(by_photo) - min(by_photo):.1f} dB. "
        f"And the DSSD student had the longer training: it starts from its teacher's weights, which took "
        f"{teacher_steps:,} steps more. For measurements on the literature's test sets see docs/results.",
    )


def _results(rows: Sequence[Measured]) -> Table:
    return Table(
        caption=f"Mean of {len(rows[0].per_image)} photographs that were not trained on",
        columns=("Method", *COLUMNS),
        rows=tuple(Row((TITLES[row.name], *cells(row, rows[0])), SERIES[row.name]) for row in rows),
        note="PSNR and SSIM on luma, four pixels of border left out, the output rounded to 8 bits and the reference "
        "not. MACs for an output of 1280x720 by the literature's rule, which charges the last layer at its output "
        "size; what it takes is "
        + f"{rows[1].true_macs / 1e9:.2f} G. Steps and time are the student's own, without its teacher's.",
    )


def _by_image(rows: Sequence[Measured]) -> Table:
    names = [row["name"] for row in rows[0].per_image]
    return Table(
        caption="PSNR of each photograph [dB]",
        columns=("Method", *names),
        rows=tuple(
            Row((TITLES[row.name], *(f"{image['psnr']:.2f}" for image in row.per_image)), SERIES[row.name])
            for row in rows
        ),
    )


def _crops(story: Story) -> tuple[Crops | Text, ...]:
    places = f"A is the busiest {CROP} x {CROP} pixels of each photograph, B its middle: chosen by rule, not by eye."
    words = (
        "Every pixel is magnified as it is. The networks make the brightness; the colours are bicubic's. The PSNR "
        "below a picture is that of the whole photograph."
    )
    return (Text((f"{places} {words}",)), *(_photograph(story, number) for number in range(len(story.images))))


def _photograph(story: Story, number: int) -> Crops:
    """One photograph and its two crops, by every method."""
    name, hr, lr = story.images[number]
    scale = story.images.scale
    given = lr.repeat(scale, axis=0).repeat(scale, axis=1)
    views = []
    for label, box in (("the busiest place", busiest_crop(hr, CROP)), ("the middle", _middle(hr, CROP, scale))):
        height, width = box[2:]
        where = f"{name}, {label}"
        crops = [
            Crop("What is given", _cut(given, box), f"{width // scale} x {height // scale} pixels", f"{where}: LR")
        ]
        for row in story.rows:
            title, note = TITLES[row.name], f"{row.per_image[number]['psnr']:.2f} dB"
            crops.append(Crop(title, _cut(row.pictures[number], box), note, f"{where}: {title}", SERIES[row.name]))
        crops.append(Crop("Original", _cut(hr, box), f"{width} x {height} pixels", f"{where}: original"))
        views.append(View(label, box, tuple(crops)))
    size = f"{lr.shape[1]} x {lr.shape[0]} pixels, enlarged to {hr.shape[1]} x {hr.shape[0]}"
    return Crops(name, hr, f"The photograph {name}; boxes mark the two crops below", tuple(views), size)


def _middle(image: Image, side: int, scale: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the middle; it begins with a whole LR pixel."""
    height, width = min(side, image.shape[0]), min(side, image.shape[1])
    top, left = (
        (whole - part) // 2 // scale * scale for whole, part in zip(image.shape, (height, width), strict=False)
    )
    return top, left, height, width


def _cut(picture: Image, box: tuple[int, int, int, int]) -> Image:
    top, left, height, width = box
    return picture[top : top + height, left : left + width]


def _charts(story: Story, bicubic: Measured) -> Charts:
    psnr = tuple(
        Line(TITLES[name], SERIES[name], story.stages[name].curve("student/photos/psnr")) for name in ("fsrcnn", "dssd")
    )
    levels = [Line(TITLES["bicubic"], SERIES["bicubic"], ((0.0, bicubic.psnr),))]
    if story.trained:
        levels.append(Line(TITLES["dssd-trained"], SERIES["dssd-trained"], ((0.0, story.trained.psnr),)))
    measured = [y for line in (*psnr, *levels) for _, y in line.points]
    # The first steps climb from far below; in full they would press the rest into one line.
    arrived = all(line.points and line.points[-1][1] > bicubic.psnr - 2 for line in psnr)
    bottom = max(min(measured), bicubic.psnr - 2.5) if arrived else min(measured)
    cut = " The frame cuts the first steps off." if bottom > min(measured) else ""
    losses = tuple(
        Line(label, SERIES[name], story.stages[name].curve(f"{network}/reconstruction"))
        for name, network, label in (
            ("fsrcnn", "student", TITLES["fsrcnn"]),
            ("dssd", "student", TITLES["dssd"]),
            ("teacher", "teacher", "DSSD teacher, which sees the original"),
        )
    )
    return Charts(
        (
            Chart(
                title="PSNR on the photographs not trained on",
                x_label="step",
                y_label="PSNR [dB]",
                lines=psnr,
                levels=tuple(levels),
                y_range=(bottom - 0.1, max(measured) + 0.15),
                note="The rows of the table are the last weights; to choose the best point of a curve would be to "
                f"choose by the test photographs.{cut}",
            ),
            Chart(
                title="Loss on the training patches",
                x_label="step",
                y_label="mean absolute error",
                lines=losses,
                log_y=True,
                digits=4,
                note="Luma from 0 to 1, the mean since the point before. The teacher's is of another task: it encodes "
                "the original itself and enlarges that, so its height does not compare with the students'.",
            ),
        )
    )


def _gradients(story: Story) -> tuple[Text, ...]:
    """How much the distillation term had to say, where that was measured."""
    log = story.stages["dssd"].log
    keys = ("gradient/student/reconstruction", "gradient/student/vid")
    last = next((line for line in reversed(log) if all(line.get(key) for key in keys)), None)
    if last is None:
        return ()
    reconstruction, distillation = (float(last[key]) for key in keys)
    return (
        Text(
            (
                f"At step {last['step']:,} the gradient of the distillation term (weight 1e-6, as the paper sets it) "
                f"was {distillation:.1e} long, that of the reconstruction {reconstruction:.1e}: "
                f"{_round(reconstruction / distillation)} times as long. So in a run as short as this, what sets the "
                "student apart from plain FSRCNN is above all its start from the teacher's weights.",
            )
        ),
    )


def _facts(story: Story) -> Facts:
    stages = story.stages
    first = stages["fsrcnn"]
    seeds = sorted({stage.result["seed"] for stage in stages.values()})
    packages = first.session["packages"]
    device = first.result["device"]
    notes = story.trained_notes
    facts = [
        ("Trained on", f"{_names(story.train_set)}; from {story.train_set.origin}"),
        ("Measured on", f"{_names(story.test_set)}; from {story.test_set.origin}"),
        ("Licence", story.test_set.licence),
        ("Shrunk by", str(story.test_set.notes.get("resize", "bicubic"))),
        (
            "Steps",
            f"{first.result['steps']:,} FSRCNN, {stages['teacher'].result['steps']:,} DSSD teacher, "
            f"{stages['dssd'].result['steps']:,} DSSD student; each {story.batch_size} patches of "
            f"{story.patch} x {story.patch} pixels",
        ),
        (
            "Time",
            f"{clock(first.result['seconds'])} FSRCNN, {clock(stages['teacher'].result['seconds'])} DSSD teacher, "
            f"{clock(stages['dssd'].result['seconds'])} DSSD student",
        ),
        ("Seed", ", ".join(map(str, seeds))),
        ("Hardware", first.session["cpu"] if device == "cpu" else f"{device}; {first.session['cpu']}"),
        ("Precision", first.result["precision"]),
        ("Software", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("Code revision", str(first.result["revision"] or "not a git clone")),
    ]
    if story.trained:
        said = [str(notes[key]) for key in ("data", "licence") if notes.get(key)]
        facts.append(
            (
                "Longer training",
                f"{story.trained.steps:,} steps; {'; '.join([*said, story.trained_file])}, with its card beside it",
            )
        )
    else:
        facts.append(("Longer training", f"{story.trained_file} is not in this clone, so its row is missing"))
    return Facts(tuple(facts))


def _commands(story: Story) -> Commands:
    return Commands(
        (
            ("This page", story.command),
            ("FSRCNN alone", story.stages["fsrcnn"].command),
            ("DSSD's teacher and student alone", story.stages["dssd"].command),
            (
                "The literature's evaluation of any run",
                "python -m hpcdistill.evaluate RUN --data SET_OR_FOLDER",
            ),
        )
    )


def _names(index: Index) -> str:
    return ", ".join(sample.source.rpartition(".")[0] or sample.source for sample in index.samples)


def _percent(share: float) -> str:
    """`0.2 %`: two significant digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def _round(ratio: float) -> str:
    """One significant digit, with thousands separators."""
    return f"{float(f'{ratio:.1g}'):,.10g}"
