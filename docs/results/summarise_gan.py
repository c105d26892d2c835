"""Curves, table and pictures of finished GAN runs: `python docs/results/summarise_gan.py NAME RUN [RUN ...]`.

Writes beside this file NAME.json (results and log lines), NAME.table.md, NAME.svg (every term over the steps) and
NAME-<run>.png (its last samples; only the generated images, as most data sets may not be passed on).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from hpcdistill.storage import write_bytes, write_json

HERE = Path(__file__).parent
COLUMNS = 4  # of the figure
GAP = 4  # pixels between the images of a sample picture


def read(folder: Path) -> dict[str, Any]:
    """A finished run: its result, and the lines of its log."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"result": json.loads((folder / "result.json").read_text(encoding="utf-8")), "log": rows}


def table(runs: list[dict[str, Any]]) -> str:
    """Every metric of the last weights, and of the best."""
    lines = ["| run | weights | generator | metrics |", "|---|---|---|---|"]
    for run in runs:
        result = run["result"]
        for which in ("last", "best"):
            by_generator: dict[str, list[str]] = {}
            for key, value in result[which]["metrics"].items():
                generator, _, metric = key.split("/", 2)
                by_generator.setdefault(generator, []).append(f"{metric} {value:.4g}")
            for generator, metrics in by_generator.items():
                weights = f"{which} (step {result[which]['step']})"
                lines.append(f"| {result['name']} | {weights} | {generator} | {', '.join(metrics)} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """One small chart a term and metric, a line a run."""
    left_out = ("gradient", "learning_rate", "step", "images", "seconds")
    keys = list(dict.fromkeys(k for run in runs for row in run["log"] for k in row if not k.startswith(left_out)))
    rows = -(-len(keys) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.2 * rows), layout="constrained")
    charts = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, key in zip(charts, keys, strict=False):
        for run in runs:
            points = [(row["step"], row[key]) for row in run["log"] if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=run["result"]["name"], linewidth=1)
        axes.set_title(key, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    for axes in charts[len(keys) :]:
        axes.remove()
    figure.savefig(path, metadata={"Date": None})


def generated(picture: Path, result: dict[str, Any]) -> bytes:
    """The columns of a sample picture that generators made: those between the source and, of pairs, the target."""
    generators = {key.split("/")[0] for key in result["last"]["metrics"]} or {"student", "teacher"}
    tile = result["protocol"]["size"] + GAP
    with Image.open(picture) as opened:
        cut = opened.crop((tile, 0, GAP + (1 + len(generators)) * tile, opened.height))
    content = io.BytesIO()
    cut.save(content, "PNG")
    return content.getvalue()


def main() -> None:
    name, folders = sys.argv[1], [Path(argument) for argument in sys.argv[2:]]
    runs = [read(folder) for folder in folders]
    write_json(HERE / f"{name}.json", {"runs": runs})
    write_bytes(HERE / f"{name}.table.md", (table(runs) + "\n").encode())
    draw(runs, HERE / f"{name}.svg")
    for run, folder in zip(runs, folders, strict=True):
        pictures = sorted((folder / "samples").glob("*.png"))
        if pictures:
            write_bytes(HERE / f"{name}-{run['result']['name']}.png", generated(pictures[-1], run["result"]))


if __name__ == "__main__":
    main()
