"""FESD, DCD and what lies between them: every term by hand, where gradients go, what stays, blocks, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy import ToyReader, rows, run
from translation import (
    BATCH,
    CROP,
    FAMILIES,
    LAYERS,
    Phases,
    activation,
    adversarial,
    area,
    batch_of,
    distilled,
    gram,
    l1,
    logits,
    moved,
    opinion,
    pieces,
    profile,
    projected,
    reached,
    samples,
    shifted,
    state_of,
    vgg_maps,
)

from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS, distilled_gan, translation_gan
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.gan_settings import A2B, B2A
from hpcdistill.run import load_run
from hpcdistill.settings import identity_values

STUDENT_TERMS = ["gan", "style", "feature", "dcd", "spectral"]
SIDE = CROP // 4


@torch.no_grad()
def compared(method: DistilledGAN, direction: str, batch: dict[str, Tensor], layers: tuple[str, ...]) -> Any:
    """(the student's, the teacher's) projected maps by hand: moved, projected, enlarged."""
    source = batch[direction[0]]
    shift, config = method.config.shift, method.config
    found = []
    for role, network in (("student", method.student.translators), ("teacher", method.translators)):
        _, maps = network.by_direction[direction](source, maps=layers)
        trained = method.student.own if role == "student" or config.projection == "shared" else method.student.teachers
        owner = trained if direction in trained else method.fixed_projections
        projections = owner[direction].projections
        images = []
        for layer in layers:
            x = maps[layer]
            if shift.mode == "bi" and shift.place == "before":
                x = shifted(x, x.shape[1] // 8)  # a multiple of 2 in these networks
            x = projected(projections[layer], x)
            if shift.mode == "bi" and shift.place == "after":
                x = shifted(x, 2 * int(shift.rate * x.shape[1] / 2))
            images.append(x if x.shape[2] == SIDE else nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear"))
        found.append(images)
    return found


def looked_at(method: DistilledGAN, direction: str, images: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The profiles of target images that the classifier sees."""
    if method.config.spectrum == "crop":
        return profile(pieces(images, SIDE, batch["number"], ("a2b", "b2a").index(direction)))
    return profile(area(images, SIDE))


@torch.no_grad()
def students_terms(method: DistilledGAN, batch: dict[str, Tensor], direction: str, kind: str) -> dict[str, float]:
    """Equations 8 to 13 for the student."""
    config = method.config
    source = batch[direction[0]]
    student = method.student.translators.by_direction[direction](source)
    teacher = method.translators.by_direction[direction](source)
    d = method.judges.discriminators[direction]
    paired = config.family == "pix2pix"
    verdict = logits(d, torch.cat([source, student], 1) if paired else student)
    classifier = dict(method.judges.classifiers.items()).get(direction)
    if config.mix_spectral:
        assert classifier is not None
        verdict = (
            0.5 * verdict + 0.5 * opinion(classifier, looked_at(method, direction, student, batch))[:, :, None, None]
        )
    terms = {"gan": config.weight_student * adversarial(verdict, "fool", kind)}
    if method.vgg is not None:
        of_student, of_teacher = vgg_maps(method.vgg, student), vgg_maps(method.vgg, teacher)
        layers = config.style_layers
        terms["style"] = 1e4 * sum(l1(gram(of_student[layer]), gram(of_teacher[layer])) for layer in layers)
        terms["feature"] = 10 * sum(l1(of_student[layer], of_teacher[layer]) for layer in config.feature_layers)
    own, teachers = compared(method, direction, batch, config.layers or LAYERS[config.family])
    layers = (3,) if config.discriminator_layer is None else np.atleast_1d(config.discriminator_layer).tolist()
    pairs = list(zip(own, teachers, strict=True))
    distances = [l1(activation(d, s, k), activation(d, t, k)) for s, t in pairs for k in layers]
    terms["dcd"] = config.weight_dcd * sum(distances)
    if classifier is not None:
        distances = [l1(opinion(classifier, profile(s)), opinion(classifier, profile(t))) for s, t in pairs]
        terms["spectral"] = config.weight_spectral * sum(distances)
    return terms


