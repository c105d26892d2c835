"""README.md of a published network, behind the hub's fields: how to use it, what it eats, how it came about."""

from __future__ import annotations

from hpcdistill.deploy.description import UNKNOWN, Description
from hpcdistill.deploy.provenance import Provenance, Score, without_folders
from hpcdistill.metrics.cost import IMAGE_SIZE, OUTPUT_SIZE, Cost
from hpcdistill.models.weights_file import CARD_WEIGHTS

USE = """\
## Use

In this folder, with hpcdistill installed:

```python
import hpcdistill
from PIL import Image

model = hpcdistill.load(".")
model(Image.open("photo.png")).save("made.png")
```

From the hub: `hpcdistill.load(huggingface_hub.snapshot_download("OWNER/NAME"))`. On a command line:

```sh
hpcdistill infer . photo.png --out made
```
"""


def body(title: str, about: Description, cost: Cost, known: Provenance) -> str:
    """The page, in Markdown."""
    sections = [
        f"# {title}\n\n{_what(about, cost)}",
        USE,
        f"## What it eats\n\n{_eats(about)}",
        f"## How good it is\n\n{_numbers(known)}",
        f"## Training\n\n{_training(known)}",
        f"## Licence\n\n{_licence(about)}",
        f"## Limits\n\n{_limits(about, known)}",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _what(about: Description, cost: Cost) -> str:
    enlarges = about.task == "super-resolution"
    does = f"Enlarges pictures x{about.scale}" if enlarges else "Translates pictures"
    height, width = OUTPUT_SIZE if enlarges else IMAGE_SIZE
    size = f"one {'output' if enlarges else 'input'} image of {width}x{height}"
    macs = f"{cost.true_macs / 1e9:,.2f} G multiply-accumulates for {size}"
    if cost.macs != cost.true_macs:
        macs += f" ({cost.macs / 1e9:,.2f} G as the literature counts)"
    arguments = ", ".join(f"{key} {value}" for key, value in about.arguments.items())
    return f"{does}. {about.network} ({arguments}), {cost.params:,} parameters, {macs}."


def _eats(about: Description) -> str:
    """For whoever feeds the network without `hpcdistill.load`, which does all of this."""
    shape = f"`[B, {about.channels}, H, W]`"
    if about.task == "translation":
        least = f" and no less than {about.smallest}" if about.smallest > about.multiple else ""
        sizes = f"H and W are multiples of {about.multiple}{least}" if about.multiple > 1 else f"any H and W{least}"
        lines = [
            f"In: {shape} float32, R, G, B in this order, in [{about.low:g}, {about.high:g}] "
            "(8 bits: value / 127.5 - 1).",
            f"Sizes: {sizes}; other pictures are reflected at the bottom and on the right, and cut back afterwards.",
            "Out: the same shape and range.",
        ]
        if about.overlap is None:
            lines.append("A picture is one piece: tiles of it do not fit together.")
        return "\n".join(f"- {line}" for line in [*lines, "`hpcdistill.load` does all of this."])
    out = f"`[B, {about.channels}, {about.scale} H, {about.scale} W]`"
    if about.colour == "luma":
        lines = [
            f"In: {shape} float32: luma of BT.601 with studio swing, in [16/255, 235/255], as ordinary video has it: "
            "Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255 of R, G, B in [0, 1]. Gray of the full range is another: "
            "16/255 + 219/255 of it.",
            f"Out: {out}, the same luma, not clamped.",
            "Colour: Cb and Cr are enlarged apart, by MATLAB's bicubic (a = -0.5).",
        ]
    else:
        lines = [
            f"In: {shape} float32, R, G, B in this order, in [{about.low:g}, {about.high:g}].",
            f"Out: {out}, not clamped.",
        ]
    if about.overlap is None:
        lines.append("Sizes: any H and W; a picture is one piece: tiles of it do not fit together exactly.")
    else:
        lines.append(
            f"Sizes: any H and W; tiles with an overlap of {about.overlap} input pixels give the same picture."
        )
    return "\n".join(f"- {line}" for line in [*lines, "`hpcdistill.load` does all of this, and gives 8 or 16 bits."])


def _numbers(known: Provenance) -> str:
    if not known.measured:
        why = "Its run had not finished" if not known.finished else "Nothing is recorded beside these weights"
        return f"Not measured. {why}."
    compared = any(number.bicubic is not None for number in known.measured)
    heads = ["data set", "metric", "value", *(["bicubic"] if compared else [])]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for number in known.measured:
        lines.append([number.test_set, number.label, digits(number.value, number)])
        if compared:
            lines[-1].append("" if number.bicubic is None else digits(number.bicubic, number))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_said_once(known.measured)}"


def digits(value: float, number: Score) -> str:
    """As many as mean something: two behind the point for decibels, four for what lies in [0, 1]."""
    return f"{value:.2f}" if number.label == "PSNR" or abs(value) >= 10 else f"{value:.4f}"


def _said_once(measured: tuple[Score, ...]) -> str:
    """The protocols, and how the weights were chosen: each with the numbers that it holds for."""
    lines = []
    for field, title in (("protocol", "Protocol"), ("chosen", "Weights")):
        said: dict[str, list[str]] = {}
        for number in measured:
            said.setdefault(getattr(number, field), []).append(f"{number.test_set} {number.label}")
        for text, whose in said.items():
            of = f" ({', '.join(whose)})" if len(said) > 1 else ""
            lines.append(f"- {title}{of}: {text}.")
    return "\n".join(lines)


def _training(known: Provenance) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in known.rows.items())]
    text = "\n".join(lines)
    if known.config:
        teacher = ", its teacher's configuration where `teacher.config` says" if "\nteacher:\n" in known.config else ""
        text += (
            f"\n\nThe same again, with these settings in `config.yaml`{teacher} and the data where `data` says:\n\n"
            f"```sh\nhpcdistill train config.yaml\n```\n\n```yaml\n{known.config.strip()}\n```"
        )
    return text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _licence(about: Description) -> str:
    if about.licence == UNKNOWN:
        text = "What the training data may be used for, and so these weights, was not recorded: find out before use."
    else:
        text = f"Of the training data, and so of these weights: {without_folders(about.licence)}."
    return f"{text} See [LICENSE](LICENSE). hpcdistill itself, which runs them, is Apache-2.0."


def _limits(about: Description, known: Provenance) -> str:
    if about.task == "super-resolution":
        lines = [
            "It undoes the down-sampling that it was trained with, and no compression, noise or blur of a lens.",
            f"It enlarges x{about.scale} only. Fine detail is a guess: no evidence, and nothing to measure.",
        ]
        if about.colour == "luma":
            lines.append("It sharpens luma alone; edges between colours of one brightness stay soft.")
    else:
        lines = [
            "It knows the kind of picture that it was trained on, in one direction; of others it makes something, too.",
            "What it paints is made up: no evidence, and nothing to measure.",
            "The whole picture has to fit into memory at once.",
        ]
    if not known.finished:
        lines.append("It was taken from its run before that had finished.")
    if any("flatters" in number.chosen for number in known.measured):
        lines.append("Some numbers above are of the images that chose the weights: expect less on others.")
    return "\n".join(f"- {line}" for line in lines)


def licence_file(about: Description) -> str:
    """LICENSE, which the hub's `license_link` leads to."""
    data, licence = without_folders(about.data), without_folders(about.licence)
    if about.licence == UNKNOWN:
        licence = "not recorded. Ask whoever trained them before you use or publish them."
    return (
        f"The weights in {CARD_WEIGHTS} were trained on: {data}\n\n"
        f"What that may be used for, and so the weights: {licence}\n"
    )
