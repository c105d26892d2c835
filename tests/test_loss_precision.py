"""Losses under autocast: computed in float32, as exactly as in float64 from the same rounded inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from translation import BATCH, Phases, batch_of, cyclegan, distilled, image_distillation, omgd, pix2pix, wavelet_kd

from hpcdistill import losses
from hpcdistill.methods.base import Method
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.methods.privileged_student import PrivilegedStudent
from hpcdistill.methods.privileged_teacher import PrivilegedTeacherTraining
from hpcdistill.methods.translation_gan import mixed
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.ops.radial_spectrum import radial_spectrum

HALF = (torch.bfloat16, torch.float16)
# What moves or views numbers without computing with them.
MOVES = {"cat", "slice", "split", "view", "detach", "clone", "alias", "_unsafe_view", "select", "transpose"}
MOVES |= {
    "split_with_sizes",
    "expand",
    "as_strided",
    "unbind",
    "permute",
    "lift_fresh",
    "index_select",
    "copy_",
    "empty_like",
}


class HalfOperations(TorchDispatchMode):
    """The kernels that compute something in half precision while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.watching = True

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        results = result if isinstance(result, tuple | list) else (result,)
        if self.watching and name not in MOVES and any(isinstance(x, Tensor) and x.dtype in HALF for x in results):
            self.found.add(name)
        return result


# --- the losses alone ------------------------------------------------------------------------------------------------


def maps(seed: int, large: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: large * torch.randn(2, 6, 8, 8, generator=generator) for name in ("first", "second")}


def map_of(seed: int) -> Tensor:
    return maps(seed)["first"]


LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    **{
        f"{kind}-{what}": (call, (map_of(1), *rest, kind))
        for kind in ("lsgan", "hinge", "vanilla")
        for what, call, rest in (
            ("generator", losses.generator_loss, ()),
            ("real", losses.discriminator_loss, (True,)),
            ("fake", losses.discriminator_loss, (False,)),
        )
    },
    "l1": (losses.l1, (map_of(1), map_of(2))),
    "style": (losses.style, (maps(1), maps(2))),
    # Sums of squares of which are above fp16's largest number, 65504.
    "style-large": (losses.style, (maps(1, 300.0), maps(2, 300.0))),
    "feature": (losses.feature, (maps(1), maps(2))),
    "dcd": (losses.dcd, (maps(1), maps(2))),
    "spectral": (losses.spectral, (maps(1), maps(2))),
    "laplace": (losses.laplace, (map_of(1), map_of(2).abs() + 0.01, map_of(3))),
    "gaussian": (losses.gaussian, (map_of(1), map_of(2).abs() + 0.01, map_of(3))),
    "ssim": (losses.ssim, (map_of(1), map_of(2))),
    "total-variation": (losses.total_variation, (map_of(1),)),
    "channel": (losses.channel, (maps(1), maps(2))),
    "gram": (losses.gram, (map_of(1),)),
    "spectrum": (radial_spectrum, (map_of(1),)),
    "mixed": (mixed, (map_of(1)[:, :1], map_of(2)[:, 0, :1, 0])),
}


def converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: converted(one, dtype) for name, one in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_half_precision_inputs(name: str, half: torch.dtype) -> None:
    loss, inputs = LOSSES[name]
    rounded = [converted(value, half) for value in inputs]
    exact = loss(*(converted(value, torch.float64) for value in rounded))
    with torch.autocast("cpu", half), HalfOperations() as operations:
        found = loss(*rounded)
    assert found.dtype == torch.float32
    assert operations.found == set()
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("half", HALF)
def test_the_watch_sees_a_product_under_autocast(half: torch.dtype) -> None:
    with torch.autocast("cpu", half), HalfOperations() as operations:
        map_of(1) @ map_of(2).transpose(2, 3)
    assert operations.found & {"bmm", "_to_copy"}


# --- every term of every method --------------------------------------------------------------------------------------