def check(method: DistilledGAN, batch: dict[str, Tensor], kind: str) -> dict[str, float]:
    """One iteration's terms, those of student and discriminators compared with a computation by hand."""
    phases = Phases(method)
    all_terms = phases.run("teacher", batch)
    terms = phases.run("student", batch)
    reference: dict[str, float] = {}
    for direction in method.student_directions:
        found = students_terms(method, batch, direction.name, kind)
        reference |= {name + direction.suffix: value for name, value in found.items()}
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
        assert terms[name].item() > 1e-9, name
    all_terms |= {f"student/{name}": term for name, term in terms.items()}
    terms = phases.run("discriminator", batch)
    reference = discriminators_terms(method, batch, kind)
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
    return {name: term.item() for name, term in {**all_terms, **terms}.items()}


@torch.no_grad()
def discriminators_terms(method: DistilledGAN, batch: dict[str, Tensor], kind: str) -> dict[str, float]:
    """0.5 (real + generated), of which the student has the share lambda / (1 + lambda); the pools are empty."""
    weight = method.config.weight_student
    reference: dict[str, float] = {}
    for direction in method.family.directions:
        source, target = batch[direction.source], batch[direction.target]
        learns = weight > 0 and direction in method.student_directions
        images = [("real", target, 0.5), ("fake", method.translators.by_direction[direction.name](source), 0.5)]
        if learns:
            images[1] = (*images[1][:2], 0.5 / (1 + weight))
            student = method.student.translators.by_direction[direction.name](source)
            images.append(("fake_student", student, 0.5 * weight / (1 + weight)))
        of_classifier, of_discriminator = {}, {}
        for name, image, share in images:
            to = "real" if name == "real" else "fake"
            pair = torch.cat([source, image], 1) if method.family.conditional else image
            verdict = logits(method.judges.discriminators[direction.name], pair)
            if direction.name in method.judges.classifiers and method.config.spectrum != "maps":
                profiles = looked_at(method, direction.name, image, batch)
                spectral = opinion(method.judges.classifiers[direction.name], profiles)
                of_classifier[f"spectral_{name}{direction.suffix}"] = share * adversarial(spectral, to, kind)
                if method.config.mix_spectral:
                    verdict = 0.5 * verdict + 0.5 * spectral[:, :, None, None]
            of_discriminator[name + direction.suffix] = share * adversarial(verdict, to, kind)
        if direction.name in method.judges.classifiers and method.config.spectrum == "maps":
            student, teacher = compared(method, direction.name, batch, LAYERS[method.config.family])
            for name, maps in (("real", teacher), ("fake_student", student)):
                spectral = opinion(method.judges.classifiers[direction.name], profile(torch.cat(maps)))
                to = "real" if name == "real" else "fake"
                of_classifier[f"spectral_{name}{direction.suffix}"] = 0.5 * adversarial(spectral, to, kind)
        reference |= of_classifier | of_discriminator
    return reference


