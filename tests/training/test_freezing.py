"""What one phase may not touch of the groups of the others: weights, statistics, spectral norm, and what it leaves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from toy import Critic, ToyGAN, fit

from hpcdistill.methods.base import Batch, Carry, Progress, Terms
from hpcdistill.training.optimization import Freezer


class Watched(ToyGAN):
    """Compares each group's state at the ends of the other's phase."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.at_phase_start: dict[str, dict[str, Tensor]] = {}
        self.checks = 0

    def state(self, group: str) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.groups[group].module.state_dict().items()}

    def started(self, group: str, other: str) -> None:
        """`group`'s phase begins: `other`'s is over, in which nothing of `group` may have moved."""
        assert all(parameter.requires_grad for parameter in self.groups[group].module.parameters())
        assert not any(parameter.requires_grad for parameter in self.groups[other].module.parameters())
        assert all(parameter.grad is None for parameter in self.parameters())
        if group in self.at_phase_start:
            frozen, now = self.at_phase_start.pop(group), self.state(group)
            assert [name for name in frozen if not torch.equal(frozen[name], now[name])] == []
            self.checks += 1
        self.at_phase_start[other] = self.state(other)
        self.own = self.state(group)

    def ended(self, group: str) -> None:
        """What the phase's own forward passes have moved: its statistics and its spectral-norm vectors."""
        now = self.state(group)
        moved = {name for name in now if not torch.equal(now[name], self.own[name])}
        assert {
            name for name in now if name.endswith(("0._u", "_v", "running_mean")) and now[name].numel() > 1
        } <= moved

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.started("generator", "discriminator")
        terms = super().generator_loss(batch, carry, progress)
        self.ended("generator")
        return terms

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        self.started("discriminator", "generator")
        terms = super().discriminator_loss(batch, carry, progress)
        self.ended("discriminator")
        return terms


def test_nothing_of_a_frozen_group_moves(tmp_path: Path) -> None:
    method = Watched()
    fit(tmp_path, 6, method)
    assert method.checks == 11  # two a step, but for the first phase


def test_a_frozen_network_normalises_as_in_training() -> None:
    torch.manual_seed(0)
    critic, image = Critic(norm=True), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    norm = critic.body[1]
    reference = copy.deepcopy(critic)
    freezer = Freezer({"critic": critic, "other": nn.Linear(1, 1)})
    freezer.only("other")
    verdict = critic(image)
    with torch.no_grad():  # by hand: the batch's statistics, spectral norm with the vectors as they are
        spectral = reference.body[0].parametrizations.weight[0]
        weight = reference.body[0].parametrizations.weight.original
        sigma = torch.dot(spectral._u, weight.flatten(1) @ spectral._v)
        hidden = nn.functional.conv2d(image, weight / sigma, reference.body[0].bias, stride=2, padding=1)
        mean, variance = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), keepdim=True, unbiased=False)
        hidden = nn.functional.leaky_relu((hidden - mean) / (variance + norm.eps).sqrt(), 0.2)
        spectral = reference.body[3].parametrizations.weight[0]
        weight = reference.body[3].parametrizations.weight.original
        sigma = torch.dot(spectral._u, weight.flatten(1) @ spectral._v)
        expected = nn.functional.conv2d(hidden, weight / sigma, reference.body[3].bias, stride=2, padding=1)
    torch.testing.assert_close(verdict.detach(), expected)
    assert norm.num_batches_tracked == 0


def test_release_gives_back_what_was_there() -> None:
    module = nn.Sequential(
        spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    module[0].bias.requires_grad_(False)  # a method's own choice
    other = nn.Linear(3, 3)
    freezer = Freezer({"a": module, "b": other})
    for group, active in (("a", True), ("b", False), (None, True)):
        if group:
            freezer.only(group)
        else:
            freezer.release()
        assert [parameter.requires_grad for parameter in module.parameters()] == [False] + [active] * 5
        assert [module[1].track_running_stats, module[2].track_running_stats] == [active, False]
        assert module[0].parametrizations.weight[0].training is active
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_parameter_of_two_groups_trains_in_both_phases() -> None:
    shared = nn.Linear(2, 2)
    freezer = Freezer({"a": nn.Sequential(shared, nn.Linear(2, 2)), "b": nn.Sequential(shared)})
    for group in ("a", "b", "a"):
        freezer.only(group)
        assert shared.weight.requires_grad


def test_carry_refuses_gradients() -> None:
    carry = Carry()
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"carry\['fake'\] still has gradients; detach it"):
        carry["fake"] = weight * 2
    assert len(carry) == 0
    carry["fake"] = (weight * 2).detach()
    assert carry["fake"].tolist() == [2.0, 2.0]
