"""One step of methods on a device that does not exist: `python fake_gpu.py VGG_FILE`, one JSON object on stdout.

PyTorch's spare device type is named "gpu" (once a process: so this is a program of its own) and its tensors are fake:
they have shapes, types and a device, and no numbers. An operation on tensors of two devices fails as it does with a
real GPU, and so does reading a number back to the host. What it cannot see is indexing across devices, which PyTorch
lets pass here, and CUDA's own kernels.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from small_methods import METHODS, Ramp, build, omgd_of, samples_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from toy import SEED, Regression, ToyReader, regression_samples

from hpcdistill.methods.base import Batch, Method, Progress
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.loop import Training
from hpcdistill.training.run_folder import RunFolder

BATCH = 2
STEPS = 12  # of the run; two are made


class Mode(FakeTensorMode):
    """Fake tensors of a device that no kernel of this build knows."""

    avoid_device_init = True


class _Backend(backend_registration._DummyBackendModule):
    """The module that PyTorch asks about the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Astray(Regression):
    """Keeps a tensor that is no buffer: it stays on the CPU."""

    def __init__(self) -> None:
        super().__init__(None)
        self.target = torch.ones(BATCH, dtype=torch.float64)

    def loss(self, batch: Batch, carry: Any, progress: Progress) -> dict[str, Tensor]:
        return {"error": (self.call("line", batch["x"]) * self.target).mean()}


class Reading(Regression):
    """Reads a number back in every step."""

    def loss(self, batch: Batch, carry: Any, progress: Progress) -> dict[str, Tensor]:
        error = (self.call("line", batch["x"]) - batch["y"]).square().mean()
        return {"error": error / float(error.detach())}


def step(method: Method, samples: Any, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """One step of each segment; the devices of what it trained and of what it measured, or its error."""
    method = method.float()
    config = TrainConfig(device="cpu", batch_size=BATCH, trackers=(), **options)
    reader = ToyReader(BATCH, samples)
    batches = [{name: _single(value) for name, value in reader[number].items()} for number in range(STEPS)]
    with tempfile.TemporaryDirectory() as path, Mode(allow_non_fake_inputs=True):
        PartialState().device = torch.device("cpu")
        AcceleratorState._reset_state()
        accelerator = make_accelerator(config)
        PartialState().device = accelerator.state.device = device
        accelerator.device_placement = False
        place(method, device)
        folder = RunFolder(Path(path))
        folder.create("", {})
        try:
            training = Training(
                method, reader, Ramp(), folder, accelerator, config, steps=STEPS, evaluate_every=STEPS, seed=SEED
            )
            for number in (0, 1):
                phases = training.stretches[0].segment.phases
                count = training.batches
                training.updates.make(phases, number, batches[number * count : (number + 1) * count])
            return {"devices": sorted(_devices(method, training))}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)
            where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in last if "hpcdistill" in frame.filename]
            return {"error": f"{type(error).__name__}: {error}"[:300], "where": where[-3:]}
        finally:
            folder.release()


def place(method: Method, device: torch.device) -> None:
    """Parameters and buffers to the device, as loop and Accelerate do; fake ones move only once: `to` is left out."""
    moved: dict[int, Any] = {}
    for module in nn.ModuleList([method, *(group.module for group in method.groups.values())]).modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device != device:
                    if id(tensor) not in moved:
                        fake = tensor.detach().to(device)
                        kept = isinstance(tensor, nn.Parameter)
                        fake = nn.Parameter(fake, tensor.requires_grad) if kept else fake
                        moved[id(tensor)] = (fake, tensor)  # the old one lives on, so that no other has its id
                    tensors[name] = moved[id(tensor)][0]
    vars(method)["to"] = lambda *_, **__: method


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _devices(method: nn.Module, training: Training) -> set[str]:
    tensors = [*method.parameters(), *method.buffers(), *training.means._sums.values()]
    for group in training.networks.groups.values():
        tensors += group.optimizer_tensors().values()
    return {str(tensor.device) for tensor in tensors}


def main(vgg: Path) -> None:
    torch.set_num_threads(1)
    setup = backend_registration._setup_privateuseone_for_python_backend
    setup("gpu", _Backend())
    device = torch.device("gpu", 0)
    made = {name: (partial(build, name, vgg), samples_of(name)) for name in METHODS}
    made |= {
        f"omgd_{family}": (partial(omgd_of, family, vgg), samples_of("cyclegan")) for family in ("cyclegan", "pix2pix")
    }
    made |= {"astray": (Astray, regression_samples), "reading": (Reading, regression_samples)}
    found = {}
    for name, (build_method, samples) in made.items():
        options = {"gradient_norms_every": 1, "accumulation": 2, "ema": 0.9}
        found[name] = step(build_method(), samples, device, options)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]))
