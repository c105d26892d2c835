"""`accelerate launch` as users call it, with configs/accelerate: as many processes as were asked for.

`torchrun --standalone` is in tests/test_train.py, plain `srun` in tests/slurm, `--cpu` in tests/ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_variant

pytestmark = pytest.mark.distributed

CLONE = Path(__file__).resolve().parents[2]
SETTINGS = CLONE / "configs" / "accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The train command for two steps on three images of noise, on the CPU."""
    config = CLONE / "configs" / "fsrcnn" / "x2.yaml"
    return ["-m", "hpcdistill.train", str(config), tiny_variant(tmp_path), f"runs={tmp_path / 'runs'}"]


def test_accelerate_starts_two_cpu_processes(command: list[str], tmp_path: Path) -> None:
    settings = ["--config_file", str(SETTINGS / "cpu.yaml"), "--num_processes", "2"]
    with _started([*LAUNCH, *settings, *command]) as [launcher]:
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert _processes(tmp_path) == 2


def test_accelerate_joins_two_machines(command: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["--config_file", str(SETTINGS / "nodes.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    launch = [*LAUNCH, *settings, "--main_process_port", str(port), "--machine_rank"]
    with _started([*launch, "0", *command], [*launch, "1", *command]) as launchers:
        for launcher in launchers:
            _, errors = launcher.communicate(timeout=200)
            assert launcher.returncode == 0, errors
    assert _processes(tmp_path) == 2


def test_accelerate_starts_deepspeed_for_a_teacher_and_its_student(command: list[str], tmp_path: Path) -> None:
    """Each stage has engines of its own in the same processes; the yaml file names the JSON file."""
    pytest.importorskip("deepspeed")
    command[command.index(str(CLONE / "configs" / "fsrcnn" / "x2.yaml"))] = str(CLONE / "configs" / "dssd" / "x2.yaml")
    settings = ["--config_file", str(SETTINGS / "deepspeed-zero3.yaml"), "--num_processes", "2"]
    with _started([*LAUNCH, *settings, *command]) as [launcher]:
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert "training it first" in errors
    results = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/result.json")]
    assert sorted(result["processes"] for result in results) == [2, 2]
    assert errors.count("those of single loss terms are not") == 2  # both were trained by DeepSpeed


def test_settings_for_gpus_name_no_device_and_no_precision() -> None:
    for path in SETTINGS.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        # A number here would overrule the user's CUDA_VISIBLE_DEVICES, a precision the run's.
        assert values["gpu_ids"] == "all", path
        assert "mixed_precision" not in values, path


@contextlib.contextmanager
def _started(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The commands, running side by side; ended with all they have started when the test is over."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ACCELERATE"))}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CLONE, env=environment)
        for command in commands
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()  # a launcher ends its workers
                process.wait(60)


def _processes(folder: Path) -> int:
    [result] = (folder / "runs").glob("*/result.json")
    return int(json.loads(result.read_text())["processes"])
