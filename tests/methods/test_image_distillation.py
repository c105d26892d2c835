"""Image distillation: its terms by hand, where gradients go, resuming, what was published, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy import Killed, ToyReader, kill_at, newest_tensors, rows, run
from translation import (
    BATCH,
    CROP,
    Phases,
    batch_of,
    gram,
    image_distillation,
    l1,
    moved,
    pix2pix,
    reached,
    samples,
    state_of,
    vgg_maps,
)

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.methods.image_distillation import ImageDistillation
from hpcdistill.methods.settings import config_class
from hpcdistill.run import load_run
from hpcdistill.settings import identity_values

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "taught"
MAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")


@torch.no_grad()
def by_hand(method: ImageDistillation, batch: dict[str, Tensor]) -> dict[str, float]:
    """w1 L1 + w2 sum of the mean squared (or absolute) difference of Grams + w3 L1 on a map + w4 TV; float64."""
    config = method.config
    student, teacher = method.student(batch["a"]), batch["b"]
    assert method.vgg is not None
    own, its = (vgg_maps(method.vgg, image) for image in (student, teacher))
    power = 2 if config.style == "squared" else 1
    styles = [((gram(own[name]) - gram(its[name])).abs() ** power).mean().item() for name in MAPS]
    terms = {"output": config.weight_output * l1(student, teacher), "style": config.weight_style * sum(styles)}
    terms["feature"] = config.weight_feature * sum(l1(own[name], its[name]) for name in config.feature_layers)
    x = student.numpy()
    variation = np.abs(x[:, :, 1:] - x[:, :, :-1]).sum() + np.abs(x[..., 1:] - x[..., :-1]).sum()
    terms["tv"] = config.weight_tv * variation / BATCH
    return {name: value for name, value in terms.items() if value}


CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "unet": {"student": {"network": "unet"}, "weight_tv": 5e-8},
    "absolute": {
        "style": "absolute",
        "weight_style": 1e4,
        "feature_layers": ("relu1_2", "relu3_3"),
        "weight_output": 0,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_term_by_hand(case: str, vgg: Path) -> None:
    method, batch = image_distillation(vgg, **CASES[case]).double(), batch_of()
    terms = Phases(method).run("student", batch)
    reference = by_hand(method, batch)
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
        assert value > 1e-9, name


def test_each_gradient_reaches_the_student_and_nothing_else(vgg: Path) -> None:
    method, batch = image_distillation(vgg, weight_tv=1e-5), batch_of(torch.float32)
    assert method.vgg is not None
    passes: list[tuple[bool, bool]] = []
    method.vgg.register_forward_hook(
        lambda _, images, maps: passes.append((torch.is_grad_enabled(), torch.equal(images[0], batch["b"])))
    )
    before = state_of(method.vgg)
    terms = Phases(method).run("student", batch)
    assert passes == [(True, False), (False, True)]  # the student's image, and the teacher's without gradients
    student = {f"student.{name}" for name, _ in method.student.named_parameters()}
    for name, term in terms.items():
        assert reached(term, method) == student, name
    torch.stack(list(terms.values())).sum().backward()
    assert {name for name, parameter in method.named_parameters() if parameter.grad is not None} == student
    assert moved(method.vgg, before) == set()


def test_a_student_that_made_the_images_has_nothing_to_learn(vgg: Path) -> None:
    method, batch = image_distillation(vgg).double(), batch_of()
    with torch.no_grad():
        batch["b"] = method.student(batch["a"])
    terms = Phases(method).run("student", batch)
    assert {name: term.item() for name, term in terms.items()} == {"output": 0, "style": 0, "feature": 0}


def test_a_student_comes_near_the_images(vgg: Path) -> None:
    method, batch = image_distillation(vgg, weight_output=1.0), batch_of(torch.float32)
    adam = torch.optim.Adam(method.student.parameters(), 2e-3, betas=(0.5, 0.999))
    history = []
    for _ in range(30):
        terms = Phases(method).run("student", batch)
        adam.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        adam.step()
        history.append({name: term.item() for name, term in terms.items()})
    for name in ("output", "style", "feature"):
        assert history[-1][name] < 0.7 * history[0][name], name


@pytest.mark.parametrize("network", ["resnet", "unet"])
def test_a_killed_run_resumes_bit_equal(network: str, vgg: Path, tmp_path: Path) -> None:
    def train(folder: Path, before: Any = None) -> None:
        method = image_distillation(vgg, student={"network": network}, style_layers=("relu1_1",))
        run(method, ToyReader(BATCH, samples, before=before), folder, 5, checkpoint_every=2)

    train(tmp_path / "undisturbed")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at(3))
    train(tmp_path / "killed")
    assert newest_tensors(tmp_path / "killed") == newest_tensors(tmp_path / "undisturbed")  # bytes
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")
    assert len([row for row in rows(tmp_path / "killed") if "student/style" in row]) == 5


def test_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoGAN-Distiller's weights and schedule: 400 epochs of 1,067 images at 16 are its 26,400 steps and a few."""
    monkeypatch.delenv("HPCDISTILL_DATA", raising=False)
    found = {name: load_run([str(CONFIGS / f"{name}.yaml")]).config for name in ("horse2zebra", "edges2shoes-r")}
    for name, config in found.items():
        method = config.method
        assert isinstance(method, ImageDistillation.Config)
        assert (method.weight_output, method.weight_style, method.weight_feature, method.weight_tv) == (1e-2, 1e5, 1, 0)
        assert (method.style, method.style_layers, method.feature_layers) == ("squared", MAPS, ("relu2_2",))
        assert config.data.train == (f"data/packed/{name}-taught/train",)
        assert config.data.eval == {name: f"data/packed/{name}/test"}  # real ones
        with torch.device("meta"):
            student = method.build().student
        assert (
            sum(p.numel() for p in student.parameters()) == {"horse2zebra": 137_347, "edges2shoes-r": 3_404_451}[name]
        )
    horses = found["horse2zebra"]
    assert (horses.data.load_size, horses.data.crop, horses.train.batch_size) == (256, 256, 16)
    assert 26_400 <= horses.train.epochs * 1067 / 16 < 26_700
    assert horses.method.optimizer.decay_from * horses.train.epochs == 100


def test_the_contract() -> None:
    method = image_distillation()
    assert METHODS["image_distillation"] is ImageDistillation.Config
    assert method.needs == Needs("paired", real_targets=False)
    assert pix2pix().needs.real_targets
    assert not config_class("image_distillation").REAL_TARGETS
    assert list(method.generators) == list(method.groups) == list(method.measured) == ["student"]
    assert method.config.roles() == {}
    assert ImageDistillation.Config().weights() == ("vgg16",)
    assert method.config.weights() == ()
    assert identity_values(ImageDistillation.Config()) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"weight_{name}": 0 for name in ("output", "style", "feature")}, "all are 0; set one"),
        ({"feature_layers": ["relu2_3"]}, "no layer 'relu2_3'"),
        ({"student": {"network": "diffusion"}}, "unknown generator 'diffusion'"),
        ({"style": "l2"}, "'squared' or 'absolute'"),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageDistillation.Config(**values)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"multiples of 32.*not 48x48") as error:
        image_distillation(student={"network": "unet", "levels": 5})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"method\.crop: is {CROP}, data\.crop is 64; set both alike"):
        image_distillation().prepare(64)
