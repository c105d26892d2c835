"""The demo of super-resolution at x4, measured on three photographs.

FSRCNN as published, FSRCNN over the bicubic image, and a DSSD teacher with its student over the bicubic image.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from hpcdistill.console import say, warn
from hpcdistill.data.index import LR_RULES, Index, load_index
from hpcdistill.errors import EXIT_STOPPED, UserError
from hpcdistill.metrics.cost import Cost, super_resolution_cost
from hpcdistill.metrics.sample_grid import bicubic_image, busiest_crop, colourise
from hpcdistill.metrics.sr_evaluation import bicubic_upsampler
from hpcdistill.metrics.sr_test_sets import SRImages, load_test_set
from hpcdistill.metrics.trained_super_resolution import evaluate_super_resolution
from hpcdistill.models.registry import load_generator
from hpcdistill.storage import CLONE
from hpcdistill.sweep import comparison
from hpcdistill.sweep.charts import Chart, Line
from hpcdistill.sweep.demos import base
from hpcdistill.sweep.demos.base import Box, Measured, Stage
from hpcdistill.sweep.report import Charts, Commands, Crops, Download, Facts, Image, Page, Section, Table, Text

# The student trained longer that the rows of the demo stand beside; a card of the same name lies beside it.
PRETRAINED = CLONE / "hpcdistill/pretrained/fsrcnn-bicubic-x4-bsd-t91.safetensors"
VARIANT = "configs/variants/demo.yaml"
OURS = "configs/variants/ours.yaml"
CONFIGS = {
    "fsrcnn": ("configs/fsrcnn/x4.yaml",),
    "residual": ("configs/fsrcnn/x4.yaml", OURS),
    "dssd": ("configs/dssd/x4.yaml", OURS),
}
# Title and colour of each method all over the page.
METHODS = {
    "bicubic": ("Bicubic", 0),
    "fsrcnn": ("FSRCNN, plain", 1),
    "residual": ("FSRCNN over bicubic", 2),
    "dssd": ("DSSD student over bicubic", 3),
    "teacher": ("DSSD teacher, which sees the original", 4),
    "trained": ("FSRCNN over bicubic, trained longer", 5),
}
RUN_NAMES = {"fsrcnn": "fsrcnn-x4", "residual": "fsrcnn-bicubic-x4", "dssd": "dssd-x4"}
SCALE = 4
RULE: Literal["pisr"] = "pisr"
CROP = 72  # pixels; a multiple of 8, so that a crop begins with a whole pixel of what is given


@dataclass(frozen=True)
class Enlarged(Measured):
    """A row with how the network came about, and what it made of each photograph, with bicubic's colours."""

    steps: int
    seconds: float | None  # of training; None: not known here
    pictures: tuple[Image, ...]

    def to_json(self) -> dict[str, Any]:
        count = {"steps": self.steps, "seconds": self.seconds, "images": len(self.per_image)}
        return super().to_json() | count | {"per_image": list(self.per_image)}


@dataclass(frozen=True)
class SRStory:
    """Everything the page is made of."""

    rows: Sequence[Enlarged]  # bicubic, fsrcnn, residual, dssd and, where its file is, trained
    stages: Mapping[str, Stage]  # "fsrcnn", "residual", "teacher", "dssd"
    images: SRImages  # the photographs, in the order of each row's pictures
    trained_notes: Mapping[str, Any]  # of the longer training's file
    command: str  # that made the page


def run_demo(options: argparse.Namespace) -> int:
    """Train, measure, and write the page; returns the exit code."""
    stages: dict[str, Stage] = {}
    for number, (name, what) in enumerate(
        {
            "fsrcnn": "plain FSRCNN",
            "residual": "FSRCNN that adds to the bicubic image",
            "dssd": "DSSD, which adds to it too: the teacher, then its student",
        }.items(),
        1,
    ):
        say(f"[{number}/4] training {what}", style="bold")
        trained = base.train_stage(training_arguments(name, options.out, options.steps, options.data))
        if trained is None:
            return EXIT_STOPPED
        run, stages[name] = trained
    assert run.teacher is not None
    stages["teacher"] = base.read_stage(run.teacher)

    config = stages["fsrcnn"].config
    photos = config.data.eval["photos"]
    images = load_test_set(photos, SCALE)
    say(f"[4/4] measuring on {len(images)} photographs that were not trained on", style="bold")
    rows = [measure("bicubic", bicubic_upsampler(SCALE), images, 0, 0.0)]
    for name in CONFIGS:
        # The last weights: the best ones were chosen by these very photographs.
        generator, _ = load_generator(stages[name].folder / "generators" / "last" / "student.safetensors")
        rows.append(measure(name, generator, images, stages[name].steps, stages[name].result["seconds"]))
    notes: dict[str, Any] = {}
    if PRETRAINED.is_file():
        generator, notes = load_generator(PRETRAINED)
        rows.append(measure("trained", generator, images, trained_steps(notes), notes.get("seconds")))
    else:
        warn(f"{_in_the_clone(PRETRAINED)} is not in this clone; the row of the student trained longer is left out")

    teacher = stages["teacher"].result
    results = {
        "rows": [row.to_json() for row in rows],
        "scale": SCALE,
        "rule": RULE,
        "seed": config.seed,
        "data": {"train": list(config.data.train), "test": photos},
        "teacher": {"steps": teacher["steps"], "seconds": teacher["seconds"], **teacher["last"]["metrics"]},
    }
    story = SRStory(rows, stages, images, notes, base.own_command("demo", options, Path("runs/demo")))
    base.publish(options.out, results, demo_page(story), results_table(rows), verdict(rows))
    return 0


