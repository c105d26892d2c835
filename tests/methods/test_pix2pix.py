"""Pix2Pix: its terms by hand, what moves in which phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from translation import BATCH, Phases, adversarial, batch_of, l1, logits, moved, pix2pix, reached, state_of

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS
from hpcdistill.methods.pix2pix import Pix2Pix


@pytest.mark.parametrize("values", [{}, {"gan": "lsgan"}, {"generator": {"network": "resnet", "ngf": 4, "blocks": 2}}])
def test_every_term_by_hand(values: dict[str, Any]) -> None:
    method, batch = pix2pix(**values).double(), batch_of()
    phases = Phases(method)
    terms = {**phases.run("generator", batch), **phases.run("discriminator", batch)}
    discriminator = method.judges.discriminators["a2b"]
    with torch.no_grad():
        fake = method.generators["generator"](batch["a"])
    real_pair, fake_pair = (torch.cat([batch["a"], image], 1) for image in (batch["b"], fake))
    kind = values.get("gan", "hinge")
    reference = {
        "gan": adversarial(logits(discriminator, fake_pair), "fool", kind),
        "reconstruction": 100 * l1(fake, batch["b"]),
        "real": 0.5 * adversarial(logits(discriminator, real_pair), "real", kind),
        "fake": 0.5 * adversarial(logits(discriminator, fake_pair), "fake", kind),
    }
    assert list(terms) == list(reference)
    for name, value in reference.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name


def test_where_the_gradients_go_and_what_stays() -> None:
    method, batch = pix2pix(), batch_of(torch.float32)
    phases = Phases(method)
    before = state_of(method.judges)
    terms = phases.run("generator", batch)
    assert moved(method.judges, before) == set()
    generator = {
        f"translators.by_direction.a2b.{name}" for name, _ in method.generators["generator"].named_parameters()
    }
    for term in terms.values():
        assert reached(term, method) == generator
    before = state_of(method.translators)
    for term in phases.run("discriminator", batch).values():
        assert {name.split(".")[0] for name in reached(term, method)} == {"judges"}
    assert moved(method.translators, before) == set()
    assert not any(tensor.requires_grad for tensor in phases.carry.values())


def test_batchnorm_sees_real_and_generated_pairs_apart() -> None:
    method = pix2pix()
    sizes: list[int] = []
    method.judges.discriminators["a2b"].register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
    phases = Phases(method)
    phases.run("generator", batch_of(torch.float32))
    phases.run("discriminator", batch_of(torch.float32))
    assert sizes == [BATCH] * 3
    resnet = pix2pix(generator={"network": "resnet", "ngf": 4, "blocks": 1})  # D has the norm of the generator
    assert any(isinstance(part, torch.nn.InstanceNorm2d) for part in resnet.judges.modules())
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in resnet.judges.modules())


def test_the_contract() -> None:
    method = pix2pix()
    assert method.needs == Needs("paired")
    assert list(method.generators) == ["generator"]
    assert method.memory == {}
    assert METHODS["pix2pix"] is Pix2Pix.Config
    original = Pix2Pix(Pix2Pix.Config())
    assert sum(p.numel() for p in original.generators["generator"].parameters()) == 54_413_955
    discriminator = original.measured["discriminator"]
    assert discriminator.arguments == {"channels_in": 6, "ndf": 128, "norm": "batch", "layers": 3}


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"multiples of 32.*not 48x48.*or set levels to 4") as error:
        pix2pix(generator={"levels": 5})
    assert "\n" not in str(error.value)
