"""Wavelet KD: its terms by hand, where gradients go, who teaches, and how a run of it is planned."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_cyclegan import DISCRIMINATOR_TERMS, GENERATOR_TERMS
from torch import Tensor, nn
from toy import ToyReader, run
from translation import (
    CROP,
    Phases,
    adversarial,
    batch_of,
    cyclegan,
    l1,
    logits,
    moved,
    pix2pix,
    reached,
    samples,
    state_of,
    wavelet_kd,
)

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.methods.wavelet_kd import WaveletKD
from hpcdistill.metrics.cost import network_cost
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.unet_generator import UNetGenerator
from hpcdistill.settings import identity_values

TAUGHT = {"wavelet": "a2b", "wavelet_b2a": "b2a"}


def distance(student: Tensor, teacher: Tensor, levels: int, power: int) -> float:
    """Block by block: of each level the three details of every 2x2 block."""
    low, whole = (student - teacher).detach(), 0.0
    for _ in range(levels):
        a, b, c, d = (low[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        details = [(a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
        whole += sum((band.abs() ** power).mean().item() for band in details) / 3
        low = (a + b + c + d) / 2
    return whole


@pytest.mark.parametrize("values", [{}, {"power": 2, "levels": 2, "weight_wavelet": 3.0}])
def test_every_term_by_hand(values: dict[str, Any]) -> None:
    method, batch = wavelet_kd(**values).double(), batch_of()
    phases = Phases(method)
    terms = phases.run("student", batch)
    shown = phases.run("discriminator", batch)
    assert sorted(terms) == sorted([*GENERATOR_TERMS, *TAUGHT])
    assert list(shown) == DISCRIMINATOR_TERMS
    g, f = (method.generators[name] for name in ("student", "student_b2a"))
    discriminator = method.judges.discriminators["a2b"]
    levels, power = values.get("levels", 3), values.get("power", 1)
    with torch.no_grad():
        forth, back = g(batch["a"]), f(batch["b"])
        taught = [method.teachers[way](batch[source]) for way, source in (("a2b", "a"), ("b2a", "b"))]
        reference = {
            "gan": adversarial(logits(discriminator, forth), "fool", "lsgan"),
            "cycle": 10 * l1(f(forth), batch["a"]),
            "identity_b2a": 5 * l1(f(batch["a"]), batch["a"]),
            "wavelet": values.get("weight_wavelet", 0.4) * distance(forth, taught[0], levels, power),
            "wavelet_b2a": values.get("weight_wavelet", 0.4) * distance(back, taught[1], levels, power),
        }
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
    assert shown["fake"].item() == pytest.approx(0.5 * adversarial(logits(discriminator, forth), "fake", "lsgan"))


def test_pairs_by_hand() -> None:
    """Hinge, 100 x L1, and a U-Net's image at rest: its BatchNorms use what they have gathered."""
    method, batch = wavelet_kd(family="pix2pix").double(), batch_of()
    terms = Phases(method).run("student", batch)
    student, teacher = method.generators["student"], method.teachers["a2b"]
    with torch.no_grad():
        image = student(batch["a"])
        pair = torch.cat([batch["a"], image], 1)
        reference = {
            "gan": adversarial(logits(method.judges.discriminators["a2b"], pair), "fool", "hinge"),
            "wavelet": 0.4 * distance(image, teacher(batch["a"]), 3, 1),
            "reconstruction": 100 * l1(image, batch["b"]),
        }
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_gradients_reach_the_student_alone(family: str) -> None:
    method, batch = wavelet_kd(family=family), batch_of(torch.float32)
    assert not any(parameter.requires_grad for parameter in method.teachers.parameters())
    phases = Phases(method)
    terms = phases.run("student", batch)
    for name in TAUGHT.keys() & terms.keys():
        wanted = f"translators.by_direction.{TAUGHT[name]}."
        whole = {f"{wanted}{part}" for part, _ in method.translators.by_direction[TAUGHT[name]].named_parameters()}
        assert reached(terms[name], method) == whole, name
    for term in phases.run("discriminator", batch).values():
        assert {name.split(".")[0] for name in reached(term, method)} == {"judges"}
    assert not any(tensor.requires_grad for tensor in phases.carry.values())


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_a_teacher_is_asked_once_a_step_and_stays_as_it_is(family: str, tmp_path: Any) -> None:
    method = wavelet_kd(family=family)
    before = state_of(method.teachers)
    asked: list[tuple[str, bool, bool]] = []
    for way, network in method.teachers.items():
        network.register_forward_hook(
            lambda network, *_, way=way: asked.append((way, network.training, torch.is_grad_enabled()))
        )
    run(method, ToyReader(2, samples), tmp_path, 3)
    ways = list(method.teachers)
    assert ways == (["a2b", "b2a"] if family == "cyclegan" else ["a2b"])
    assert asked == [(way, False, False) for _ in range(3) for way in ways]
    assert moved(method.teachers, before) == set()
    assert moved(method.translators, state_of(wavelet_kd(family=family).translators))


