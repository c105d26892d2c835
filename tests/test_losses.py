"""The loss terms against NumPy, by hand, and against the densities they come from; see also `test_loss_precision`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from hpcdistill.errors import UserError
from hpcdistill.losses import (
    ADVERSARIAL,
    channel,
    dcd,
    discriminator_loss,
    feature,
    gaussian,
    generator_loss,
    gram,
    l1,
    laplace,
    spectral,
    ssim,
    style,
    total_variation,
)
from hpcdistill.methods.gan_settings import Adversarial


def test_l1_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    image, target = generator.random((2, 3, 5, 4)), generator.random((2, 3, 5, 4))
    result = l1(torch.from_numpy(image), torch.from_numpy(target))
    assert result.shape == ()
    assert result.item() == pytest.approx(np.abs(image - target).mean(), rel=1e-14)
    assert l1(torch.zeros(2).half(), torch.zeros(2)).dtype == torch.float32


def test_gradient_of_l1_is_the_sign_over_the_count() -> None:
    image = torch.tensor([[0.2, 0.9], [0.4, 0.1]], requires_grad=True)
    l1(image, torch.full((2, 2), 0.3)).backward()
    assert image.grad.tolist() == [[-0.25, 0.25], [0.25, -0.25]]


@pytest.mark.parametrize("other", [(2, 1, 8, 8), (1, 3, 8, 8), (2, 3, 8, 9), (3, 8, 8), ()])
def test_l1_refuses_other_shapes(other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape, not \[2, 3, 8, 8\] and"):
        l1(torch.zeros(2, 3, 8, 8), torch.zeros(other))


SHAPES = {"relu1_2": (2, 4, 6, 6), "relu2_2": (2, 8, 3, 3), "relu4_3": (2, 16, 1, 2)}


def maps(seed: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    return {name: torch.from_numpy(generator.standard_normal(shape)) for name, shape in SHAPES.items()}


def test_feature_is_the_sum_of_the_layers_means() -> None:
    student, teacher = maps(1), maps(2)
    expected = sum(np.abs(student[name].numpy() - teacher[name].numpy()).mean() for name in SHAPES)
    result = feature(student, teacher)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-13)
    assert dcd(student, teacher).item() == pytest.approx(expected, rel=1e-13)


def test_style_is_the_sum_of_the_grams_means() -> None:
    student, teacher = maps(1), maps(2)
    expected = 0.0
    for name, (batch, channels, height, width) in SHAPES.items():
        s, t = (x[name].numpy().reshape(batch, channels, -1) for x in (student, teacher))
        grams = [x @ x.transpose(0, 2, 1) / (channels * height * width) for x in (s, t)]
        expected += np.abs(grams[0] - grams[1]).sum() / (batch * channels**2)
    assert style(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_spectral_by_hand() -> None:
    student = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[0.5], [0.0]])}
    teacher = {"b": torch.tensor([[0.0], [1.0]]), "a": torch.tensor([[1.0], [-2.0]])}
    assert spectral(student, teacher).item() == pytest.approx((0 + 4) / 2 + (0.5 + 1) / 2)


@pytest.mark.parametrize("loss", [feature, style, channel])
def test_gradients_reach_the_student(loss) -> None:
    student = {name: x.requires_grad_() for name, x in maps(1).items()}
    teacher = maps(2)
    loss(student, teacher).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in student.values())
    assert loss(teacher, teacher) == 0


@pytest.mark.parametrize("loss", [feature, style, dcd, spectral, channel])
def test_other_layers_or_shapes_are_refused(loss) -> None:
    student, teacher = maps(1), maps(2)
    del teacher["relu2_2"]
    with pytest.raises(ValueError, match=r"the same layers are compared.*relu2_2"):
        loss(student, teacher)
    with pytest.raises(ValueError, match="one at least"):
        loss({}, {})
    # Maps of other sizes: their Grams could be compared, and would mean nothing.
    with pytest.raises(ValueError, match="one shape"):
        loss({"a": torch.zeros(1, 2, 4, 4)}, {"a": torch.zeros(1, 2, 8, 8)})


def pair(height: int = 20, width: int = 17) -> tuple[Tensor, Tensor]:
    """Two of [2, 3, H, W] in [-1, 1], of values that have something to do with each other."""
    generator = np.random.default_rng(5)
    first, other = (torch.from_numpy(generator.uniform(-1, 1, (2, 3, height, width))) for _ in range(2))
    return first, 0.6 * first + 0.4 * other


@pytest.mark.parametrize("size", [(20, 17), (8, 30)])  # the second is lower than the window
def test_ssim_is_scikit_image_s_with_zeros_around(size: tuple[int, int]) -> None:
    image, target = pair(*size)
    around = 16  # more than the window's half, of zeros that scikit-image takes for a part of the image
    expected = []
    for x, y in zip(image.flatten(0, 1).numpy(), target.flatten(0, 1).numpy(), strict=True):
        _, similarity = structural_similarity(
            np.pad(x, around),
            np.pad(y, around),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        expected.append(1 - similarity[around:-around, around:-around].mean())
    found = ssim(image, target)
    assert found.shape == ()
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-10)
    assert ssim(target, image).item() == pytest.approx(found.item(), rel=1e-12)


def test_ssim_of_like_and_of_opposite_images() -> None:
    image, _ = pair()
    assert ssim(image, image).item() == pytest.approx(0, abs=1e-14)
    # On signed images luminance and structure are both negative: a negative looks alike. Moved to [0, 1] it does not.
    assert ssim(image, -image).item() < 0.5
    assert ssim((image + 1) / 2, (1 - image) / 2).item() > 1


def test_gradient_of_ssim() -> None:
    image, target = pair(6, 5)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, target), image)


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]]).view(1, 1, 2, 3)
    sums = (1 + 2 + 0 + 3) + (2 + 1 + 4)
    assert total_variation(image).item() == sums
    assert total_variation(torch.cat([image, 3 * image]).expand(2, 3, 2, 3)).item() == 3 * (1 + 3) * sums / 2


def test_channel_is_the_sum_of_the_means_squared_differences() -> None:
    student, teacher = maps(1), maps(2)
    expected = sum(
        ((student[name].numpy().mean((2, 3)) - teacher[name].numpy().mean((2, 3))) ** 2).mean() for name in SHAPES
    )
    assert channel(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    turned = {name: x.flip(2, 3) for name, x in teacher.items()}  # wherever it is
    assert channel(student, turned).item() == pytest.approx(expected, rel=1e-12)


def test_gram_equals_numpy() -> None:
    maps = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    expected = np.einsum("bchw,bdhw->bcd", maps, maps) / (5 * 3 * 4)
    np.testing.assert_allclose(gram(torch.from_numpy(maps)).numpy(), expected, rtol=1e-13)


def test_gram_by_hand() -> None:
    maps = torch.tensor([[1.0, 2.0], [0.0, -4.0]]).view(1, 2, 1, 2)
    assert torch.equal(gram(maps), torch.tensor([[[5.0, -8.0], [-8.0, 16.0]]]) / 4)


def test_gradient_of_gram() -> None:
    maps = torch.rand(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram, maps)


# Adversarial losses.

LOGITS = np.random.default_rng(0).standard_normal((2, 1, 5, 4)) * 3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


GENERATOR = {"lsgan": (LOGITS - 1) ** 2, "hinge": -LOGITS, "vanilla": -np.log(sigmoid(LOGITS))}
REAL = GENERATOR | {"hinge": np.maximum(0, 1 - LOGITS)}
FAKE = {"lsgan": LOGITS**2, "hinge": np.maximum(0, 1 + LOGITS), "vanilla": -np.log(1 - sigmoid(LOGITS))}
KINDS = tuple(GENERATOR)


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_losses_equal_the_formulas(kind: str) -> None:
    logits = torch.from_numpy(LOGITS)
    for loss, expected in (
        (generator_loss(logits, kind), GENERATOR[kind]),
        (discriminator_loss(logits, True, kind), REAL[kind]),
        (discriminator_loss(logits, False, kind), FAKE[kind]),
    ):
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected.mean(), rel=1e-13)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_vanilla_is_finite_for_sure_discriminators(logit: float) -> None:
    logits = torch.full((1, 1, 2, 2), logit, requires_grad=True)
    loss = generator_loss(logits, "vanilla") + discriminator_loss(logits, False, "vanilla")
    loss.backward()
    assert loss.item() == 1e4
    assert torch.isfinite(logits.grad).all()


def test_unknown_adversarial_loss() -> None:
    for call in (
        lambda: generator_loss(torch.zeros(1), "lsgann"),
        lambda: discriminator_loss(torch.zeros(1), True, ""),
    ):
        with pytest.raises(UserError, match=r"no adversarial loss is called .*lsgan"):
            call()


def test_configurations_name_the_same_losses() -> None:
    assert get_args(Adversarial) == ADVERSARIAL


# Variational information distillation.

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def test_laplace_by_hand() -> None:
    mu, b, target = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])
    # ln(1) + 1/0.5 = 2 and ln(4) + 1/2
    assert laplace(mu, b, target).item() == pytest.approx((2 + math.log(4) + 0.5) / 2)


def test_gaussian_by_hand() -> None:
    mu, b, target = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])
    # ln 0.5 + 1/(2 * 0.25) and ln 2 + 1/(2 * 4), each with ln(2 pi)/2
    expected = (math.log(0.5) + 2 + math.log(2) + 0.125) / 2 + math.log(2 * math.pi) / 2
    assert gaussian(mu, b, target).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "family"), [(laplace, torch.distributions.Laplace), (gaussian, torch.distributions.Normal)]
)
def test_vid_is_the_mean_negative_log_likelihood(loss: Loss, family: type) -> None:
    torch.manual_seed(0)
    mu, target = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    b = torch.rand(2, 3, 4, 5, dtype=torch.float64) + 0.05
    torch.testing.assert_close(loss(mu, b, target), -family(mu, b).log_prob(target).mean(), rtol=1e-12, atol=0)


def test_laplace_is_least_at_the_mean_absolute_difference() -> None:
    difference = np.random.default_rng(0).normal(size=1000)
    target, mu = torch.from_numpy(difference), torch.zeros(1000, dtype=torch.float64)

    def at(b: float) -> float:
        return laplace(mu, torch.full_like(mu, b), target).item()

    best = np.abs(difference).mean()
    assert at(best) < min(at(best * 0.97), at(best * 1.03))


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_vid_of_the_smallest_b_is_finite(loss: Loss) -> None:
    mu = torch.zeros(8, requires_grad=True)
    value = loss(mu, torch.full((8,), 1e-8), torch.ones(8))
    value.backward()
    assert value.isfinite()
    assert mu.grad.isfinite().all()


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_vid_never_broadcasts(loss: Loss) -> None:
    whole, part = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    for arguments in ((whole, whole, part), (whole, part, whole), (part, whole, whole)):
        with pytest.raises(ValueError, match=r"not \[2, [13], 4, 4\] and \[2, [13], 4, 4\]"):
            loss(*arguments)
