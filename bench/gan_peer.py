"""DCD's released code beside ours, where someone has fetched it (peers.md): `bench/gan.py --peer FOLDER`.

Its own distiller makes its own updates. What it imports and a timing does not need (data sets, metrics, progress bars,
plots) is replaced by stand-ins, VGG16 is random, `.cuda()` does nothing, and the option `lamda_CD`, which it reads but
does not define, is set to the `lambda_CD` that it defines.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from gan_reference import VGG
from torch import Tensor, nn

from hpcdistill.errors import UserError

ABSENT = ("torchvision", "torchprofile", "cv2", "tqdm", "wandb", "data", "metric", "utils.logger", "visdom", "dominate")
WORDS = (
    "--dataroot=none --gpu_ids=-1 --real_stat_A_path=none --real_stat_B_path=none --teacher_ngf=64 --student_ngf=16 "
    "--lambda_CD=1 --teacher_netG=mobile_resnet_9blocks --student_netG=mobile_resnet_9blocks --nepochs=100 "
    "--nepochs_decay=100 --n_dis=4 --AGD_weights=1e4,1e1 --norm=instance --batch_size=1"
)


class Peer:
    """The same calls as `gan_reference.Reference`'s; the images are of batch 1."""

    def __init__(self, folder: Path, place: Path) -> None:
        """`place`: a folder for the logs that it writes."""
        if not (folder / "distillers" / "cycleganbest_distiller.py").is_file():
            raise UserError(f"--peer: {folder} has no distillers/cycleganbest_distiller.py; see bench/peers.md")
        sys.path.insert(0, str(folder))
        for name in ABSENT:
            sys.modules[name] = MagicMock()
        sys.modules["metric"].create_metric_models.return_value = (None, None)  # type: ignore[attr-defined]
        sys.modules["torchvision"].models.vgg16 = lambda **_: MagicMock(features=_vgg())  # type: ignore[attr-defined]
        if not torch.cuda.is_available():
            nn.Module.cuda = lambda self, device=None: self  # type: ignore[assignment,method-assign]
        with contextlib.redirect_stdout(io.StringIO()):
            distiller = importlib.import_module("distillers.cycleganbest_distiller")
            base = importlib.import_module("distillers.base_cycleganbest_distiller")
            base.np.load = lambda path: {}
            options = self._options(distiller.CycleganBestDistiller, place)
            self.model = distiller.CycleganBestDistiller(options)
            self.model.setup(options, verbose=False)

    def teacher(self, a: Tensor, b: Tensor) -> None:
        self.model.set_input({"A": a, "B": b})
        self.model.optimize_parameters(0)

    def student_dcd(self, a: Tensor, b: Tensor) -> None:
        self.model.set_single_input({"A": a, "A_paths": []})
        self.model.optimizer_G_student.zero_grad()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model.backward_G_Student()
        self.model.optimizer_G_student.step()

    def iteration(self, a: Tensor, b: Tensor) -> None:
        self.teacher(a, b)
        self.student_dcd(a, b)

    @staticmethod
    def _options(kind: Any, place: Path) -> argparse.Namespace:
        module = importlib.import_module("options.distill_options")
        parser = argparse.ArgumentParser(conflict_handler="resolve")
        parser = module.DistillOptions.initialize(module.DistillOptions(), parser)
        parser = kind.modify_commandline_options(parser, True)
        options = parser.parse_args([*WORDS.split(), f"--log_dir={place}"])
        options.isTrain, options.gpu_ids, options.lamda_CD = True, [], options.lambda_CD
        return options


def _vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, widths in enumerate(VGG):
        layers += [nn.MaxPool2d(2)] if number else []
        for place in range(len(widths) - 1):
            layers += [nn.Conv2d(widths[place], widths[place + 1], 3, padding=1), nn.ReLU(True)]
    return nn.Sequential(*layers)
