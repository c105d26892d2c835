"""How a run is trained: length, batch, precision, checkpoints, logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcdistill.settings import MOST_STEPS, Section, UserPlace, operational

MOST_THREADS = 1024  # OpenMP ends the process without a word where the system has no more


class TrainConfig(Section):
    epochs: float = Field(1000, gt=0, le=1e9, description="length of the run in epochs of data.samples_per_epoch draws")
    steps: int | None = Field(
        None, gt=0, le=MOST_STEPS, description="length in optimizer steps; takes the place of epochs when set"
    )
    batch_size: int = Field(16, gt=0, le=1 << 20, description="global batch: samples an optimizer step, over all ranks")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32", description="autocast of the forward pass; auto = bf16 where the device has it natively, else fp32"
    )
    batch_norm: Literal["sync", "local"] = Field(
        "sync",
        description="whose batch a BatchNorm sees: all ranks', or local: its rank's share, with results by ranks",
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights that are evaluated; 0 = off")
    accumulation: int = operational(1, "micro-batches a rank's share of the batch is cut into", gt=0, le=1 << 20)
    device: Literal["auto", "cpu", "cuda"] = operational("auto", "auto takes a GPU when there is one")
    deterministic: bool = operational(False, "repeat bit for bit on one device; slower, see docs/training.md")
    deepspeed: UserPlace | None = operational(
        None, "DeepSpeed's configuration file, ZeRO 1, 2 or 3 (configs/deepspeed/zero2.json); unset = DDP"
    )
    graph: Literal["auto", "on", "off"] = operational(
        "off", "the whole step as one CUDA graph; auto = where it can be, on = a run that cannot is refused"
    )
    channels_last: bool | Literal["auto"] = operational(
        "auto", "networks and images in channels-last memory; auto = where it was measured to be faster"
    )
    threads: int = operational(0, "CPU threads a process; 0 = PyTorch's default", ge=0, le=MOST_THREADS)
    timeout: int = operational(
        600, "seconds without a step, a batch or a test image after which a run hangs", gt=0, le=10**8
    )
    checkpoint_every: int = operational(1000, "steps between checkpoints", gt=0, le=MOST_STEPS)
    log_every: int = operational(100, "steps between lines of metrics.jsonl", gt=0, le=MOST_STEPS)
    gradient_norms_every: int = operational(
        1000, "steps between measurements of each loss term's own gradient norm; 0 = never", ge=0, le=MOST_STEPS
    )
    trackers: tuple[str, ...] = operational(("tensorboard",), "trackers of Accelerate by name, beside metrics.jsonl")
