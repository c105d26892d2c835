"""A small grid on disk, and programs that stand in for SLURM's."""

from __future__ import annotations

import stat
from pathlib import Path

GRID = """\
title: Toy
metrics: {psnr: {of: student/toy/psnr, better: higher}}
base: student.yaml
axes:
  encoder: {HFRM: {}, bicubic: {overlays: [bicubic.yaml]}}
  weight: {"1": {}, "2": {set: [method.weight_vid=2e-6]}}
cells:
  - {labels: {encoder: none, weight: "0"}, base: plain.yaml}
  - {labels: {encoder: CARN, weight: "-"}, kind: reported, printed: {psnr: 31.9}}
"""
SBATCH = """\
#!/bin/sh
cd "$(dirname "$0")/.."
number=$(($(cat number 2> /dev/null || echo 100) + 1))
echo $number > number
env > "environment-$number"
if [ -f refuse ] && [ $number -ge "$(cat refuse)" ]; then
    echo "sbatch: error: $(cat complaint 2> /dev/null || echo invalid partition specified: nope)" >&2
    exit 1
fi
cp "$1" "script-$number"
echo "Submitted batch job $number"
"""
SQUEUE = """\
#!/bin/sh
cat "$(dirname "$0")/../queue" 2> /dev/null || true
"""
SCONTROL = """\
#!/bin/sh
echo "MaxArraySize            = $(cat "$(dirname "$0")/../most" 2> /dev/null || echo 1001)"
echo "SchedulerParameters     = $(cat "$(dirname "$0")/../parameters" 2> /dev/null || echo "(null)")"
"""


def put_grid(folder: Path) -> Path:
    """Two teachers, four students and a network alone, in seven runs; the grid's file."""
    data = "data: {train: data/toy, eval: {toy: data/toy}, patch: 48}\ntrain: {steps: 5, batch_size: 4}\n"
    (folder / "teacher.yaml").write_text(f"name: teacher\nmethod: {{name: privileged_teacher, scale: 4}}\n{data}")
    (folder / "data" / "toy").mkdir(parents=True)
    (folder / "data" / "toy" / "image.png").touch()  # there for who only looks whether it is
    student = "name: student\nteacher: {config: teacher.yaml}\nmethod: {name: privileged_student, scale: 4}\n"
    (folder / "student.yaml").write_text(student + data)
    (folder / "plain.yaml").write_text(f"name: plain\nmethod: {{name: plain_sr, scale: 4}}\n{data}")
    (folder / "bicubic.yaml").write_text("teacher: {overrides: {method: {encoder: bicubic}}}\n")
    (folder / "toy.yaml").write_text(GRID)
    return folder / "toy.yaml"


def put_slurm(folder: Path) -> Path:
    """sbatch that notes its scripts in `folder`, and what else is asked for; the folder for PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, text in {"sbatch": SBATCH, "srun": SQUEUE, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    return programs