def test_the_student_comes_nearer_to_the_teachers_detail(tmp_path: Any) -> None:
    """On images that it is trained on, against the same run without a teacher; the teacher draws a checkerboard."""

    class Board(UNetGenerator):
        def forward(self, image: Tensor, maps: Any = ()) -> Tensor:
            side = torch.arange(CROP)
            return 0.9 * image + 0.1 * (1 - 2 * ((side[:, None] + side) % 2))

    left = []
    for weight in (0.0, 10.0):
        teachers: dict[str, nn.Module] = {"ab": Board(4, 4)}
        method = wavelet_kd(
            teachers, direction="a2b", weight_wavelet=weight, optimizer={"learning_rate": 2e-3}, weight_identity=0
        )
        run(method, ToyReader(2, samples), tmp_path / str(weight), 30)
        images = batch_of(torch.float32)["a"]
        with torch.no_grad():
            left.append(distance(method.generators["student"](images), teachers["ab"](images), 3, 1))
    assert left[1] < 0.8 * left[0]


def test_one_direction() -> None:
    """The role ab alone; b to a is learnt without a teacher."""
    teachers = {"ab": build_generator("resnet", ngf=6, blocks=2)}
    method = wavelet_kd(teachers, direction="a2b")
    terms = Phases(method).run("student", batch_of(torch.float32))
    assert set(terms) == {*GENERATOR_TERMS, "wavelet"}
    assert {role: wanted.needed for role, wanted in method.config.roles().items()} == {"ab": True, "ba": False}


@pytest.mark.parametrize("family", ["cyclegan", "pix2pix"])
def test_without_the_term_it_is_an_original_of_that_width(family: str) -> None:
    method = wavelet_kd({}, family=family, weight_wavelet=0)
    original = (cyclegan if family == "cyclegan" else pix2pix)(generator=method.config.student.model_dump())
    assert method.config.learns() is False
    for parameter, own in zip(original.parameters(), method.parameters(), strict=True):
        assert torch.equal(parameter, own)
    batch = batch_of(torch.float32)
    terms, found = Phases(original).run("generator", batch), Phases(method).run("student", batch)
    assert {name: value.item() for name, value in terms.items()} == {
        name: value.item() for name, value in found.items()
    }


