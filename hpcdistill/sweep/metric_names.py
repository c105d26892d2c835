"""Which metrics a run's result can have, as far as its configuration tells."""

from __future__ import annotations

from hpcdistill.config import RunConfig
from hpcdistill.errors import nearest
from hpcdistill.metrics.config import BACKWARDS


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
    known = _generators(config)
    if generator not in known:
        return f"{config.method.name} has no generator '{generator}'; {nearest(generator, known)}"
    names = config.eval.metrics(config.method.kind())
    return None if name in names else f"'{name}' is not measured; {nearest(name, names)}"


def _generators(config: RunConfig) -> list[str]:
    names = list(config.method.GENERATORS)
    if config.eval.both_directions and config.method.kind() == "unpaired":
        names += [f"{name}{BACKWARDS}" for name in names]
    return names