def training_arguments(name: str, folder: Path, steps: int | None, data: Path | None) -> tuple[str, ...]:
    """What `hpcdistill train` is called with. With `steps` the teacher is shortened in proportion."""
    arguments = [*CONFIGS[name], VARIANT, f"runs={base.yaml_path(folder)}", f"name={RUN_NAMES[name]}"]
    if data is not None:
        train, test = (base.yaml_path(data / "photos" / split) for split in ("train", "test"))
        arguments += [f"data.train={train}", f"data.eval.photos={test}"]
    if steps is not None:
        full = base.resolve([*CONFIGS["dssd"], VARIANT])
        assert full.teacher is not None
        student, teacher = full.config, full.teacher.config
        assert student.train.steps is not None
        assert teacher.train.steps is not None
        arguments += base.shortened(student, steps)
        if name == "dssd":
            shorter = max(1, round(teacher.train.steps * steps / student.train.steps))
            arguments += [f"teacher.overrides.train.steps={shorter}", f"teacher.overrides.eval.every={shorter}"]
    return tuple(arguments)


def measure(name: str, generator: nn.Module, images: SRImages, steps: int, seconds: float | None) -> Enlarged:
    """PSNR, SSIM, cost and pictures of one generator on the photographs, on the CPU."""
    say(f"{name}: measuring on {len(images)} photographs")
    pictures = []

    def keep(number: int, hr: Image, lr: Image, made: Mapping[str, Tensor]) -> None:
        pictures.append(bicubic_image(lr, SCALE) if name == "bicubic" else colourise(made[name][0], lr, SCALE))

    result = evaluate_super_resolution({name: generator}, images, RULE, seen=keep)[0][name]
    cost = Cost(0, 0, 0) if name == "bicubic" else super_resolution_cost(generator)
    return Enlarged(name, *METHODS[name], result.metrics, result.per_image, cost, steps, seconds, tuple(pictures))


def trained_steps(notes: Mapping[str, Any]) -> int:
    """The steps that the file of the longer training says it took."""
    steps = notes.get("steps", notes.get("step"))
    if not isinstance(steps, int):
        raise UserError(
            f"{PRETRAINED}: its notes do not say how many steps it was trained; copy it from the repository"
        )
    return steps


def paper_steps() -> int:
    """A stage's steps by the paper's recipe, as the configurations without any variant have it."""
    config = base.resolve(list(CONFIGS["dssd"][:1])).config
    assert config.data.samples_per_epoch is not None
    return round(config.train.epochs * config.data.samples_per_epoch / config.train.batch_size)


def verdict(rows: Sequence[Enlarged]) -> list[str]:
    """What the numbers say, and what they do not: one sentence each."""
    bicubic, plain, adding, distilled, *further = rows
    lines = [
        f"After {plain.steps:,} steps, plain FSRCNN is {base.compared(plain, bicubic)}, the same network over the "
        f"bicubic image {base.compared(adding, bicubic)} and the DSSD student over it "
        f"{base.compared(distilled, bicubic)}, on {len(bicubic.per_image)} photographs.",
        "That a network which starts from bicubic passes it so soon was measured with three seeds on 100 photographs "
        "as well: docs/results/quality.md.",
    ]
    lines += [
        f"The second network trained for {trained.steps:,} steps on other images is {base.compared(trained, bicubic)}."
        for trained in further
    ]
    lines.append(
        "The difference between the two rows over bicubic says nothing about which of them is better: it comes from "
        f"{len(bicubic.per_image)} photographs, one seed and a very short training."
    )
    return lines


