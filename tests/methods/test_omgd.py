"""OMGD: every term by hand, where gradients go, an iteration written out, blocks, resuming, what was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from toy import ToyReader, run
from translation import (
    BATCH,
    CROP,
    FAMILIES,
    LAYERS,
    Phases,
    adversarial,
    batch_of,
    double_samples,
    gram,
    l1,
    logits,
    moved,
    omgd,
    projected,
    reached,
    resumed,
    resumed_blocks,
    samples,
    state_of,
    vgg_maps,
)

from hpcdistill.errors import UserError
from hpcdistill.methods.omgd import OMGD
from hpcdistill.metrics.cost import image_cost
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.image_generator import ImageGenerator
from hpcdistill.run import load_run

ROOT = Path(__file__).resolve().parents[2] / "configs"


# --- the terms -------------------------------------------------------------------------------------------------------


def dissimilarity(first: Tensor, second: Tensor, unit: bool = False) -> float:
    """1 - SSIM by scikit-image, zeros around the images."""
    found = []
    for x, y in zip(first.flatten(0, 1).numpy(), second.flatten(0, 1).numpy(), strict=True):
        pair = ((x + 1) / 2, (y + 1) / 2) if unit else (x, y)
        options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, map_of = structural_similarity(*(np.pad(image, 16) for image in pair), full=True, **options)
        found.append(1 - map_of[16:-16, 16:-16].mean())
    return float(np.mean(found))


@torch.no_grad()
def students_terms(method: OMGD, batch: dict[str, Tensor]) -> dict[str, float]:
    config, layers = method.config, method.config.layers or LAYERS[method.config.family]
    student, own = method.student.translators.by_direction["a2b"](batch["a"], maps=layers)
    teacher, maps = method.translators.by_direction["a2b"](batch["a"], maps=layers)
    targets = {"": teacher}
    if config.family == "pix2pix":
        targets["_deep"] = method.deep.by_direction["a2b"](batch["a"])
    terms = {}
    for suffix, target in targets.items():
        terms[f"ssim{suffix}"] = config.weight_ssim * dissimilarity(student, target, config.ssim_range == "unit")
    if method.vgg is not None:
        of_student = vgg_maps(method.vgg, student)
        for suffix, target in targets.items():
            found = vgg_maps(method.vgg, target)
            terms[f"style{suffix}"] = 1e4 * sum(l1(gram(of_student[name]), gram(found[name])) for name in found)
            terms[f"feature{suffix}"] = 10 * l1(of_student["relu2_2"], found["relu2_2"])
    x = student.numpy()
    variation = np.abs(x[:, :, 1:] - x[:, :, :-1]).sum() + np.abs(x[..., 1:] - x[..., :-1]).sum()
    terms["tv"] = config.weight_tv * len(targets) * variation / BATCH
    distance = 0.0
    for layer in layers:
        connected = projected(method.student.connectors[layer], own[layer])
        distance += ((connected.numpy().mean((2, 3)) - maps[layer].numpy().mean((2, 3))) ** 2).mean()
    terms["channel"] = config.weight_channel * distance
    return terms


CASES: dict[str, dict[str, Any]] = {
    "cyclegan": {},
    "unit": {"ssim_range": "unit", "weight_channel": 100.0, "layers": ("block2", "down2")},
    "pix2pix": {"family": "pix2pix", "weight_tv": 4e-5},
}


@pytest.mark.parametrize("case", CASES)
def test_every_term_by_hand(case: str, vgg: Path) -> None:
    method, batch = omgd(vgg, **CASES[case]).double(), batch_of()
    phases = Phases(method)
    for name in method.groups:
        if name not in ("student", "discriminator"):
            phases.run(name, batch)
    terms = phases.run("student", batch)
    reference = students_terms(method, batch)
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
        assert value > 1e-9, name


def test_the_teachers_and_the_discriminator_by_hand() -> None:
    """Pix2Pix's loss for both; D = 0.5 (wide + real) + 0.5 (deep + real)."""
    method, batch = omgd(family="pix2pix").double(), batch_of()
    a, b, d = batch["a"], batch["b"], method.judges.discriminators["a2b"]
    phases = Phases(method)
    verdicts = {}
    for name, network in (("teacher", method.translators), ("deep", method.deep)):
        terms = phases.run(name, batch)
        with torch.no_grad():
            image = network.by_direction["a2b"](a)
        verdicts[name] = logits(d, torch.cat([a, image], 1))
        expected = {"gan": adversarial(verdicts[name], "fool", "hinge"), "reconstruction": 100 * l1(image, b)}
        assert {key: term.item() for key, term in terms.items()} == pytest.approx(expected, rel=1e-6)
    phases.run("student", batch)
    terms = phases.run("discriminator", batch)
    real = adversarial(logits(d, torch.cat([a, b], 1)), "real", "hinge")
    expected = {"real": real, "fake": 0.5 * adversarial(verdicts["teacher"], "fake", "hinge")}
    expected["fake_deep"] = 0.5 * adversarial(verdicts["deep"], "fake", "hinge")
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(expected, rel=1e-6)


