"""Noticing that a launcher started fewer processes than it was asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdistill.ranks.launcher import asked_processes

CLONE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /venv/bin/accelerate launch --cpu --num_processes 2 -m hpcdistill.train x.yaml", 2),
        ("python /venv/bin/accelerate launch --num_processes=4 -m hpcdistill.train x.yaml", 4),
        ("python -m accelerate.commands.launch --num-processes 3 -m hpcdistill.train", 3),
        ("python /venv/bin/accelerate launch -m hpcdistill.train x.yaml", 1),
        ("bash", 1),
        ("python -m pytest --num_processes 2", 1),
        ("accelerate launch --num_processes", 1),
    ],
)
def test_asked_processes(command: str, asked: int) -> None:
    assert asked_processes(command.split()) == asked


@pytest.mark.distributed
def test_accelerate_on_cpus_that_starts_one_process_is_reported() -> None:
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    command = [accelerate, "launch", "--cpu", "--num_processes", "2", "-m", "hpcdistill.train"]
    done = subprocess.run(
        [*command, "configs/fsrcnn/x4.yaml", "configs/variants/cpu.yaml", "train.steps=1"],
        cwd=CLONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    assert "asked for 2 processes and started one" in done.stderr
