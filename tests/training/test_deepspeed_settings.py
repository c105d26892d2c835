"""What `train.deepspeed` and `accelerate launch` may ask for, and what is answered where DeepSpeed is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdistill.errors import UserError
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.deepspeed import requested_settings

CLONE = Path(__file__).resolve().parents[2]
CONFIGS = CLONE / "configs" / "deepspeed"
ZERO_2 = '"zero_optimization": {"stage": 2}'


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are judged alike where the extra is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 0}}', "ZeRO stage 0 is not supported; leave train.deepspeed out"),
        ('{"zero_optimization": {"stage": 4}}', "ZeRO stage 4 is not supported; use 1, 2 or 3"),
        (f'{{{ZERO_2}, "gradient_clipping": 1.0}}', "gradient_clipping is decided by the method's optimizer"),
        (f'{{{ZERO_2}, "fp16": {{"enabled": true}}}}', "fp16 is decided by train.precision; leave it out"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', "offload_param .* not supported"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "only the optimizer to the"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": 3}}', "only the optimizer to the"),
        ("[" * 100_000, "not a DeepSpeed configuration"),
        ("[]", "not a DeepSpeed configuration"),
        ("{", "not a DeepSpeed configuration"),
        ('{"zero_optimization": {"stage": true}}', "ZeRO stage True is not supported"),
        ('{"zero_optimization": {"stage": [2]}}', "is not supported; use 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": [1]}}', "only the optimizer to the"),
    ],
)
def test_what_is_refused(content: str, message: str, tmp_path: Path, installed: None) -> None:
    file = tmp_path / "asked.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        requested_settings(TrainConfig(deepspeed=str(file)))
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_fp16_is_refused(installed: None) -> None:
    with pytest.raises(UserError, match="fp16 is not supported under DeepSpeed; use bf16 or fp32"):
        requested_settings(TrainConfig(deepspeed=str(CONFIGS / "zero2.json"), precision="fp16"))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        requested_settings(TrainConfig(deepspeed="none.json"))


@pytest.mark.parametrize(
    ("variable", "engine"),
    [("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "a parallelism_config")],
)
def test_other_engines_are_refused(variable: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UserError, match=f"asks for {engine}, which hpcdistill does not support; use DDP"):
        requested_settings(TrainConfig())


def test_nothing_asked_for() -> None:
    assert requested_settings(TrainConfig()) is None


def test_the_launchers_file(monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(CONFIGS / "zero3.json"))
    monkeypatch.setenv("HPCDISTILL_DEEPSPEED", "")  # so that it is taken back afterwards
    for _ in range(2):  # a teacher, then its student
        settings = requested_settings(TrainConfig())
        assert settings is not None
        assert settings["zero_optimization"]["stage"] == 3
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ  # Accelerate would make one engine of its own


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_the_files_that_come_with_it(file: Path, installed: None) -> None:
    settings = requested_settings(TrainConfig(deepspeed=str(file)))
    assert settings is not None
    assert f"zero{settings['zero_optimization']['stage']}" == file.stem[:5]


WITHOUT = """
import importlib, pkgutil, sys
for name in ("deepspeed", "transformers", "hjson"):
    sys.modules[name] = None  # importing it fails as if it were not installed
import hpcdistill
for module in pkgutil.walk_packages(hpcdistill.__path__, "hpcdistill."):
    importlib.import_module(module.name)
from hpcdistill.command import run_command
from hpcdistill.train import main
assert main(["configs/fsrcnn/x2.yaml", "--print-config"]) == 0
run_command(main)
"""


def test_without_the_extra_only_asking_for_it_fails(tmp_path: Path) -> None:
    """Every module can be imported; the train command answers in one line."""

    arguments = ["train.device=cpu", f"train.deepspeed={CONFIGS / 'zero2.json'}", f"runs={tmp_path}"]
    command = [sys.executable, "-c", WITHOUT, "configs/fsrcnn/x2.yaml", *arguments]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=CLONE, timeout=120)
    assert asked.returncode == 2, asked.stderr
    assert asked.stdout.startswith("name: fsrcnn-x2")
    [line] = [line for line in asked.stderr.splitlines() if line.strip()]
    assert "DeepSpeed is not installed; `pip install -e '.[deepspeed]'` in the clone, or use DDP" in line