class Outermost:
    """Calls `before` and `after` around each outermost call of a module: a network, or a part of one."""

    def __init__(self, before: Callable[[Any], None], after: Callable[[Any], Any]) -> None:
        self.before, self.after, self.depth = before, after, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self.depth == 0:
            self.before(inputs)
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        self.depth -= 1
        return self.after(outputs) if self.depth == 0 else None


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every tensor in nested tuples and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(one, change) for name, one in value.items()}
    if isinstance(value, tuple):
        parts = [mapped(one, change) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def sr_batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    hr = torch.rand(BATCH, 1, 16, 16)
    return {"hr": hr, **{f"lr{s}": nn.functional.avg_pool2d(hr, s) for s in (2, 4)}}


def sr(method: type[Any], **values: Any) -> Method:
    torch.manual_seed(0)
    frozen = {"teacher": PrivilegedTeacher(4, 1)} if method is PrivilegedStudent else {}
    built: Method = method(method.Config(scale=4, **values), frozen)
    return built


METHODS: dict[str, tuple[Callable[[Path], Method], Callable[[], dict[str, Tensor]], set[str]]] = {
    "plain_sr": (lambda _: sr(PlainSR), sr_batch, {"reconstruction"}),
    "privileged_teacher": (
        lambda _: sr(PrivilegedTeacherTraining),
        sr_batch,
        {"reconstruction", "encoder_lr2", "encoder_lr4", "degradation_lr2", "degradation_lr4"},
    ),
    "laplace": (lambda _: sr(PrivilegedStudent), sr_batch, {"reconstruction", "vid"}),
    "gaussian": (lambda _: sr(PrivilegedStudent, vid="gaussian"), sr_batch, {"reconstruction", "vid"}),
    "cyclegan": (
        lambda _: cyclegan(),
        lambda: batch_of(torch.float32),
        {f"{term}{way}" for term in ("gan", "cycle", "identity", "real", "fake") for way in ("", "_b2a")},
    ),
    "pix2pix": (lambda _: pix2pix(), lambda: batch_of(torch.float32), {"gan", "reconstruction", "real", "fake"}),
    "fesd": (
        lambda vgg: distilled(vgg, mix_spectral=True),
        lambda: batch_of(torch.float32),
        {"gan", "style", "feature", "dcd", "spectral", "spectral_real", "spectral_fake", "fake_student", "cycle"},
    ),
    "fesd-pix2pix": (
        lambda vgg: distilled(vgg, family="pix2pix"),
        lambda: batch_of(torch.float32),
        {"gan", "style", "feature", "dcd", "spectral", "spectral_real", "spectral_fake", "reconstruction"},
    ),
    "image_distillation": (
        lambda vgg: image_distillation(vgg, weight_tv=1e-5),
        lambda: batch_of(torch.float32),
        {"output", "style", "feature", "tv"},
    ),
    "omgd": (
        lambda vgg: omgd(vgg, ssim_range="unit"),
        lambda: batch_of(torch.float32),
        {"gan", "cycle", "ssim", "style", "feature", "tv", "channel", "real", "fake"},
    ),
    "omgd-pix2pix": (
        lambda vgg: omgd(vgg, family="pix2pix"),
        lambda: batch_of(torch.float32),
        {"gan", "ssim", "style", "feature", "ssim_deep", "style_deep", "feature_deep", "tv", "channel", "fake_deep"},
    ),
    "wavelet-kd": (
        lambda _: wavelet_kd(),
        lambda: batch_of(torch.float32),
        {"gan", "cycle", "identity", "wavelet", "wavelet_b2a", "real", "fake"},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_term_of_a_method_under_autocast(name: str, vgg: Path) -> None:
    """The networks' bf16 outputs are recorded and played back to the same code in float64."""
    build, make_batch, wanted = METHODS[name]
    method, batch = build(vgg), make_batch()
    exact_method = copy.deepcopy(method).double()
    entered: list[Any] = []
    left: list[Any] = []
    operations = HalfOperations()

    def before(inputs: Any) -> None:
        operations.watching = False
        entered.append(mapped(inputs, Tensor.detach))

    def after(outputs: Any) -> None:
        operations.watching = True
        left.append(mapped(outputs, Tensor.detach))

    found, phases = {}, Phases(method)
    with Outermost(before, after).listening(), torch.autocast("cpu", torch.bfloat16), operations:
        for phase in method.phases:
            found |= {(phase.name, term): value for term, value in phases.run(phase.name, batch).items()}
    assert any(x.dtype == torch.bfloat16 for outputs in left for x in tensors(outputs)), "nothing was in half precision"

    def check(inputs: Any) -> None:
        # What the method has computed itself of earlier outputs, a spectrum say, has lost nothing either.
        for x, y in zip(tensors(entered.pop(0)), tensors(inputs), strict=True):
            torch.testing.assert_close(x.double(), y.detach().double(), rtol=1e-5, atol=1e-5)

    def played(outputs: Any) -> Any:
        return mapped(left.pop(0), Tensor.double)

    exact, phases = {}, Phases(exact_method)
    doubles = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    with Outermost(check, played).listening():
        for phase in exact_method.phases:
            exact |= {(phase.name, term): value for term, value in phases.run(phase.name, doubles).items()}
    assert not entered
    assert not left
    assert {term for _, term in found} >= wanted
    assert found.keys() == exact.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(value.double(), exact[key].double(), rtol=1e-5, atol=1e-12, msg=str(key))
    assert operations.found == set()
