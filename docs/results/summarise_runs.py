"""Table, curves and numbers of finished runs: `python docs/results/summarise_runs.py NAME RUN [RUN ...]`.

Writes beside this file NAME.json (results, evaluations, gradient norms), NAME.table.md and NAME.svg (PSNR over steps).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hpcdistill.storage import write_bytes, write_json

HERE = Path(__file__).parent


def read(folder: Path) -> dict[str, Any]:
    """A finished run: its result and the evaluations in its log."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if any(key.endswith("/psnr") for key in row)]
    gradients = [
        {key: value for key, value in row.items() if key == "step" or key.startswith("gradient/")}
        for row in rows
        if any(key.startswith("gradient/") for key in row)
    ]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {"result": result, "evaluations": evaluations, "gradient_norms": gradients}


def table(runs: list[dict[str, Any]]) -> str:
    """PSNR/SSIM of the last weights (and of the best) on every test set."""
    sets = list(runs[0]["result"]["protocol"]["test_sets"])
    lines = ["| run | steps | " + " | ".join(sets) + " |", "|---|---|" + "---|" * len(sets)]
    for run in runs:
        result = run["result"]
        for which in ("last", "best"):
            metrics, step = result[which]["metrics"], result[which]["step"]
            prefix = result["protocol"]["selects"].split("/")[0]
            cells = [
                f"{metrics[f'{prefix}/{name}/psnr']:.2f} / {metrics[f'{prefix}/{name}/ssim']:.4f}" for name in sets
            ]
            lines.append(f"| {result['name']}, {which} | {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """PSNR of every run's evaluations on each test set."""
    sets = list(runs[0]["result"]["protocol"]["test_sets"])
    figure = Figure(figsize=(4 * len(sets), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for run in runs:
            key = f"student/{name}/psnr"
            points = [(row["step"], row[key]) for row in run["evaluations"] if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=run["result"]["name"])
        axes.set(title=name, xlabel="step", ylabel="PSNR, dB")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    name, folders = sys.argv[1], [Path(argument) for argument in sys.argv[2:]]
    runs = [read(folder) for folder in folders]
    write_json(HERE / f"{name}.json", {"runs": runs})
    draw([run for run in runs if "student" in str(run["result"]["protocol"]["selects"])], HERE / f"{name}.svg")
    write_bytes(HERE / f"{name}.table.md", (table(runs) + "\n").encode())


if __name__ == "__main__":
    main()
