"""Which metrics a run's result can have, as far as its configuration tells."""

from __future__ import annotations

from hpcdistill.config import RunConfig
from hpcdistill.errors import nearest
from hpcdistill.methods import METHODS
from hpcdistill.metrics.run_evaluators import BACKWARDS

# A method that is not here is not checked.
_GENERATORS: dict[str, tuple[str, ...]] = {
    "plain_sr": ("student",),
    "privileged_teacher": ("teacher",),
    "privileged_student": ("student",),
    "cyclegan": ("generator",),
    "pix2pix": ("generator",),
    "distilled_gan": ("student", "teacher"),
}


def missing_metric(metric: str, config: RunConfig) -> str | None:
    """Why a run of `config` cannot have `metric` (generator/test set/name); None when nothing speaks against it."""
    parts = metric.split("/")
    if len(parts) != 3:
        return "expected generator/test set/metric, e.g. student/set5/psnr"
    generator, test_set, name = parts
    if not config.data.eval:
        return "data.eval is empty"
    if test_set not in config.data.eval:
        return f"it is not evaluated on '{test_set}'; {nearest(test_set, config.data.eval)}"
    method = config.method.name
    if method in _GENERATORS and generator not in (known := _generators(method, config)):
        return f"{method} has no generator '{generator}'; {nearest(generator, known)}"
    names = _names(config)
    return None if name in names else f"'{name}' is not measured; {nearest(name, names)}"


def _generators(method: str, config: RunConfig) -> list[str]:
    names = list(_GENERATORS[method])
    if config.eval.both_directions and METHODS[method].kind(config.method) == "unpaired":
        names += [f"{name}{BACKWARDS}" for name in names]
    return names


def _names(config: RunConfig) -> list[str]:
    kind = METHODS[config.method.name].kind(config.method)
    if kind == "lr-hr":
        return ["psnr", "ssim"]
    inception = config.eval.features == "inception"
    suffix = config.eval.features.replace("-", "_")
    names = ["fid" if inception else f"frechet_{suffix}"]
    if config.eval.kid:
        names.append("kid" if inception else f"kernel_{suffix}")
    if kind == "paired":
        names += ["psnr", *(["lpips"] if config.eval.lpips else [])]
    return names