CASES: dict[str, dict[str, Any]] = {
    "fesd": {},
    "both directions": {"direction": "both"},
    "lambda_stu": {"weight_student": 0.25, "discriminator_layer": 2},
    "a set of D's layers": {"discriminator_layer": [3, 1]},
    "mixed": {"mix_spectral": True},
    "pieces": {"spectrum": "crop", "direction": "both"},
    "pieces, mixed": {"spectrum": "crop", "mix_spectral": True, "direction": "both"},
    "maps": {"spectrum": "maps", "direction": "both"},
    "maps, lambda_stu": {"spectrum": "maps", "weight_student": 0.25},
    "after": {"shift": {"place": "after", "rate": 0.67}},
    "trained": {"projection": "trained"},
    "shared": {"projection": "shared", "student": {"ngf": 8, "blocks": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_term_by_hand(case: str) -> None:
    check(distilled(**CASES[case]).double(), batch_of(), "lsgan")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mix_spectral": True, "shift": {"mode": "none"}},
        {"mix_spectral": True, "spectrum": "crop"},
        {"spectrum": "maps"},
    ],
)
def test_every_term_by_hand_for_pairs(values: dict[str, Any]) -> None:
    check(distilled(family="pix2pix", **values).double(), batch_of(), "hinge")


@pytest.mark.parametrize(
    ("family", "values"), [("cyclegan", {"feature_layers": ["relu2_2"]}), ("pix2pix", {"vgg_normalise": False})]
)
def test_every_term_by_hand_with_vgg(family: str, values: dict[str, Any], vgg: Path) -> None:
    method = distilled(vgg, family=family, **values).double()
    assert list(check(method, batch_of(), "lsgan" if family == "cyclegan" else "hinge"))
    assert method.origins["vgg16"].startswith("random.safetensors")


def test_the_teacher_learns_as_an_original_does() -> None:
    """Its terms are those of `cyclegan`, which has its own test."""
    method, batch = distilled().double(), batch_of()
    terms = Phases(method).run("teacher", batch)
    g, f = (method.translators.by_direction[name] for name in ("a2b", "b2a"))
    a, b = batch["a"], batch["b"]
    with torch.no_grad():
        reference = {
            "gan": adversarial(logits(method.judges.discriminators["a2b"], g(a)), "fool", "lsgan"),
            "identity": 5 * l1(g(b), b),
            "gan_b2a": adversarial(logits(method.judges.discriminators["b2a"], f(b)), "fool", "lsgan"),
            "identity_b2a": 5 * l1(f(a), a),
            "cycle": 10 * l1(f(g(a)), a),
            "cycle_b2a": 10 * l1(g(f(b)), b),
        }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("spectrum", ["shrunk", "crop", "maps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_gradient_reaches_the_student_and_nothing_else(family: str, spectrum: str, vgg: Path) -> None:
    method, batch = distilled(vgg, family=family, spectrum=spectrum), batch_of(torch.float32)
    phases = Phases(method)
    phases.run("teacher", batch)
    terms = phases.run("student", batch)
    assert list(terms) == STUDENT_TERMS
    generator = {name for name, _ in method.named_parameters() if name.startswith("student.translators")}
    projections = {name for name, _ in method.named_parameters() if name.startswith("student.own")}
    assert len(projections) == 3 * 4
    for name in ("gan", "style", "feature"):
        assert reached(terms[name], method) == generator, name
    head = {"cyclegan": ("up1.", "up2.", "head."), "pix2pix": ("up2.", "up1.")}[family]  # behind the last map
    behind = {name for name in generator if name.split("a2b.")[1].startswith(head)}
    assert behind
    for name in ("dcd", "spectral"):
        assert reached(terms[name], method) == generator - behind | projections, name
    assert not any(tensor.requires_grad for tensor in phases.carry.values())
    torch.stack(list(terms.values())).sum().backward()
    with_gradient = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert with_gradient == generator | projections


@pytest.mark.parametrize("family", FAMILIES)
def test_a_students_step_moves_nothing_of_the_others(family: str) -> None:
    """No statistics of BatchNorm, no vectors of the spectral norm, no frozen projection."""
    method, batch = distilled(family=family), batch_of(torch.float32)
    phases = Phases(method)
    parts = {"teacher": method.translators, "judges": method.judges, "projections": method.fixed_projections}
    phases.run("teacher", batch)
    # As after an update: the vectors of the spectral norm are those of another weight.
    method.judges.classifiers["a2b"].linear.parametrizations.weight.original.data.add_(torch.linspace(-1, 1, 6))
    before = {name: state_of(part) for name, part in parts.items()}
    own = state_of(method.student)
    torch.stack(list(phases.run("student", batch).values())).sum().backward()
    for name, part in parts.items():
        assert moved(part, before[name]) == set(), name
    assert any(name.endswith("running_mean") for name in moved(method.student, own))
    assert not any(module.training for module in method.fixed_projections.modules())
    before["student"] = state_of(method.student)
    phases.run("discriminator", batch)
    assert any("_u" in name or "_v" in name for name in moved(method.judges, before["judges"]))  # now they do
    for name, part in (("teacher", method.translators), ("student", method.student)):
        assert moved(part, before[name]) == set(), name


def test_a_classifier_learns_from_its_own_loss_alone() -> None:
    """Also where the discriminator's loss sees half of it, and where it learns from the student's maps."""
    for values in ({"mix_spectral": True}, {"mix_spectral": True, "spectrum": "crop"}, {"spectrum": "maps"}):
        method, batch = distilled(**values), batch_of(torch.float32)
        phases = Phases(method)
        phases.run("teacher", batch)
        phases.run("student", batch)
        for name, term in phases.run("discriminator", batch).items():
            part = "classifiers" if name.startswith("spectral") else "discriminators"
            assert {parameter.split(".")[1] for parameter in reached(term, method)} == {part}, name


@pytest.mark.parametrize("pattern", ["squares of two pixels", "an up-convolution's"])
def test_a_fine_checkerboard_is_seen_in_pieces_and_not_shrunk(pattern: str) -> None:
    """A mean over 4x4 pixels has nothing of it. (Squares of one pixel are in the rings that phi drops.)"""
    batch = batch_of()
    x = torch.arange(CROP, dtype=torch.float64)
    if pattern == "an up-convolution's":  # of stride 2: every second row and every second column
        planted = 0.05 * (torch.cos(torch.pi * x)[:, None] + torch.cos(torch.pi * x))
    else:
        planted = 0.05 * torch.sign(torch.cos(torch.pi / 2 * (x - 0.5)))
        planted = planted[:, None] * planted / 0.05
    change = {}
    for spectrum in ("shrunk", "crop"):
        method = distilled(spectrum=spectrum)
        profiles = [method.profile(A2B, batch["b"] + add, batch["number"]) for add in (0, planted)]
        change[spectrum] = (profiles[0] - profiles[1]).abs().amax().item()
    assert change["shrunk"] < 1e-9
    assert change["crop"] > 0.04


def test_a_piece_s_place_depends_on_its_sample_alone() -> None:
    """Not on what else is in the batch; a direction, a seed and a sample each have their own."""
    method = distilled(spectrum="crop", direction="both")
    images = torch.rand(1, 3, CROP, CROP, generator=torch.Generator().manual_seed(0)).expand(40, -1, -1, -1)
    numbers = torch.arange(40)
    whole = method.profile(A2B, images, numbers)
    assert torch.equal(method.profile(A2B, images[:3], numbers[[30, 4, 17]]), whole[[30, 4, 17]])
    assert len({tuple(row) for row in whole.tolist()}) > 38
    assert not torch.equal(method.profile(B2A, images, numbers), whole)
    torch.manual_seed(1)
    other = DistilledGAN(method.config)
    assert not torch.equal(other.profile(A2B, images, numbers), whole)


def test_a_reading_that_nothing_reads_makes_no_other_run() -> None:
    settings = {name: DistilledGAN.Config(spectrum=name, weight_spectral=0) for name in ("shrunk", "crop", "maps")}
    assert settings["shrunk"] == settings["crop"] == settings["maps"]
    mixed = DistilledGAN.Config(spectrum="crop", weight_spectral=0, mix_spectral=True)
    assert (mixed.spectrum, DistilledGAN.Config(spectrum="maps").spectrum) == ("crop", "maps")
    root = Path(__file__).resolve().parents[2] / "configs"
    shipped = [str(root / "fesd" / "horse2zebra.yaml")]
    older = load_run([*shipped, str(root / "variants" / "spectrum-shrunk.yaml")])
    assert "spectrum" not in identity_values(older.config.method)  # as runs of before it was a choice
    assert identity_values(load_run(shipped).config.method)["spectrum"] == "crop"


def test_every_reading_of_the_spectrum_has_a_classifier_of_one_size() -> None:
    """L_spectral asks it about maps, whatever it learned from: 64x64 of 256 pixels, 43 rings."""
    for family in FAMILIES:
        for spectrum in ("shrunk", "crop", "maps"):
            with torch.device("meta"):
                method = DistilledGAN(DistilledGAN.Config(family=family, spectrum=spectrum, weight_style=0))
            assert method.judges.classifiers["a2b"].rings == 43


def test_a_teachers_step_moves_nothing_of_the_others() -> None:
    method, batch = distilled(family="pix2pix", mix_spectral=True), batch_of(torch.float32)
    phases = Phases(method)
    before = {name: state_of(part) for name, part in (("judges", method.judges), ("student", method.student))}
    phases.run("teacher", batch)
    assert moved(method.judges, before["judges"]) == moved(method.student, before["student"]) == set()


def test_a_trained_projection_of_the_teacher_trains() -> None:
    for projection, values in (("trained", {}), ("shared", {"student": {"ngf": 8, "blocks": 3}})):
        method, batch = distilled(projection=projection, **values), batch_of(torch.float32)
        phases = Phases(method)
        phases.run("teacher", batch)
        found = {name.split(".")[1] for name in reached(phases.run("student", batch)["dcd"], method)}
        assert found == ({"translators", "own", "teachers"} if projection == "trained" else {"translators", "own"})
        assert "projections" not in method.memory


def test_dcd_is_fesd_without_shift_and_spectral_term() -> None:
    """The configurations say so, and the terms that are left are the same but for the shift."""
    root = Path(__file__).resolve().parents[2] / "configs"
    for data in ("horse2zebra", "summer2winter", "edges2shoes"):
        fesd, dcd = (load_run([str(root / row / f"{data}.yaml")]).config.method for row in ("fesd", "dcd"))
        assert isinstance(fesd, DistilledGAN.Config)
        assert isinstance(dcd, DistilledGAN.Config)
        assert fesd.shift.mode == "bi"
        without = fesd.shift.model_copy(update={"mode": "none"})
        assert (fesd.spectrum, dcd.spectrum) == ("crop", "shrunk")  # dcd has no classifier
        assert dcd == fesd.model_copy(update={"shift": without, "weight_spectral": 0.0, "spectrum": "shrunk"})
        plus = load_run([str(root / "fesd" / f"{data}.yaml"), str(root / "variants" / "bl-pcs.yaml")]).config.method
        assert plus == fesd.model_copy(update={"weight_spectral": 0.0, "spectrum": "shrunk"})
    batch = batch_of()
    found = []
    for values in ({}, {"weight_spectral": 0}, {"weight_spectral": 0, "shift": {"mode": "none"}}):
        phases = Phases(distilled(**values).double())
        phases.run("teacher", batch)
        found.append({name: term.item() for name, term in phases.run("student", batch).items()})
    full, plus_pcs, baseline = found
    assert list(full) == ["gan", "dcd", "spectral"]
    assert list(plus_pcs) == list(baseline) == ["gan", "dcd"]
    assert full["dcd"] == plus_pcs["dcd"] != baseline["dcd"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_twice(family: str) -> None:
    method, batch = distilled(family=family), batch_of(torch.float32)
    calls: list[str] = []
    for role, network in (("teacher", method.translators), ("student", method.student.translators)):
        for direction, generator in network.by_direction.items():
            generator.register_forward_hook(lambda *_, name=f"{role} {direction}": calls.append(name))
    for direction, judge in method.judges.discriminators.items():
        for part in (judge.layer1,):
            part.register_forward_hook(lambda *_, name=f"D {direction}": calls.append(name))
    phases = Phases(method)
    counts = {}
    for phase in ("teacher", "student", "discriminator"):
        calls.clear()
        phases.run(phase, batch)
        counts[phase] = {name: calls.count(name) for name in sorted(set(calls))}
    if family == "cyclegan":
        # Translation, identity and the other's way back: three passes on a CPU; maps of all layers, and D's halves, are
        # one batch.
        assert counts == {
            "teacher": {"D a2b": 1, "D b2a": 1, "teacher a2b": 3, "teacher b2a": 3},
            "student": {"D a2b": 3, "student a2b": 1},
            "discriminator": {"D a2b": 1, "D b2a": 1},
        }
    else:
        assert counts == {
            "teacher": {"D a2b": 1, "teacher a2b": 1},
            "student": {"D a2b": 1 + 4 + 4, "student a2b": 1},
            "discriminator": {"D a2b": 3},
        }


def test_one_batch_gives_what_single_passes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = batch_of(), []
    for together in (True, False):
        if not together:
            for place in (distilled_gan, translation_gan):
                monkeypatch.setattr(place, "is_batch_free", lambda network: False)
        method = distilled().double()
        phases = Phases(method)
        results: dict[str, Tensor] = {}
        for phase in ("teacher", "student", "discriminator"):
            terms = phases.run(phase, batch)
            torch.stack(list(terms.values())).sum().backward()
            results |= {f"{phase}/{name}": term.detach() for name, term in terms.items()}
        results |= {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append(results)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_without_a_weight_nothing_is_built_or_computed() -> None:
    method = distilled(weight_dcd=0, weight_spectral=0)
    assert list(method.student.own) == list(method.judges.classifiers) == list(method.fixed_projections) == []
    assert method.layers == ()
    method = distilled(weight_student=0)
    phases = Phases(method)
    phases.run("teacher", batch_of(torch.float32))
    assert list(phases.run("student", batch_of(torch.float32))) == ["dcd", "spectral"]
    terms = phases.run("discriminator", batch_of(torch.float32))
    assert [name for name in terms if "student" in name] == []
    assert "pool_student" not in method.memory


def test_the_contract() -> None:
    method = distilled(direction="both")
    assert list(method.generators) == ["student", "student_b2a", "teacher", "teacher_b2a"]
    assert list(method.groups) == ["teacher", "student", "discriminator"]
    assert [(phase.name, phase.group) for phase in method.phases] == [(name, name) for name in method.groups]
    assert sorted(method.memory) == [
        "pool_student",
        "pool_student_b2a",
        "pool_teacher",
        "pool_teacher_b2a",
        "projections",
    ]
    assert sorted(pool.part for name, pool in method.memory.items() if name.startswith("pool")) == [0, 1, 2, 3]
    assert list(method.measured) == ["student", "teacher", "original", "discriminator"]
    assert [method.needs.kind, distilled(family="pix2pix").needs.kind] == ["unpaired", "paired"]
    trained = [id(p) for group in method.groups.values() for p in group.module.parameters()]
    assert len(trained) == len(set(trained))
    assert not set(trained) & {id(p) for p in method.fixed_projections.parameters()}
    assert not any(p.requires_grad for p in method.fixed_projections.parameters())


def test_which_weights_a_run_needs() -> None:
    config = DistilledGAN.Config
    assert config().weights() == ("vgg16",)
    assert config(weight_style=0).weights() == ("vgg16",)
    assert config(weight_style=0, weight_feature=0).weights() == ()
    assert config(vgg="stlpips").weights() == ()


def test_the_values_as_printed() -> None:
    root = Path(__file__).resolve().parents[2] / "configs"
    for data, family in (("horse2zebra", "cyclegan"), ("summer2winter", "cyclegan"), ("edges2shoes", "pix2pix")):
        loaded = load_run([str(root / "fesd" / f"{data}.yaml")])
        config, method = loaded.config, loaded.config.method
        assert isinstance(method, DistilledGAN.Config)
        assert (method.family, method.direction, method.schedule) == (family, "a2b", "online")
        weights = (method.weight_dcd, method.weight_spectral, method.weight_feature, method.weight_style)
        assert (*weights, method.weight_student) == (1, 0.2, 10, 1e4, 1)
        assert (method.shift.mode, method.shift.rate, method.shift.step, method.shift.place) == (
            "bi",
            1 / 8,
            2,
            "before",
        )
        batch = 1 if family == "cyclegan" else 4  # printed of CycleGAN; released scripts
        assert (config.train.epochs, config.train.batch_size) == (200, batch)
        assert method.students_updates == (4 if family == "cyclegan" else 1)
        assert (config.data.load_size, config.data.crop, method.crop) == (286, 256, 256)
        generators = loaded.untrained().generators
        parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in generators.items()}
        if family == "cyclegan":
            assert (parameters["student"], parameters["teacher"]) == (137_347, 1_987_075)
        else:
            assert (parameters["student"], parameters["teacher"]) == (3_404_451, 54_413_955)
        printed = load_run([str(root / "fesd" / f"{data}.yaml"), str(root / "variants" / "schedule-100.yaml")])
        assert (printed.config.train.epochs, printed.config.train.batch_size) == (100, 1)
        original = load_run([str(root / "original" / f"{data}.yaml")]).config
        assert original.method.name == family
        assert original.train == config.train


@pytest.mark.parametrize(("row", "variant"), [("dcd", "gan-cpu"), ("original", "gan-cpu-original")])
@pytest.mark.parametrize("data", ["monet2photo", "edges2shoes"])
def test_variants_for_a_cpu_build(row: str, variant: str, data: str) -> None:
    root = Path(__file__).resolve().parents[2] / "configs"
    loaded = load_run([str(root / row / f"{data}.yaml"), str(root / "variants" / f"{variant}.yaml")])
    assert ("generator" in loaded.untrained().generators) is (row == "original")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"shift": {"rate": 0.05}},
            r"method.shift: of the teacher's map down2: .*rate 0.05 of 32 channels shifts none",
        ),
        ({"shift": {"step": 12}}, r"method.shift: of the teacher's map down2: .*step 12 empties a 12x12 map"),
        ({"shift": {"place": "after"}}, r"method.shift: .*rate 0.125 of 3 channels shifts none"),
        (
            {"family": "pix2pix", "shift": {"step": 6}},
            r"method.shift: of the teacher's map down4: .*step 6 empties a 6x6",
        ),
        ({"family": "pix2pix", "student": {"levels": 5}}, "multiples of 32.*not 48x48.*set levels to 4"),
        (
            {"layers": ("down2", "block4")},
            r"method.layers: of the teacher: .*no feature map 'block4'.*block1, block2, bl",
        ),
        ({"layers": ("down2", "block3"), "student": {"blocks": 2}}, "method.layers: of the student: .*'block3'"),
        ({"discriminator_strides": 3}, r"method.layers: the maps of 48x48 images have 12x12 pixels, too few"),
        (
            {"crop": 16, "discriminator_strides": 1, "weight_dcd": 0},
            r"method.crop: of 16x16 images the spectral classifier sees 4x4 pixels, too few: .*at least 6x6",
        ),
        (
            {"crop": 16, "discriminator_strides": 1, "weight_dcd": 0, "weight_spectral": 0, "mix_spectral": True},
            r"method.crop: of 16x16 images the spectral classifier sees 4x4 pixels, too few",
        ),
        ({"discriminator_layer": 4}, r"method.discriminator_layer: 4 is not one of \[1, 2, 3\]"),
        ({"discriminator_layer": [2, 4]}, r"method.discriminator_layer: 4 is not one of \[1, 2, 3\]"),
        ({"projection": "shared"}, "shared needs maps of one width, teacher.ngf is 8, student.ngf 4"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        distilled(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "pix2pix", "direction": "both"}, "pix2pix translates a to b only"),
        ({"schedule": "blocks"}, "needs the number of pairs of blocks"),
        ({"blocks": 2}, "of the schedule blocks"),
        ({"spectrum": "maps", "mix_spectral": True}, "mix_spectral: with spectrum=maps the classifier sees no images"),
        (
            {"spectrum": "maps", "schedule": "blocks", "block_steps": 1, "blocks": 2},
            "spectrum: maps needs teacher and student in one iteration.*schedule=online",
        ),
        ({"discriminator_layer": []}, "is empty; name a layer"),
        ({"discriminator_layer": [0]}, "greater than 0"),
        ({"style_layers": ["relu1_3"]}, "no layer 'relu1_3'.*relu1_1, relu1_2, relu2_1"),
        (
            {f"weight_{name}": 0 for name in ("student", "style", "feature", "dcd", "spectral")},
            "the student would learn nothing",
        ),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistilledGAN.Config(**values)


def test_a_missing_or_wrong_vgg(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, message in (("none.pth", "no such file"), ("broken.safetensors", "not a readable file of weights")):
        with pytest.raises(UserError, match=message) as error:
            distilled(tmp_path / name)
        assert "\n" not in str(error.value)


def test_small_maps_are_enlarged_to_a_quarter_of_the_crop() -> None:
    """Also where all are smaller; a larger one stays, and the others are enlarged to it."""
    for layers, side in ((("down4", "up4"), SIDE), (("down4",), SIDE), (("down2", "up2"), 2 * SIDE)):
        method = distilled(family="pix2pix", layers=layers, shift={"mode": "none"})
        output = method.student("a2b", batch_of(torch.float32)["a"], layers, {})
        assert {x.shape for x in output.own.values()} == {(BATCH, 6, side, side)}
    method = distilled(family="pix2pix", layers=("down4",), weight_spectral=0).double()
    check(method, batch_of(), "hinge")


def test_pools_decide_by_the_runs_seed() -> None:
    numbers, images = torch.arange(40), torch.arange(40.0)[:, None, None, None].expand(40, 3, CROP, CROP)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        given = {"crop": CROP, "ndf": 4, "discriminator_strides": 2, "weight_style": 0, "weight_feature": 0, "pool": 5}
        networks = {"teacher": {"ngf": 8, "blocks": 3}, "student": {"ngf": 4, "blocks": 3}}
        method = DistilledGAN(DistilledGAN.Config(**given, layers=("down2",), **networks))
        found.append([method.memory[name].query(images, numbers)[:, 0, 0, 0].tolist() for name in POOLS])
    assert found[0] == found[1]
    assert len({str(returned) for returned in found[0] + found[2]}) == 2 * len(POOLS)


POOLS = ("pool_teacher", "pool_teacher_b2a", "pool_student")


def test_it_learns(tmp_path: Path) -> None:
    """Nothing but the loop's own pieces: after a few dozen steps the student is closer to its teacher in D's eyes."""
    method = distilled(
        weight_student=0, weight_spectral=0, weight_dcd=10, optimizer={"learning_rate": 2e-3, "schedule": "constant"}
    )
    run(method, ToyReader(BATCH, lambda numbers: samples(np.arange(BATCH))), tmp_path, 40)
    distances = [row["student/dcd"] for row in rows(tmp_path)]
    assert np.mean(distances[-5:]) < 0.7 * np.mean(distances[:3])
    assert METHODS["distilled_gan"] is type(method).Config