def demo_page(story: SRStory) -> Page:
    """The demo's page."""
    plain = story.rows[1]
    lead = (
        "Photographs at a quarter of their width and height, enlarged again: by bicubic interpolation, and by a "
        f"network of {plain.cost.params:,} parameters. Three such networks were trained by the command that made this "
        f"page, for {plain.steps:,} steps each: as published, adding to the bicubic image, and adding to it with a "
        "teacher that sees the original."
    )
    if story.trained_notes:
        lead += " A fourth was trained for longer and comes with the code."
    crops = (_photograph(story, number) for number in range(len(story.images)))
    measured = (results_table(story.rows), base.by_photograph(story.rows, "PSNR of each photograph [dB]"))
    charts = (
        base.psnr_chart(
            [(row, story.stages[row.name], "student/photos/psnr") for row in story.rows[1:4]],
            [story.rows[0], *story.rows[4:]],
        ),
        _losses(story.stages),
    )
    commands = Commands(
        (
            ("This page", story.command),
            ("FSRCNN alone", story.stages["fsrcnn"].command),
            ("FSRCNN over bicubic alone", story.stages["residual"].command),
            ("DSSD's teacher and student alone", story.stages["dssd"].command),
            ("The literature's evaluation of any run", "hpcdistill evaluate RUN --data SET_OR_FOLDER"),
        )
    )
    return Page(
        title="Small networks, large pictures",
        kicker=f"hpcdistill demo: x{SCALE} super-resolution",
        lead=lead,
        sections=(
            Section("", (base.cards(story.rows), Text(_caution(story), tone="caution"))),
            Section("The same place, enlarged by each", (Text((_PLACES,)), *crops)),
            Section("What was measured", measured),
            Section("How the training went", (Charts(charts), *_gradients(story.stages["dssd"]))),
            base.take_away(story.stages["dssd"], ("onnx", "shader"), *_longer()),
            Section("How it was made", (_facts(story), commands)),
        ),
        footer=f"Made by `{story.command}` of hpcdistill. This page needs no network and no other file.",
    )


_PLACES = (
    f"A is the busiest {CROP} x {CROP} pixels of each photograph, B its middle: chosen by rule, not by eye. Every "
    "pixel is magnified as it is. The networks make the brightness; the colours are bicubic's. The PSNR below a "
    "picture is that of the whole photograph."
)


def _caution(story: SRStory) -> tuple[str, ...]:
    """What such numbers are worth, in the numbers' own terms."""
    steps, full = story.rows[1].steps, paper_steps()
    by_photo = [row["psnr"] for row in story.rows[0].per_image]
    return (
        " ".join(verdict(story.rows)),
        f"The paper's recipe has {full:,} steps; {steps:,} are {base.digits(100 * steps / full, 2)} % of them. "
        f"From one of these photographs to another, bicubic alone changes by {max(by_photo) - min(by_photo):.1f} dB. "
        "The two networks over bicubic also learn at three times the paper's rate, and the DSSD student had the longer "
        "training: it starts from its teacher's weights, which took "
        f"{story.stages['teacher'].steps:,} steps more. For measurements on the literature's test sets see "
        "docs/results.",
    )


def results_table(rows: Sequence[Enlarged]) -> Table:
    """What was measured, on the terminal and on the page."""
    return comparison.results_table(
        rows,
        f"x{SCALE}, mean of {len(rows[0].per_image)} photographs not trained on",
        "PSNR and SSIM on luma, four pixels of border left out, the output rounded to 8 bits and the reference "
        "not. MACs for an output of 1280x720 by the literature's rule, which charges the last layer at its output "
        f"size; what it takes is {rows[1].cost.true_macs / 1e9:.2f} G. Steps are the student's own, without its "
        "teacher's.",
        {"Steps": [f"{row.steps:,}" if row.steps else "-" for row in rows]},
    )


def _photograph(story: SRStory, number: int) -> Crops:
    """One photograph and its two crops, by every method."""
    name, hr, lr = story.images[number]
    given = lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    views = []
    for place, box in (("the busiest place", busiest_crop(hr, CROP)), ("the middle", middle(hr, CROP, SCALE))):
        height, width = box[2:]
        pictures: list[tuple[str, Image, str, int | None]] = [
            ("What is given", given, f"{width // SCALE} x {height // SCALE} pixels", None),
            *(
                (row.title, row.pictures[number], f"{row.per_image[number]['psnr']:.2f} dB", row.series)
                for row in story.rows
            ),
            ("Original", hr, f"{width} x {height} pixels", None),
        ]
        views.append(
            base.view(
                name,
                place,
                box,
                [(label, base.cut(image, box), note, series) for label, image, note, series in pictures],
            )
        )
    size = f"{lr.shape[1]} x {lr.shape[0]} pixels, enlarged to {hr.shape[1]} x {hr.shape[0]}"
    return Crops(name, hr, f"The photograph {name}; boxes mark the two crops below", tuple(views), size)


