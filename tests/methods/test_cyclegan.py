"""CycleGAN: its terms by hand, what moves in which phase, its pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from translation import (
    BATCH,
    CROP,
    Phases,
    adversarial,
    batch_of,
    cyclegan,
    l1,
    logits,
    reached,
    samples,
)

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.methods import METHODS, translation_gan
from hpcdistill.methods import cyclegan as module
from hpcdistill.methods.base import Carry, Progress, whole
from hpcdistill.methods.cyclegan import CycleGAN

GENERATOR_TERMS = ["gan", "identity", "gan_b2a", "identity_b2a", "cycle", "cycle_b2a"]
DISCRIMINATOR_TERMS = ["real", "fake", "real_b2a", "fake_b2a"]


@torch.no_grad()
def expected(method: CycleGAN, batch: dict[str, Tensor], kind: str = "lsgan") -> dict[str, float]:
    """All terms from single passes of the generators and the discriminators' layers by hand; the pools are empty."""
    g, f = (method.translators.by_direction[name] for name in ("a2b", "b2a"))
    d_b, d_a = (method.judges.discriminators[name] for name in ("a2b", "b2a"))
    a, b = batch["a"], batch["b"]
    return {
        "gan": adversarial(logits(d_b, g(a)), "fool", kind),
        "gan_b2a": adversarial(logits(d_a, f(b)), "fool", kind),
        "cycle": 10 * l1(f(g(a)), a),
        "cycle_b2a": 10 * l1(g(f(b)), b),
        "identity": 5 * l1(g(b), b),
        "identity_b2a": 5 * l1(f(a), a),
        "real": 0.5 * adversarial(logits(d_b, b), "real", kind),
        "fake": 0.5 * adversarial(logits(d_b, g(a)), "fake", kind),
        "real_b2a": 0.5 * adversarial(logits(d_a, a), "real", kind),
        "fake_b2a": 0.5 * adversarial(logits(d_a, f(b)), "fake", kind),
    }


@pytest.mark.parametrize("values", [{}, {"gan": "hinge"}, {"generator": {"network": "unet", "ngf": 4, "levels": 4}}])
def test_every_term_by_hand(values: dict[str, Any]) -> None:
    method, batch = cyclegan(**values).double(), batch_of()
    phases = Phases(method)
    of_generator = phases.run("generator", batch)
    of_discriminator = phases.run("discriminator", batch)
    assert sorted(of_generator) == sorted(GENERATOR_TERMS)
    assert list(of_discriminator) == DISCRIMINATOR_TERMS
    reference = expected(method, batch, values.get("gan", "lsgan"))
    for name, term in {**of_generator, **of_discriminator}.items():
        assert term.item() == pytest.approx(reference[name], rel=1e-6), name
        assert term.shape == ()


def test_where_the_gradients_go() -> None:
    method, batch = cyclegan(), batch_of(torch.float32)
    phases = Phases(method)
    terms = phases.run("generator", batch)
    directions = {
        "gan": {"a2b"},
        "identity": {"a2b"},
        "gan_b2a": {"b2a"},
        "identity_b2a": {"b2a"},
        "cycle": {"a2b", "b2a"},
        "cycle_b2a": {"a2b", "b2a"},
    }
    for name, whose in directions.items():
        found = {parameter.split(".")[2] for parameter in reached(terms[name], method)}
        assert found == whose, name
    for name, term in phases.run("discriminator", batch).items():
        found = {".".join(parameter.split(".")[:3]) for parameter in reached(term, method)}
        assert found == {"judges.discriminators." + ("b2a" if name.endswith("b2a") else "a2b")}, name
    assert not any(tensor.requires_grad for tensor in phases.carry.values())


