"""The privileged teacher: published sizes, recursion, supervised levels, gradients and refusals; and the estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hpcdistill.errors import UserError
from hpcdistill.losses import gaussian, l1, laplace
from hpcdistill.models.privileged import HFRM, PISREncoder, PrivilegedTeacher, StridedCNN, VIDEstimator
from hpcdistill.ops.bicubic import downsample


def parameters_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def visible(module: torch.nn.Module) -> torch.nn.Module:
    """F starts with outputs near zero; give its last layer values that tests can see."""
    torch.manual_seed(11)
    torch.nn.init.normal_(module.network.upsampling.conv.weight, std=0.1)
    return module


def test_published_parameter_counts() -> None:
    assert parameters_of(HFRM(1, 2)) == 35_012
    assert parameters_of(HFRM(1, 3)) == 35_012
    assert [parameters_of(PISREncoder(1, scale)) for scale in (2, 3, 4)] == [86_084] * 3
    assert [parameters_of(PrivilegedTeacher(scale)) for scale in (2, 3, 4)] == [82_668] * 3
    assert parameters_of(PrivilegedTeacher(4, tie_sdm=True)) == 47_656
    assert parameters_of(PrivilegedTeacher(4, encoder="pisr", degradation="none")) == 86_084 + 12_644
    assert parameters_of(PrivilegedTeacher(4, encoder="bicubic", degradation="none")) == 12_644


def test_hfrm_by_layer() -> None:
    module = HFRM(3, 2)
    convolutions = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)]
    geometry = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions]
    assert geometry == [(3, 56, 3, 1, 1), (56, 56, 3, 2, 1), (56, 12, 3, 1, 1), (12, 3, 3, 1, 1)]
    slopes = [layer.weight.tolist() for layer in module.modules() if isinstance(layer, torch.nn.PReLU)]
    assert slopes == [[0.25]] * 3


def test_strided_cnn_by_layer() -> None:
    for strides, factor in (((2,), 2), ((2, 2), 4), ((3,), 3)):
        module = StridedCNN(1, strides)
        assert module(torch.rand(1, 1, 24, 12)).shape == (1, 1, 24 // factor, 12 // factor)
        assert parameters_of(module) == 561 + 28_281 * len(strides) + 505


ALL = [
    # scale, encoder, degradation, tie_sdm, levels, scales of the encoder, of the degradation
    (4, "hfrm", "sdm", False, None, (2, 4), (2, 4)),
    (4, "hfrm", "sdm", False, 1, (2,), (2,)),
    (4, "hfrm", "sdm", False, 0, (), ()),
    (4, "hfrm", "sdm", True, 2, (2, 4), (2, 4)),
    (4, "hfrm", "sdm", True, 1, (2,), (2,)),
    (4, "hfrm", "cnn", False, None, (2, 4), (2, 4)),
    (4, "hfrm", "cnn", False, 1, (2,), (2,)),
    (4, "hfrm", "cnn", False, 0, (), ()),
    (4, "hfrm", "bicubic", False, None, (2, 4), (2, 4)),
    (4, "hfrm", "bicubic", False, 1, (2,), (2,)),
    (4, "hfrm", "none", False, None, (2, 4), ()),
    (4, "hfrm", "none", False, 0, (), ()),
    (4, "pisr", "none", False, None, (4,), ()),
    (4, "pisr", "none", False, 0, (), ()),
    (4, "pisr", "sdm", False, None, (4,), (2, 4)),
    (4, "pisr", "sdm", False, 1, (4,), (2,)),
    (4, "bicubic", "none", False, None, (), ()),
    (4, "bicubic", "sdm", False, None, (), (2, 4)),
    (2, "hfrm", "sdm", False, None, (2,), (2,)),
    (2, "hfrm", "cnn", False, 0, (), ()),
    (2, "pisr", "bicubic", False, None, (2,), (2,)),
    (3, "hfrm", "sdm", False, None, (3,), (3,)),
    (3, "hfrm", "sdm", True, 1, (3,), (3,)),
    (3, "hfrm", "cnn", False, None, (3,), (3,)),
    (3, "hfrm", "bicubic", False, None, (3,), (3,)),
    (3, "pisr", "none", False, None, (3,), ()),
]


@pytest.mark.parametrize(("scale", "encoder", "degradation", "tie", "levels", "encoded", "degraded"), ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_variant(
    channels: int,
    scale: int,
    encoder: Any,
    degradation: Any,
    tie: bool,
    levels: int | None,
    encoded: tuple[int, ...],
    degraded: tuple[int, ...],
) -> None:
    teacher = visible(PrivilegedTeacher(scale, channels, encoder, degradation, tie_sdm=tie, levels=levels))
    assert teacher.takes == ("lr" if encoder == "bicubic" else "hr")
    side = 24 if teacher.takes == "hr" else 24 // scale
    image = torch.rand(2, channels, side, side)
    output = teacher(image, supervised=True)
    assert (teacher.encoder_scales, teacher.degradation_scales) == (encoded, degraded)
    assert output.sr.shape == (2, channels, 24, 24)
    assert [image.shape for image in output.encoded] == [(2, channels, 24 // s, 24 // s) for s in encoded]
    assert [image.shape for image in output.degraded] == [(2, channels, 24 // s, 24 // s) for s in degraded]
    assert torch.equal(teacher(image), output.sr)
    assert teacher.features(image, "expanding").shape == (2, 56, 24 // scale, 24 // scale)

    # no parameter without gradient: DDP would wait for it, and the optimizer would carry it for nothing
    maps = [output.sr, *output.encoded, *output.degraded]
    sum(l1(image, torch.rand_like(image)) for image in maps).backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []

    rebuilt = PrivilegedTeacher(**teacher.arguments)
    rebuilt.load_state_dict(teacher.state_dict())
    assert torch.equal(rebuilt(image), output.sr)


def test_recursion_shares_weights_and_feeds_each_level_to_the_next() -> None:
    teacher = visible(PrivilegedTeacher(4))
    image = torch.rand(1, 1, 16, 16)
    output = teacher(image, supervised=True)
    first = teacher.encoder(image)
    second = teacher.encoder(first)
    torch.testing.assert_close(output.encoded, [first, second], rtol=0, atol=0)
    assert torch.equal(output.sr, teacher.network(second))
    shrunk = teacher.degradation(output.sr)
    torch.testing.assert_close(output.degraded, [shrunk, teacher.degradation(shrunk)], rtol=0, atol=0)
    assert not torch.equal(teacher.degradation(image), first), "the SDM has weights of its own"


def test_tied_sdm_is_the_encoder() -> None:
    teacher = visible(PrivilegedTeacher(4, tie_sdm=True))
    output = teacher(torch.rand(1, 1, 16, 16), supervised=True)
    shrunk = teacher.encoder(output.sr)
    torch.testing.assert_close(output.degraded, [shrunk, teacher.encoder(shrunk)], rtol=0, atol=0)


def test_cnn_levels_are_separate_stacks_on_the_enlarged_image() -> None:
    teacher = visible(PrivilegedTeacher(4, degradation="cnn"))
    output = teacher(torch.rand(1, 1, 16, 16), supervised=True)
    torch.testing.assert_close(output.degraded, [stack(output.sr) for stack in teacher.degradation], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [3, 4])
def test_bicubic_degradation_shrinks_the_enlarged_image(scale: int) -> None:
    teacher = visible(PrivilegedTeacher(scale, degradation="bicubic"))
    output = teacher(torch.rand(1, 1, 24, 24), supervised=True)
    expected = [downsample(output.sr, factor) for factor in teacher.degradation_scales]
    torch.testing.assert_close(output.degraded, expected, rtol=0, atol=0)


def test_supervising_one_level_changes_no_image() -> None:
    both, one = PrivilegedTeacher(4), PrivilegedTeacher(4, levels=1)
    one.load_state_dict(both.state_dict())
    image = torch.rand(1, 1, 16, 16)
    assert torch.equal(one(image), both(image))


def test_features_stop_at_the_layer_and_equal_forwards() -> None:
    teacher = visible(PrivilegedTeacher(4))
    image = torch.rand(1, 1, 16, 16)
    lr = teacher(image, supervised=True).encoded[-1]
    _, maps = teacher.network(lr, maps=("expanding",))

    def refuse(*_: object) -> None:
        raise AssertionError("computed behind the distilled layer")

    teacher.network.upsampling.register_forward_pre_hook(refuse)
    teacher.degradation.register_forward_pre_hook(refuse)
    assert torch.equal(teacher.features(image, "expanding"), maps["expanding"])
    with pytest.raises(ValueError, match="no feature map 'nothing'"):
        teacher.features(image, "nothing")


def test_inference_computes_no_degradation() -> None:
    teacher = PrivilegedTeacher(4)

    def refuse(*_: object) -> None:
        raise AssertionError("the degradation was computed")

    teacher.degradation.register_forward_pre_hook(refuse)
    teacher(torch.rand(1, 1, 16, 16))
    with pytest.raises(AssertionError, match="degradation was computed"):
        teacher(torch.rand(1, 1, 16, 16), supervised=True)


@pytest.mark.parametrize("tie", [False, True])
def test_deploy_keeps_the_function_and_drops_the_degradation(tie: bool) -> None:
    teacher = visible(PrivilegedTeacher(4, tie_sdm=tie)).double()
    deployed = teacher.deploy()
    image = torch.rand(1, 1, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(deployed(image), teacher(image), rtol=1e-12, atol=1e-12)
    assert deployed(image, supervised=True).degraded == []
    assert {name.split(".")[0] for name, _ in deployed.named_parameters()} == {"encoder", "network"}
    rebuilt = PrivilegedTeacher(**deployed.arguments).double()
    rebuilt.load_state_dict(deployed.state_dict())
    assert torch.equal(rebuilt(image), deployed(image))
    assert teacher.arguments["degradation"] == "sdm"
    assert len(teacher(image, supervised=True).degraded) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 5}, "no scale 5; valid: 2, 3, 4"),
        ({"scale": 4, "encoder": "hrfm"}, "encoder is 'hrfm'; did you mean 'hfrm'"),
        ({"scale": 4, "degradation": "smd"}, "degradation is 'smd'; did you mean 'sdm'"),
        ({"scale": 4, "network": "fsrcn"}, "network is 'fsrcn'; did you mean 'fsrcnn'"),
        ({"scale": 4, "upsampling": "subpixels"}, "upsampling is 'subpixels'; did you mean 'subpixel'"),
        ({"scale": 4, "tie_sdm": True, "encoder": "pisr"}, "tie_sdm needs encoder 'hfrm'"),
        ({"scale": 4, "tie_sdm": True, "degradation": "none"}, "tie_sdm needs .* set it to false"),
        ({"scale": 4, "tie_sdm": True, "levels": 0}, "tie_sdm has no effect"),
        ({"scale": 4, "levels": 3}, "levels is 3; .* at x4 have 0 to 2 levels"),
        ({"scale": 2, "levels": 2}, "levels is 2; .* at x2 have 0 to 1 levels"),
        ({"scale": 4, "levels": -1}, "levels is -1"),
        ({"scale": 4, "encoder": "pisr", "degradation": "none", "levels": 2}, "have 0 to 1 levels"),
        ({"scale": 4, "encoder": "bicubic", "degradation": "none", "levels": 1}, "no level to supervise; set it to 0"),
    ],
)
def test_impossible_combinations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrivilegedTeacher(**arguments)


# The variational estimator: formula, and float32 whatever surrounds it.


def test_published_parameter_count_of_the_estimator() -> None:
    assert sum(parameter.numel() for parameter in VIDEstimator().parameters()) == 12_770


def test_the_estimator_equals_the_formula_in_numpy() -> None:
    torch.manual_seed(3)
    estimator = VIDEstimator(5).double()
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter)
    student_map = np.random.default_rng(1).normal(size=(2, 5, 3, 4))
    with torch.no_grad():
        mu, b = estimator(torch.from_numpy(student_map))

    def branch(name: str) -> np.ndarray:
        weights = {key: value.numpy() for key, value in estimator.state_dict().items()}
        features = np.einsum("oi,bihw->bohw", weights[f"{name}.0.0.weight"][:, :, 0, 0], student_map)
        features += weights[f"{name}.0.0.bias"][:, None, None]
        features = np.where(features > 0, features, weights[f"{name}.0.1.weight"] * features)
        result: np.ndarray = np.einsum("oi,bihw->bohw", weights[f"{name}.1.weight"][:, :, 0, 0], features)
        return result + weights[f"{name}.1.bias"][:, None, None]

    np.testing.assert_allclose(mu.numpy(), branch("mu"), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(b.numpy(), 0.1 * np.log1p(np.exp(branch("b"))) + 1e-8, rtol=1e-9)


def test_b_stays_positive_for_extreme_maps() -> None:
    estimator = VIDEstimator(4)
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter)
    for factor in (1e4, -1e4):
        _, b = estimator(factor * torch.randn(1, 4, 8, 8))
        assert b.min() >= 1e-8
        assert b.isfinite().all()


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_autocast_leaves_the_whole_loss_in_float32(loss: object) -> None:
    torch.manual_seed(0)
    estimator = VIDEstimator()
    student_map, target = torch.randn(1, 56, 5, 5), torch.randn(1, 56, 5, 5)
    plain = loss(*estimator(student_map), target)  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mu, b = estimator(student_map)
        value = loss(mu, b, target)  # type: ignore[operator]
        from_half = estimator(student_map.bfloat16())
    assert {mu.dtype, b.dtype, value.dtype, from_half[0].dtype, from_half[1].dtype} == {torch.float32}
    assert value.item() == plain.item()


def test_half_precision_weights_still_give_float32() -> None:
    mu, b = VIDEstimator(4).bfloat16()(torch.randn(1, 4, 3, 3))
    assert {mu.dtype, b.dtype} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda(dtype: torch.dtype) -> None:
    estimator = VIDEstimator(8).cuda()
    with torch.autocast("cuda", dtype=dtype):
        mu, b = estimator(torch.randn(1, 8, 4, 4, device="cuda", dtype=dtype))
        value = laplace(mu, b, torch.zeros_like(mu, dtype=dtype))
    assert {mu.dtype, b.dtype, value.dtype} == {torch.float32}


@pytest.mark.parametrize("loss", [laplace, gaussian])
def test_every_parameter_and_the_student_get_gradients(loss: object) -> None:
    torch.manual_seed(0)
    estimator = VIDEstimator(6)
    student_map = torch.randn(1, 6, 5, 5, requires_grad=True)
    target = torch.randn(1, 6, 5, 5, requires_grad=True)
    loss(*estimator(student_map), target).backward()  # type: ignore[operator]
    assert [name for name, parameter in estimator.named_parameters() if not parameter.grad.abs().sum()] == []
    assert student_map.grad.abs().sum() > 0
    assert target.grad is None
