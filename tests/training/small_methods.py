"""Every method there is, as small as its classes allow, with data for it: for tests that run over all of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from toy import SEED, uniform
from translation import cyclegan, double_samples, pix2pix, small, wavelet_kd, write_vgg

from hpcdistill.methods import perceptual
from hpcdistill.methods.base import Method
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.image_distillation import ImageDistillation
from hpcdistill.methods.omgd import OMGD
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.methods.student_gan import StudentGAN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.vgg import VGG16Features, load_vgg16
from hpcdistill.training.evaluation import Evaluation

SCALE = 2
CROP = 32  # maps of 8x8 pixels; of 6x6 a spectrum has two values, stretched to 0 and 1: it would teach nothing
# The GANs learn slowly, from few maps, and their ResNets are dense and shallow, or rounding grows: with three separable
# blocks, all maps and 2e-4 FESD's weights on 1 and 2 ranks were 1e-3 apart after 14 steps. So were those of two runs on
# ONE rank when one image of one of them had been multiplied by 1 + 1e-15, on the same curve (2e-11 after the first
# step, 1e-7 after 9, 4e-4 after 11): it was rounding that grew, and nothing depended on the ranks.
SLOW = {"learning_rate": 2e-5}
Samples = Callable[[NDArray[np.int64]], dict[str, Tensor]]
__all__ = ["METHODS", "Ramp", "build", "image_distillation_of", "omgd_of", "samples_of", "wavelet_kd_of", "write_vgg"]


def sr_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """hr [B, 1, 16, 16], smooth noise in [0, 1], and its averages lr2: float64."""
    drawn = torch.from_numpy(uniform(numbers, 25)).view(-1, 1, 5, 5)
    hr = nn.functional.interpolate(drawn, (16, 16), mode="bilinear")
    return {"hr": hr, f"lr{SCALE}": nn.functional.avg_pool2d(hr, SCALE)}


def _small_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: images[..., :CROP, :CROP].contiguous() for name, images in double_samples(numbers).items()}


def _plain_sr(vgg: Path) -> Method:
    return PlainSR(PlainSR.Config(scale=SCALE))


def _privileged_teacher(vgg: Path) -> Method:
    return PrivilegedTeacherTraining(PrivilegedTeacherTraining.Config(scale=SCALE, weight_fre=0.3, weight_deg=0.5))


def _privileged_student(vgg: Path, **values: Any) -> Method:
    config = PrivilegedStudent.Config(scale=SCALE, weight_vid=0.01, **values)
    return PrivilegedStudent(config, {"teacher": PrivilegedTeacher(SCALE, 1)})


def _cyclegan(vgg: Path) -> Method:
    return cyclegan(crop=CROP, discriminator_strides=1, generator=small({"blocks": 1}, 3), optimizer=SLOW)


def _pix2pix(vgg: Path) -> Method:
    return pix2pix(crop=CROP, discriminator_strides=1, optimizer=SLOW)


def _distilled(vgg: Path, **values: Any) -> Method:
    given: dict[str, Any] = {"ndf": 4, "discriminator_strides": 1, "crop": CROP, "vgg": str(vgg)}
    given |= {"style_layers": ("relu1_1",), "feature_layers": ("relu1_1",)}
    given |= {"optimizer": SLOW}
    if values.get("family") == "pix2pix":
        given |= {
            "teacher": small({}, 12),
            "student": small({}, 8),
            "layers": ("down2", "up2"),
            "shift": {"rate": 0.25},
        }
    else:
        shape = {"blocks": 1, "separable": False}
        given |= {"teacher": small(shape, 6), "student": small(shape, 4), "pool": 3, "layers": ("down2",)}
    return _prepared(DistilledGAN(DistilledGAN.Config(**(given | values))))


def omgd_of(family: str, vgg: Path) -> Method:
    """OMGD; in no test over all methods: what those are for it shares with the others."""
    shape = {"blocks": 1, "separable": False}
    given: dict[str, Any] = {"ndf": 4, "discriminator_strides": 1, "crop": CROP, "vgg": str(vgg), "optimizer": SLOW}
    given |= {"style_layers": ("relu1_1",), "feature_layers": ("relu1_1",)}
    given |= {"teacher": small(shape, 6), "student": small(shape, 4), "deep": {"ngf": 4, "levels": 4}}
    layers = ("down2",) if family == "cyclegan" else ("down2", "up2")
    return _prepared(OMGD(OMGD.Config(family=family, layers=layers, pool=3, **given)))


def wavelet_kd_of(family: str, vgg: Path) -> Method:
    """Wavelet KD; in no test over all methods, as OMGD."""
    student = small({"blocks": 1}, 8 if family == "pix2pix" else 3)
    return wavelet_kd(family=family, crop=CROP, discriminator_strides=1, student=student, optimizer=SLOW)


def image_distillation_of(vgg: Path) -> Method:
    """Image distillation of a U-Net; as OMGD in no test over all methods."""
    given: dict[str, Any] = {"crop": CROP, "vgg": str(vgg), "optimizer": SLOW, "weight_tv": 1e-5}
    given |= {"style_layers": ("relu1_1",), "feature_layers": ("relu1_1",)}
    given["student"] = small({"network": "unet"}, 4)
    return _prepared(ImageDistillation(ImageDistillation.Config(**given)))


def _prepared(method: StudentGAN | ImageDistillation) -> Method:
    with mock.patch.object(perceptual, "load_vgg16", _loaded_vgg):
        method.prepare(CROP)
    return method


def _loaded_vgg(source: str, layers: Iterable[str], normalise: bool) -> VGG16Features:
    return copy.deepcopy(_vgg(source, tuple(layers), normalise))


@functools.cache
def _vgg(source: str, layers: tuple[str, ...], normalise: bool) -> VGG16Features:
    """Read once: 60 MB, of which the tests use two layers."""
    return load_vgg16(source, layers, normalise)


METHODS: dict[str, Callable[[Path], Method]] = {
    "plain_sr": _plain_sr,
    "privileged_teacher": _privileged_teacher,
    "privileged_student": _privileged_student,
    "privileged_student_gaussian": partial(_privileged_student, vid="gaussian", initialise="random"),
    "cyclegan": _cyclegan,
    "pix2pix": _pix2pix,
    "fesd_unpaired": _distilled,
    "fesd_paired": partial(_distilled, family="pix2pix", mix_spectral=True),
    "dcd_unpaired": partial(
        _distilled, weight_spectral=0, projection="trained", schedule="blocks", block_steps=2, blocks=2
    ),
    "dcd_paired": partial(
        _distilled,
        family="pix2pix",
        weight_spectral=0,
        projection="shared",
        student={"ngf": 12, "levels": 4},
        schedule="blocks",
        block_steps=2,
        blocks=2,
    ),
}


def build(name: str, vgg: Path) -> Method:
    """The method in float64, the same weights on every rank."""
    torch.manual_seed(SEED)
    return METHODS[name](vgg).double()


def samples_of(name: str) -> Samples:
    return sr_samples if name.startswith(("plain", "privileged")) else _small_samples


class Ramp:
    """Finds each evaluation better than the one before: blocks of DCD go on from the weights they have."""

    selects: str | None = "student/toy/score"
    larger_is_better = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, *_: Any) -> Evaluation:
        self.calls += 1
        return Evaluation({"student/toy/score": float(self.calls), "teacher/toy/score": float(self.calls)})

    def protocol(self) -> dict[str, Any]:
        return {}
