"""Training steps as PISR's released code makes them, written plainly: what `step.py --part published` compares with.

PISR (cvlab-yonsei/PISR on GitHub, ECCV 2020): `models/fsrcnn.py`, `models/encoder.py`, `models/vid_module.py`,
`losses/loss_factory.py`, `step1_train_teacher.py` and `step2_train_student.py`, in our words. Contiguous memory,
PyTorch's layers, a transposed convolution, torch.optim.Adam as it comes, each loss read back to the host in each step.
The student's step runs the whole teacher with gradients (it is in eval mode, but not frozen), so that its backward
pass goes through the teacher too; "lean" is the same under `torch.no_grad`. Not here: the data loader, the progress
bar, the summary writer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, NARROW, MAPPING = 56, 12, 4
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999)}


class FSRCNN(nn.Module):
    """`[B, 1, H, W]` -> every layer's output by name, the image last; with `encoder` the input is HR."""

    def __init__(self, scale: int, encoder: bool = False, estimator: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleDict()
        if encoder:
            self.stages["encoder"] = nn.Sequential(
                *_layer(1, WIDTH, 5), *_layer(WIDTH, WIDTH, 5, scale), *_layer(WIDTH, NARROW, 3), _conv(NARROW, 1, 3)
            )
        self.stages["feature"] = _layer(1, WIDTH, 5)
        self.stages["shrinking"] = _layer(WIDTH, NARROW, 1)
        self.stages["mapping"] = nn.Sequential(*(_layer(NARROW, NARROW, 3) for _ in range(MAPPING)))
        self.stages["expanding"] = _layer(NARROW, WIDTH, 1)
        self.stages["image"] = nn.ConvTranspose2d(WIDTH, 1, 9, stride=scale, padding=4, output_padding=scale - 1)
        self.mean = nn.Sequential(*_layer(WIDTH, WIDTH, 1), _conv(WIDTH, WIDTH, 1)) if estimator else None
        self.spread = (
            nn.Sequential(*_layer(WIDTH, WIDTH, 1), _conv(WIDTH, WIDTH, 1), nn.Softplus()) if estimator else None
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for name, stage in self.stages.items():
            image = outputs[name] = stage(image)
        if self.mean is not None and self.spread is not None:
            outputs["mean"], outputs["spread"] = self.mean(outputs["expanding"]), self.spread(outputs["expanding"])
        return outputs


class Step:
    """One training step of "fsrcnn", "teacher", "student" (as released) or "lean"."""

    def __init__(self, kind: str, scale: int) -> None:
        self.kind, self.low = kind, f"lr{scale}"
        self.network = FSRCNN(scale, encoder=kind == "teacher", estimator=kind in ("student", "lean")).train()
        self.teacher = FSRCNN(scale, encoder=True).eval() if kind in ("student", "lean") else None
        self.adam = torch.optim.Adam(self.network.parameters(), **ADAM)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """The losses, on the host."""
        self.adam.zero_grad()
        losses = self._losses(batch["hr"], batch[self.low])
        logged = {name: loss.item() for name, loss in losses.items()}
        losses["loss"].backward()
        self.adam.step()
        return logged

    def _losses(self, hr: Tensor, lr: Tensor) -> dict[str, Tensor]:
        if self.teacher is None:
            outputs = self.network(hr if self.kind == "teacher" else lr)
            image = functional.l1_loss(outputs["image"], hr)
            if self.kind == "fsrcnn":
                return {"loss": image, "image": image}
            imitation = functional.l1_loss(outputs["encoder"], lr)
            return {"loss": image + 1e-4 * imitation, "image": image, "imitation": 1e-4 * imitation}
        with torch.no_grad() if self.kind == "lean" else contextlib.nullcontext():
            target = self.teacher(hr)["expanding"]
        outputs = self.network(lr)
        mean, spread = outputs["mean"], outputs["spread"] * 0.1 + 1e-8
        constant = WIDTH * math.log(2 * math.pi) / 2
        distance = (constant + torch.log(2 * spread) + (mean - target).abs() / spread).mean()
        image = functional.l1_loss(outputs["image"], hr)
        return {"loss": image + 1e-6 * distance, "image": image, "distance": 1e-6 * distance}


def _layer(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(channels_in, channels_out, kernel, stride), nn.PReLU())


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2)
