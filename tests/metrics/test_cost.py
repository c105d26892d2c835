"""Parameters and multiply-accumulates against the published figures and hand counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcdistill.metrics.cost import cost, image_cost, network_cost, super_resolution_cost
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.unet_generator import UNetGenerator


@pytest.mark.parametrize(
    ("scale", "channels", "macs", "true_macs"),
    [
        (2, 1, 6.007, 2.872),
        (3, 1, 4.992, 1.276),
        (4, 1, 4.637, 0.718),
        (2, 3, 15.013, 5.607),
        (3, 3, 13.640, 2.492),
        (4, 3, 13.159, 1.402),
    ],
)
def test_fsrcnn_as_published(scale: int, channels: int, macs: float, true_macs: float) -> None:
    counted = super_resolution_cost(FSRCNN(scale, channels))
    assert counted.params == {1: 12_644, 3: 24_518}[channels]
    assert round(counted.macs / 1e9, 3) == macs
    assert round(counted.true_macs / 1e9, 3) == true_macs


def test_fsrcnn_by_hand_at_scale_3() -> None:
    # LR pixels of a 1280x720 output, though 1280 is no multiple of 3
    pixels = 1280 * 720 // 9
    body = 25 * 56 + 56 * 12 + 4 * 9 * 12 * 12 + 12 * 56
    counted = super_resolution_cost(FSRCNN(3))
    assert counted.macs == pixels * body + 1280 * 720 * 81 * 56
    assert counted.true_macs == pixels * (body + 81 * 56)


def test_vdsr_as_published() -> None:
    layers = [nn.Conv2d(1, 64, 3, padding=1, bias=False)]
    layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(18)]
    layers += [nn.Conv2d(64, 1, 3, padding=1, bias=False)]
    counted = cost(nn.Sequential(*layers), (1, 1, 720, 1280))
    assert counted.params == 664_704
    assert round(counted.macs / 1e9, 1) == 612.6
    assert counted.macs == counted.true_macs


def test_teacher_charges_every_recursion_and_shares_parameters() -> None:
    def hfrm(height: int, width: int) -> int:
        return height * width * 9 * 56 + (height // 2) * (width // 2) * (9 * 56 * 56 + 9 * 56 * 12 + 9 * 12)

    encoder = hfrm(720, 1280) + hfrm(360, 640)
    student = super_resolution_cost(FSRCNN(4))
    teacher = super_resolution_cost(PrivilegedTeacher(4))
    assert teacher.params == 82_668
    assert teacher.true_macs == encoder + student.true_macs
    assert teacher.macs == encoder + student.macs
    assert super_resolution_cost(PrivilegedTeacher(4, tie_sdm=True)).params == 47_656
    # the training pass has the degradation on top, which runs on the super-resolved image
    trained = cost(PrivilegedTeacher(4), (1, 1, 720, 1280), supervised=True)
    assert trained.true_macs == 2 * encoder + student.true_macs


def test_deployed_form_is_charged_as_it_runs() -> None:
    # x4: 16 channels of 3x3 at LR size; the zeros in the rearranged kernel are multiplied too
    pixels = 1280 * 720 // 16
    body = 25 * 56 + 56 * 12 + 4 * 9 * 12 * 12 + 12 * 56
    counted = super_resolution_cost(FSRCNN(4).deploy())
    assert counted.macs == counted.true_macs == pixels * (body + 16 * 9 * 56)


def test_groups_strides_and_both_rules() -> None:
    module = nn.Sequential(
        nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=4),  # 4 x 5 x 6 outputs, 2 inputs each, 9 taps
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2),  # 6 x 10 x 12 outputs from 4 x 5 x 6 inputs
        nn.Linear(12, 5),  # not a convolution: in the parameters only
    )
    counted = cost(module, (2, 8, 10, 12))
    first = 2 * (4 * 5 * 6) * 2 * 9
    assert counted.macs == first + 2 * (6 * 10 * 12) * 2 * 16
    assert counted.true_macs == first + 2 * (4 * 5 * 6) * 3 * 16
    assert counted.params == (4 * 2 * 9 + 4) + (4 * 3 * 16 + 6) + (12 * 5 + 5)


def test_counts_shared_layers_once_and_leaves_the_module_alone() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    module = nn.Sequential(layer, nn.BatchNorm2d(3), layer).train()
    counted = cost(module, (1, 3, 100_000, 100_000))  # far beyond this machine's memory
    assert counted.params == 84 + 6
    assert counted.macs == 2 * 10**10 * 81
    assert layer.weight.device == torch.device("cpu")
    assert module.training
    assert module[1].num_batches_tracked == 0


def test_each_kind_is_counted_at_the_literatures_size() -> None:
    teacher, unet, discriminator = PrivilegedTeacher(2), UNetGenerator(2, 4, channels_in=1), PatchDiscriminator(6, 2)
    assert network_cost(teacher) == super_resolution_cost(teacher)
    assert network_cost(unet) == image_cost(unet) == cost(unet, (1, 1, 256, 256))
    assert network_cost(discriminator) == cost(discriminator, (1, 6, 256, 256))
    assert cost(unet, (1, 1, 512, 256)).macs == 2 * image_cost(unet).macs
    assert cost(unet, (3, 1, 256, 256)).true_macs == 3 * image_cost(unet).true_macs


def test_a_parametrized_module_is_counted_and_its_state_stays() -> None:
    normalised = nn.utils.parametrizations.spectral_norm(nn.Linear(4 * 6 * 6, 1))
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), normalised).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    counted = cost(module, (1, 1, 6, 6))
    assert counted.params == 4 * 9 + 4 + 144 + 1
    assert counted.macs == 36 * 4 * 9
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