def middle(image: Image, side: int, scale: int) -> Box:
    """The middle of an image; it begins with a whole LR pixel."""
    height, width = min(side, image.shape[0]), min(side, image.shape[1])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return top // scale * scale, left // scale * scale, height, width


def _losses(stages: Mapping[str, Stage]) -> Chart:
    networks = {"fsrcnn": "student", "residual": "student", "dssd": "student", "teacher": "teacher"}
    return Chart(
        title="Loss on the training patches",
        x_label="step",
        y_label="mean absolute error",
        lines=tuple(
            Line(*METHODS[name], stages[name].curve(f"{network}/reconstruction")) for name, network in networks.items()
        ),
        log_y=True,
        digits=4,
        note="Luma from 0 to 1, the mean since the point before. The teacher's is of another task: it encodes the "
        "original itself and enlarges that, so its height does not compare with the students'.",
    )


def _gradients(stage: Stage) -> tuple[Text, ...]:
    """How much the distillation term had to say, where that was measured."""
    keys = ("gradient/student/reconstruction", "gradient/student/vid")
    last = next((line for line in reversed(stage.log) if all(line.get(key) for key in keys)), None)
    if last is None:
        return ()
    reconstruction, distillation = (float(last[key]) for key in keys)
    return (
        Text(
            (
                f"At step {last['step']:,} the gradient of the distillation term (weight 1e-6, as the paper sets it) "
                f"was {distillation:.1e} long, that of the reconstruction {reconstruction:.1e}: "
                f"{base.digits(reconstruction / distillation, 1)} times as long. So in a run as short as this, what "
                "sets the student apart from plain FSRCNN is above all its start from the teacher's weights.",
            )
        ),
    )


def _facts(story: SRStory) -> Facts:
    first, second, teacher, student = (story.stages[name] for name in ("fsrcnn", "residual", "teacher", "dssd"))
    data = first.config.data
    train_set, test_set = load_index(Path(data.train[0])), load_index(Path(data.eval["photos"]))
    file, notes = _in_the_clone(PRETRAINED), story.trained_notes
    longer = f"{file} is not in this clone, so its row is missing"
    if notes:
        said = [str(notes[key]) for key in ("data", "licence") if notes.get(key)]
        trained = story.rows[4]
        took = f" in {base.clock(trained.seconds)}" if trained.seconds is not None else ""
        longer = f"{trained.steps:,} steps{took}; {'; '.join([*said, file])}, with its card beside it"
    return Facts(
        (
            ("Trained on", f"{_names(train_set)}; from {train_set.origin}"),
            ("Measured on", f"{_names(test_set)}; from {test_set.origin}"),
            ("Licence", test_set.licence),
            ("Shrunk by", LR_RULES.get(test_set.lr or "", "bicubic")),
            (
                "Steps",
                f"{first.steps:,} a student, {teacher.steps:,} the DSSD teacher; each "
                f"{first.config.train.batch_size} patches of {data.patch} x {data.patch} pixels",
            ),
            (
                "Time",
                f"{base.clock(first.result['seconds'])} FSRCNN, {base.clock(second.result['seconds'])} over bicubic, "
                f"{base.clock(teacher.result['seconds'])} DSSD teacher, {base.clock(student.result['seconds'])} its "
                "student",
            ),
            ("Seed", ", ".join(map(str, sorted({stage.result["seed"] for stage in story.stages.values()})))),
            *first.facts(),
            ("Longer training", longer),
        )
    )


def _longer() -> tuple[Download, ...]:
    """The weights of the student that was trained longer, where they are in the clone."""
    if not PRETRAINED.is_file():
        return ()
    return (Download("Those of the student that was trained longer", PRETRAINED.name, PRETRAINED.read_bytes()),)


def _names(index: Index) -> str:
    return ", ".join(sample.source.rpartition(".")[0] or sample.source for sample in index.samples)


def _in_the_clone(path: Path) -> str:
    return str(path.relative_to(CLONE)) if path.is_relative_to(CLONE) else path.name