def test_the_contract() -> None:
    method = wavelet_kd()
    assert method.needs == Needs("unpaired")
    assert wavelet_kd(family="pix2pix").needs == Needs("paired")
    assert list(method.generators) == ["student", "student_b2a"]
    assert list(method.saved) == ["discriminator", "discriminator_b2a"]
    assert list(method.measured) == ["student", "discriminator"]
    assert [(phase.name, phase.group) for phase in method.phases] == [
        ("student", "student"),
        ("discriminator", "discriminator"),
    ]
    assert METHODS["wavelet_kd"] is WaveletKD.Config
    full = WaveletKD(WaveletKD.Config(weight_wavelet=0))
    assert sum(p.numel() for p in full.generators["student"].parameters()) == 715_651  # printed: 0.72 M
    assert sum(p.numel() for p in full.measured["discriminator"].parameters()) == 2_764_737
    # The publication's best discriminator for the small student has about 0.69 M parameters.
    narrow = WaveletKD(WaveletKD.Config(weight_wavelet=0, ndf=32)).measured["discriminator"]
    by_hand = sum(16 * a * b + b for a, b in pairwise((3, 32, 64, 128, 256, 1)))
    assert sum(p.numel() for p in narrow.parameters()) == by_hand == 694_241


def test_where_the_printed_macs_are_from() -> None:
    """By hand, at 256x256: 3.33 G; one more for each element of bias, norm and ReLU: 3.35, twice the 1.68."""
    full, half, quarter = 256**2, 128**2, 64**2
    blocks = 18 * 9 * 64 * 64 * quarter
    downwards = 49 * 3 * 16 * full + 9 * 16 * 32 * half + 9 * 32 * 64 * quarter
    upwards = 9 * 64 * 32 * quarter + 9 * 32 * 16 * half + 49 * 16 * 3 * full  # a transposed convolution by its input
    normalised = 2 * (16 * full + 32 * half) + (1 + 18) * 64 * quarter
    others = (normalised + 3 * full) + normalised + (normalised - 9 * 64 * quarter)  # biases, norms, ReLUs
    counted = network_cost(WaveletKD(WaveletKD.Config(weight_wavelet=0)).generators["student"])
    assert counted.true_macs == blocks + downwards + upwards
    assert counted.macs == counted.true_macs + 3 * (9 * 64 * 32 * quarter + 9 * 32 * 16 * half)
    assert (round(counted.true_macs / 1e9, 2), round(counted.macs / 1e9, 2)) == (3.33, 3.78)
    assert round((counted.true_macs + others) / 2e9, 2) == 1.68


def test_what_says_the_same_is_one_run() -> None:
    config = WaveletKD.Config
    assert identity_values(config(direction="both")) == identity_values(config())
    assert identity_values(config(direction="a2b")) != identity_values(config())
    assert identity_values(config(family="pix2pix", direction="a2b")) == identity_values(config(family="pix2pix"))
    assert config(family="pix2pix").taught == config(direction="a2b").taught


def resnet() -> nn.Module:
    return build_generator("resnet", ngf=4, blocks=1)


@pytest.mark.parametrize(
    ("teachers", "values", "message"),
    [
        ({}, {}, r"teachers\.ab: the method needs a teacher; .*`teachers\.ab\.config`"),
        ({"ab": resnet()}, {}, r"teachers\.ba: the method needs a teacher"),
        ({"ab": PatchDiscriminator()}, {}, r"teachers\.ab: a PatchDiscriminator translates no .*teachers\.ab\.network"),
        ({"ab": FSRCNN(2)}, {}, r"teachers\.ab: a FSRCNN reads lr, wanted is a network of image"),
        (
            {"ab": build_generator("resnet", channels_out=1)},
            {},
            "ResNetGenerator translates no images of three channel",
        ),
        ({"ab": UNetGenerator(2, 5)}, {}, r"teachers\.ab: UNetGenerator with 5 levels.*multiples of 32.*not 48x48"),
        (None, {"levels": 5}, r"method\.levels: 5 levels of wavelets take crops that 2\^5 divides, not 48"),
    ],
)
def test_refusals(teachers: dict[str, nn.Module] | None, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        wavelet_kd(teachers, **values)
    assert "\n" not in str(error.value)


def test_pairs_have_one_direction() -> None:
    with pytest.raises(ValueError, match="direction: pix2pix translates a to b only"):
        WaveletKD.Config(family="pix2pix", direction="both")