def test_one_batch_gives_what_single_passes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of()
    found = []
    passes: list[int] = []
    monkeypatch.setattr(module, "applies", lambda image: False)  # as on a GPU
    for together in (True, False):
        if not together:
            for place in (module, translation_gan):
                monkeypatch.setattr(place, "is_batch_free", lambda network: False)
        method = cyclegan().double()
        phases = Phases(method)
        count: list[int] = []
        for network in (*method.translators.by_direction.values(), *method.judges.discriminators.values()):
            network.register_forward_hook(lambda *_, count=count: count.append(1))
        results: dict[str, Tensor] = {}
        for phase in ("generator", "discriminator"):
            terms = phases.run(phase, batch)
            torch.stack(list(terms.values())).sum().backward()
            results |= {name: term.detach() for name, term in terms.items()}
        results |= {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append(results)
        passes.append(len(count))
    assert passes == [4 + 2 + 2, 6 + 2 + 4]
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 10 + len(list(cyclegan().parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_on_a_cpu_the_identity_has_a_pass_of_its_own() -> None:
    method, sizes = cyclegan(), []
    for network in method.translators.by_direction.values():
        network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    Phases(method).run("generator", batch_of(torch.float32))
    assert sizes == [BATCH] * 6


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_parts_share_no_graph_and_add_up(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's backward pass before the next part is computed gives the gradient of the sum of all terms."""
    monkeypatch.setattr(module, "applies", lambda image: on_cpu)
    method, batch = cyclegan().double(), batch_of()
    phase = method.phases[0]
    parameters = list(method.translators.parameters())
    method.judges.requires_grad_(False)
    terms = whole(phase.loss(batch, Carry(), Progress.at(0, 1)))
    expected = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters)
    parts = phase.loss(batch, Carry(), Progress.at(0, 1))
    assert not isinstance(parts, dict)
    assert len(parts) == (4 if on_cpu else 2)
    for part in parts:
        torch.stack(list(part().values())).sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)
    last = whole(phase.loss(batch, Carry(), Progress.at(0, 1))[-1:])
    assert len(reached(torch.stack(list(last.values())).sum(), method.translators)) == len(parameters)


def test_without_a_cycle_all_is_one_part() -> None:
    """A part of one direction would not reach the other's generator, for whose gradient ranks would wait."""
    method = cyclegan(weight_cycle=0.0)
    terms = method.phases[0].loss(batch_of(torch.float32), Carry(), Progress.at(0, 1))
    assert isinstance(terms, dict)
    assert sorted(terms) == ["gan", "gan_b2a", "identity", "identity_b2a"]


def test_one_batch_in_float32() -> None:
    network, images = cyclegan().translators.by_direction["a2b"], batch_of(torch.float32)
    both = network(torch.cat([images["a"], images["b"]])).split(BATCH)
    for image, together in zip((images["a"], images["b"]), both, strict=True):
        torch.testing.assert_close(together, network(image), rtol=1e-5, atol=1e-5)


def test_networks_with_batchnorm_stay_apart() -> None:
    method = cyclegan(generator={"network": "unet", "ngf": 4, "levels": 4})
    sizes: list[int] = []
    for network in method.translators.by_direction.values():
        network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    Phases(method).run("generator", batch_of(torch.float32))
    assert sizes == [BATCH] * 6


def test_the_discriminators_see_the_pools_images() -> None:
    """With a pool of 3 and batches of 2, images of earlier steps come back sooner or later."""
    method = cyclegan()
    shown: list[Tensor] = []
    method.judges.discriminators["a2b"].register_forward_pre_hook(
        lambda network, inputs: shown.append(inputs[0].clone()) if len(inputs[0]) == 2 * BATCH else None
    )
    phases = Phases(method)
    made = []
    for step in range(8):
        numbers = np.arange(step * BATCH, (step + 1) * BATCH)
        batch = {**samples(numbers), "number": torch.from_numpy(numbers)}
        phases.run("generator", batch)
        made.append(phases.carry["generator"])
        phases.run("discriminator", batch)
    same = [torch.equal(images[BATCH:], fresh) for images, fresh in zip(shown, made, strict=True)]
    assert same[0]
    assert not all(same)
    everything = torch.cat(made)
    for images in shown:
        for image in images[BATCH:]:
            assert any(torch.equal(image, known) for known in everything)
    assert int(method.memory["pool_generator"].filled) == 3
    pools = [method.memory["pool_generator"], method.memory["pool_generator_b2a"]]
    assert [pool.part for pool in pools] == [0, 1]
    assert {pool.seed for pool in pools} == {0}  # what the test's weights are drawn from


def test_a_term_of_weight_zero_is_not_computed() -> None:
    method = cyclegan(weight_identity=0, weight_cycle=0)
    passes: list[int] = []
    method.translators.register_forward_hook(lambda *_: passes.append(1))
    assert list(Phases(method).run("generator", batch_of(torch.float32))) == ["gan", "gan_b2a"]
    assert len(passes) == 2


def test_the_contract() -> None:
    method = cyclegan()
    assert method.needs == Needs("unpaired")
    assert list(method.generators) == ["generator", "generator_b2a"]
    assert list(method.measured) == ["generator", "discriminator"]
    assert [(phase.name, phase.group) for phase in method.phases] == [
        ("generator", "generator"),
        ("discriminator", "discriminator"),
    ]
    assert METHODS["cyclegan"] is CycleGAN.Config
    settings = method.config.optimizer
    assert (settings.learning_rate, settings.final_learning_rate, settings.schedule, settings.decay_from) == (
        2e-4,
        0.0,
        "linear",
        0.5,
    )
    assert settings.betas == (0.5, 0.999)
    original = CycleGAN(CycleGAN.Config())
    assert sum(p.numel() for p in original.generators["generator"].parameters()) == 11_378_179
    assert sum(p.numel() for p in original.measured["discriminator"].parameters()) == 2_764_737
    assert original.memory["pool_generator"].images.shape == (50, 3, 256, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": 50}, "multiples of 4.*not 50x50"),
        ({"generator": {"network": "unet", "levels": 5}}, "multiples of 32.*not 48x48"),
        ({"discriminator_strides": 5}, "PatchDiscriminator with 5 layers takes 96x96"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cyclegan(**values)
    assert "\n" not in str(error.value)


def test_crops_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.crop: is 48, data.crop is 64; set both alike"):
        cyclegan().prepare(64)
    cyclegan().prepare(CROP)