def test_the_cyclegan_s_discriminators_never_see_the_student() -> None:
    method, batch = omgd(), batch_of(torch.float32)
    phases = Phases(method)
    for name in ("teacher", "student"):
        phases.run(name, batch)
    assert [name for name in phases.carry if name.startswith("student")] == []
    assert list(phases.run("discriminator", batch)) == ["real", "fake", "real_b2a", "fake_b2a"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_gradient_reaches_the_student_and_nothing_else(family: str, vgg: Path) -> None:
    method, batch = omgd(vgg, family=family), batch_of(torch.float32)
    phases = Phases(method)
    phases.run("teacher", batch)
    if family == "pix2pix":
        phases.run("deep", batch)
    parts = {name: group.module for name, group in method.groups.items() if name != "student"}
    before = {name: state_of(part) for name, part in parts.items()}
    terms = phases.run("student", batch)
    generator = {name for name, _ in method.named_parameters() if name.startswith("student.translators")}
    connectors = {name for name, _ in method.named_parameters() if name.startswith("student.connectors")}
    assert len(connectors) == 3 * 4
    for name, term in terms.items():
        found = reached(term, method)
        if name == "channel":
            assert found > connectors
            assert found < generator | connectors  # what lies behind the last map has no part in it
        else:
            assert found == generator, name
    torch.stack(list(terms.values())).sum().backward()
    with_gradient = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert with_gradient == generator | connectors
    for name, part in parts.items():
        assert moved(part, before[name]) == set(), name


def test_a_student_that_is_its_teacher_has_nothing_to_learn(vgg: Path) -> None:
    """With one width, its weights, and connectors that change nothing."""
    method, batch = omgd(vgg, student={"ngf": 8, "blocks": 3}).double(), batch_of()
    method.student.translators.load_state_dict(
        {name: value for name, value in method.translators.state_dict().items() if ".a2b." in name}
    )
    for layer in method.layers:
        method.student.connectors[layer] = nn.Identity()
    phases = Phases(method)
    phases.run("teacher", batch)
    terms = {name: term.item() for name, term in phases.run("student", batch).items()}
    assert terms.pop("tv") > 0
    assert terms == pytest.approx(dict.fromkeys(("ssim", "style", "feature", "channel"), 0.0), abs=1e-9)


def test_a_student_comes_near_its_teacher_without_real_targets(vgg: Path) -> None:
    method = omgd(vgg)
    batch = {"a": samples(np.arange(BATCH))["a"]}  # no b: it would be an error to ask for it
    phases = Phases(method)
    adam = torch.optim.Adam(method.student.parameters(), 2e-3, betas=(0.5, 0.999))

    def distance() -> float:
        with torch.no_grad():
            images = [part.by_direction["a2b"](batch["a"]) for part in (method.student.translators, method.translators)]
        return l1(*images)

    before, history = distance(), []
    for _ in range(40):
        phases.carry.clear()
        terms = phases.run("student", batch)
        adam.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        adam.step()
        history.append({name: term.item() for name, term in terms.items()})
    assert distance() < 0.75 * before
    for name in ("ssim", "style", "feature", "channel"):
        assert history[-1][name] < 0.8 * history[0][name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_twice(family: str, vgg: Path) -> None:
    method, batch = omgd(vgg, family=family), batch_of(torch.float32)
    calls: list[str] = []
    networks = {"teacher": method.translators, "student": method.student.translators}
    if family == "pix2pix":
        networks["deep"] = method.deep
    for role, network in networks.items():
        for direction, generator in network.by_direction.items():
            generator.register_forward_hook(lambda *_, name=f"{role} {direction}": calls.append(name))
    assert method.vgg is not None
    method.vgg.register_forward_hook(lambda *_: calls.append("vgg"))
    phases = Phases(method)
    for name in method.teachers:
        phases.run(name, batch)
    calls.clear()
    phases.run("student", batch)
    assert sorted(calls) == sorted(["student a2b"] + ["vgg"] * (2 if family == "cyclegan" else 3))


# --- an iteration, blocks, resuming ----------------------------------------------------------------------------------


def test_an_iteration_of_pairs_is_the_released_one(tmp_path: Path, vgg: Path) -> None:
    """All images first; D, wide and deep teacher from them, with D as it was; the student against the same images."""
    values = {"family": "pix2pix", "optimizer": {"schedule": "constant"}}
    method = omgd(vgg, **values).double()
    run(method, ToyReader(BATCH, double_samples), tmp_path, 2)
    hand = omgd(vgg, **values).double().train()
    adams = [torch.optim.Adam(group.module.parameters(), lr=2e-4, betas=(0.5, 0.999)) for group in hand.groups.values()]
    d = hand.judges.discriminators["a2b"]
    for step in range(2):
        batch = double_samples(np.arange(step * BATCH, (step + 1) * BATCH))
        a, b = batch["a"], batch["b"]
        wide, maps = hand.translators.by_direction["a2b"](a, maps=LAYERS["pix2pix"])
        deep = hand.deep.by_direction["a2b"](a)
        of_d = 0.5 * (
            (1 + d(torch.cat([a, wide.detach()], 1))).relu().mean() + (1 - d(torch.cat([a, b], 1))).relu().mean()
        )
        of_d = of_d + 0.5 * (
            (1 + d(torch.cat([a, deep.detach()], 1))).relu().mean() + (1 - d(torch.cat([a, b], 1))).relu().mean()
        )
        of_teachers = sum(-d(torch.cat([a, x], 1)).mean() + 100 * (x - b).abs().mean() for x in (wide, deep))
        phases = Phases(hand)
        for name, image in (("teacher", wide), ("deep", deep)):
            phases.carry[name] = image.detach()
        for layer, value in maps.items():
            phases.carry[f"teacher.{layer}"] = value.detach()
        phases.freezer.release()
        of_student = torch.stack(list(hand.student_loss(batch, phases.carry, None).values())).sum()  # type: ignore[arg-type]
        gradients = []
        for name, loss in (
            ("teacher", of_teachers),
            ("deep", of_teachers),
            ("student", of_student),
            ("discriminator", of_d),
        ):
            parameters = list(hand.groups[name].module.parameters())
            gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
        for adam, found in zip(adams, gradients, strict=True):
            for parameter, gradient in zip(adam.param_groups[0]["params"], found, strict=True):
                parameter.grad = gradient
            adam.step()
    for name, value in hand.named_parameters():
        found = dict(method.named_parameters())[name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("killed", [5, 11, 14])
def test_killed_blocks_resume_bit_equal(killed: int, tmp_path: Path) -> None:
    lines = resumed_blocks(omgd, tmp_path, killed)
    phases = [sorted({key.split("/")[0] for key in row if key.endswith(("/ssim", "/real"))}) for row in lines]
    assert phases == ([["discriminator"]] * 2 + [["student"]] * 8) * 2


def test_killed_pairs_resume_bit_equal(tmp_path: Path) -> None:
    def train(folder: Path, before: Callable[[int], None]) -> None:
        reader = ToyReader(BATCH, samples, before=before)
        run(omgd(family="pix2pix", student_steps=2), reader, folder, 5, checkpoint_every=2)

    assert [row["step"] for row in resumed(train, tmp_path, 7)] == [1, 2, 3, 4, 5]


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "channel", "tv", "batch"),
    [
        ("horse2zebra", 500, 1e-5, 1),
        ("summer2winter", 100, 1e-5, 1),
        ("edges2shoes", 10, 4e-5, 4),
        ("edges2shoes-r", 10, 4e-5, 4),
    ],
)
def test_the_values_as_published(data: str, channel: float, tv: float, batch: int) -> None:
    """Parameters and MACs of gan_zoo.md; the released sum over a batch of four is four times our mean."""
    loaded = load_run([str(ROOT / "omgd" / f"{data}.yaml")])
    config, method = loaded.config, loaded.config.method
    assert isinstance(method, OMGD.Config)
    assert (method.weight_ssim, method.weight_style, method.weight_feature) == (10, 1e4, 10)
    assert (method.weight_channel, method.weight_tv, config.train.batch_size) == (channel, tv, batch)
    assert method.feature_layers == ("relu2_2",)
    assert method.style_layers == ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    assert (method.weight_cycle, method.weight_identity, method.weight_reconstruction) == (10, 5, 100)
    assert (config.data.load_size, config.data.crop, method.crop, method.ssim_range) == (286, 256, 256, "signed")
    with torch.device("meta"):
        built = method.build()
    counted = {name: image_cost(module) for name, module in built.measured.items()}
    numbers = {
        name: (round(cost.params / 1e6, 3), round(cost.macs / 1e9, 3), round(cost.true_macs / 1e9, 3))
        for name, cost in counted.items()
    }
    expected = {
        "cyclegan": {"student": (0.137, 1.408, 0.955), "teacher": (1.987, 18.314, 11.067)},
        "pix2pix": {
            "student": (3.404, 1.219, 0.406),
            "teacher": (54.414, 18.14, 6.048),
            "deep": (44.172, 18.344, 17.532),
        },
    }[method.family]
    assert {name: numbers[name] for name in expected} == expected
    judges = list(built.judges.discriminators.values())
    assert all(isinstance(judge, PatchDiscriminator) for judge in judges)
    sizes = [sum(p.numel() for p in judge.parameters()) for judge in judges]
    assert sizes == ([2_764_737] * 2 if method.family == "cyclegan" else [11_042_433])


@pytest.mark.parametrize(("width", "params", "macs"), [(12, 0.0805, 0.858), (8, 0.0387, 0.44)])
def test_the_published_smaller_students(width: int, params: float, macs: float) -> None:
    loaded = load_run([str(ROOT / "omgd" / "horse2zebra.yaml"), f"method.student.ngf={width}", "method.teacher.ngf=48"])
    with torch.device("meta"):
        counted = image_cost(loaded.config.method.build().measured["student"])
    assert (round(counted.params / 1e6, 4), round(counted.macs / 1e9, 3)) == (params, macs)


def test_the_contract() -> None:
    method = omgd(schedule="blocks", blocks=2)
    assert list(method.generators) == ["student", "teacher", "teacher_b2a"]
    assert list(method.groups) == ["teacher", "student", "discriminator"]
    assert sorted(method.memory) == ["pool_teacher", "pool_teacher_b2a"]
    assert list(method.measured) == ["student", "teacher", "original", "discriminator"]
    pairs = omgd(family="pix2pix")
    assert list(pairs.generators) == ["student", "teacher", "deep"]
    assert [phase.name for phase in pairs.phases] == ["teacher", "deep", "student", "discriminator"]
    assert list(pairs.measured) == ["student", "teacher", "deep", "original", "discriminator"]
    assert pairs.needs.kind == "paired"
    for built in (method, pairs):
        trained = [id(p) for group in built.groups.values() for p in group.module.parameters()]
        assert len(trained) == len(set(trained)) == len(list(built.parameters()))
        assert all(isinstance(network, ImageGenerator) for network in built.generators.values())
    assert omgd(weight_channel=0).layers == ()
    assert omgd(weight_ssim=0, weight_tv=0).config.weights() == ()
    assert OMGD.Config().weights() == ("vgg16",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"weight_{name}": 0 for name in ("ssim", "style", "feature", "channel")}, "the student would learn nothing"),
        ({"family": "pix2pix", "schedule": "blocks", "blocks": 2}, "schedule: blocks is of cyclegan"),
        ({"schedule": "blocks"}, "needs the number of pairs of blocks"),
        ({"feature_layers": ["relu2_3"]}, "no layer 'relu2_3'"),
        ({"deep": {"network": "deep"}}, "unknown generator 'deep'"),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OMGD.Config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": ("down2", "block4")}, r"method.layers: of the teacher: .*no feature map 'block4'"),
        ({"layers": ("block3",), "student": {"blocks": 2}}, r"method.layers: of the student: .*'block3'"),
        (
            {"family": "pix2pix", "deep": {"levels": 5}},
            "DeepUNetGenerator with 5 levels takes .*not 48x48.*levels to 4",
        ),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        omgd(**values)
    assert "\n" not in str(error.value)
    assert CROP == 48
