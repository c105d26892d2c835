"""What runs need besides their code: data sets and published weights, here or to be fetched first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from hpcdistill.config import RunConfig
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.fetch.weights import find_weights
from hpcdistill.data.outputs import check_apart
from hpcdistill.data.pack.fetching import is_packed, wanted_at
from hpcdistill.data.places import VARIABLE
from hpcdistill.errors import UserError
from hpcdistill.run import Run


def needed_sets(run: Run) -> list[str]:
    """The data sets that a run and its teachers read, for training and evaluation."""
    data = run.config.data
    taught = [place for teacher in run.teachers.values() if teacher.run for place in needed_sets(teacher.run)]
    return list(dict.fromkeys([*data.train, *data.eval.values(), *taught]))


def needed_weights(run: Run) -> list[str]:
    """The published weights that a run and its teachers use, in training and evaluation."""
    config = run.config
    kind = config.method.kind()
    names = list(config.method.weights())
    if kind != "lr-hr" and config.data.eval:
        names += ["inception"] if config.eval.features == "inception" else []
        names += ["alexnet"] if kind == "paired" and config.eval.lpips else []
    taught = [name for teacher in run.teachers.values() if teacher.run for name in needed_weights(teacher.run)]
    return names + taught


def is_there(place: str) -> bool:
    """True for a packed set, a folder of images (for evaluation) and an address; not for a set packed by half."""
    folder = Path(place)
    if is_remote(place) or is_packed(folder):
        return True
    half = any(folder.glob("shard-*.tar")) or any(folder.glob(".shard-*"))
    return not half and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def check_obtainable(places: Iterable[str]) -> None:
    """UserError for the first place that is neither there nor given by a recipe that can be fetched."""
    for place in places:
        if is_there(place):
            continue
        wanted = wanted_at(Path(place))
        if wanted is None:
            raise UserError(f"{place}: is not there, and no recipe is called so; pack it with `python shards/pack.py`")
        if not wanted.recipe.downloads and not wanted.recipe.builtin:
            raise UserError(
                f"{place}: has no public address; give your copy once: "
                f"`python shards/fetch.py {wanted.recipe.name} --from FOLDER`"
            )


def missing_for(runs: Iterable[Run]) -> tuple[list[str], list[str]]:
    """The data sets and the published weights that are not on this machine, of all that `runs` need, each once.

    A set that ships inside an installed package is packed by the first run that reads it.
    """
    wanted = list(runs)
    places = dict.fromkeys(place for run in wanted for place in needed_sets(run))
    names = dict.fromkeys(name for run in wanted for name in needed_weights(run))
    return [place for place in places if not (is_there(place) or _is_builtin(place))], [n for n in names if not _has(n)]


def how_to_get(places: Iterable[str], weights: Iterable[str], command: str) -> str:
    """What is missing and the remedy, in one line; `command` is the prefetch that gets all which has an address."""
    own, restricted, fetched = list[str](), list[str](), [f"weights {name}" for name in weights]
    for place in places:
        wanted = wanted_at(Path(place))
        if wanted is None:
            own.append(place)
        elif wanted.recipe.downloads:
            fetched.append(place)
        else:
            restricted.append(f"{place} (`python shards/fetch.py {wanted.recipe.name} --from FOLDER`)")
    parts = []
    if fetched:
        parts.append(
            f"{', '.join(fetched)}: run `{command}` where there is a network (a login node), with the same {VARIABLE}"
        )
    if restricted:
        parts.append(f"{', '.join(restricted)}, which has no public address: give your copy once")
    if own:
        parts.append(f"{', '.join(own)}, which no recipe is called: pack it with `python shards/pack.py`")
    return f"the runs need what is not on this machine; {'; '.join(parts)}"


def _is_builtin(place: str) -> bool:
    wanted = wanted_at(Path(place))
    return wanted is not None and bool(wanted.recipe.builtin)


def _has(weights: str) -> bool:
    try:
        find_weights(weights)
    except UserError:
        return False
    return True


def check_runs_apart(config: RunConfig) -> None:
    """UserError when the runs would be put into a data set that they read."""
    sets = [Path(place) for place in (*config.data.train, *config.data.eval.values()) if not is_remote(place)]
    check_apart(Path(config.runs), [*sets, *(folder / "HR" for folder in sets)], "a data set of this run", "runs")


def check_present(run: Run) -> None:
    """UserError when a run lacks sets that a recipe gives: which command gets them all, and where to run it."""
    missing = [place for place in needed_sets(run) if not is_there(place) and wanted_at(Path(place))]
    if missing:
        command = shlex.join(map(str, [*run.files, *run.overrides]))
        raise UserError(
            f"{', '.join(missing)}: not on this machine; run `hpcdistill prefetch {command}` "
            f"where there is a network (a login node), with the same {VARIABLE}"
        )
