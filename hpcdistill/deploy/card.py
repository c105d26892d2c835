"""A folder to publish a network with, as Hugging Face's hub has it: README.md, config.json, model.safetensors, LICENSE.

Nothing is uploaded, and no network is asked. `hpcdistill.load` takes the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from hpcdistill import __version__
from hpcdistill.deploy.card_text import body, licence_file
from hpcdistill.deploy.description import UNKNOWN, Description
from hpcdistill.deploy.model import load_network
from hpcdistill.deploy.provenance import Provenance, provenance, without_folders
from hpcdistill.deploy.shipped import model_path
from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import network_cost
from hpcdistill.models.registry import generator_bytes, load_generator
from hpcdistill.models.weights_file import CARD_WEIGHTS
from hpcdistill.storage import write_bytes

LIBRARY = "hpcdistill"
PAGE, CONFIG, LICENCE = "README.md", "config.json", "LICENSE"
_IGNORED = (".git", ".gitattributes", ".gitignore", ".cache", ".huggingface")  # what a clone of the hub has besides


def write_card(
    model: str, out: Path, which: str | None = None, generator: str | None = None
) -> tuple[Description, Provenance]:
    """Write the network that `model` names (as `hpcdistill.load` takes it, but no exported file) to the folder `out`.

    Each file is written whole, config.json last. UserError for a folder with anything in it that is not a card's, or
    that was changed since, and before anything is written.
    """
    path = model_path(model)
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{path}: is not a .safetensors file; give the run folder or the file it was exported from")
    if path.is_dir() and _digests(path) is not None:
        raise UserError(f"{path}: is a model card already; copy the folder, or give the run it was made of")
    _, about, file = load_network(path, which, generator)
    about = _public(about)
    known = provenance(file, about)
    network = _plain(load_generator(file)[0])
    about = replace(about, arguments=dict(cast(Mapping[str, Any], network.arguments)))
    files = _files(network, about, known, about.run or file.stem)
    _check_out(out, files)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(out / name, content)
    _check_loads(out, network)
    return about, known


def _public(about: Description) -> Description:
    """The description without anybody's folders."""
    data, licence = (without_folders(text) for text in (about.data, about.licence))
    return replace(about, data=data, licence=licence, run=Path(about.run).name)


def _plain(network: nn.Module) -> nn.Module:
    """The network in the form that is published: what was trained wide in its plain layers, all else as it is."""
    wide = "collapse" in cast(Mapping[str, Any], network.arguments)
    return cast(Any, network).collapsed().eval() if wide else network


def _files(network: nn.Module, about: Description, known: Provenance, title: str) -> dict[str, bytes]:
    """The folder's files, config.json last: it holds the digests of the others."""
    notes = {
        key: value
        for key in ("method", "steps", "run", "data", "licence")
        if (value := getattr(about, key)) not in (None, "", UNKNOWN)
    }
    page = body(title, about, network_cost(network), known)
    head = _fields(about, known, title).to_yaml()
    files = {
        PAGE: f"---\n{head}\n---\n\n{page}".encode(),
        LICENCE: licence_file(about).encode(),
        CARD_WEIGHTS: generator_bytes(network, notes),
    }
    config = {
        "library_name": LIBRARY,
        "hpcdistill_version": __version__,
        **asdict(about),
        "files": {name: _sha256(content) for name, content in files.items()},
    }
    return files | {CONFIG: (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()}


def _fields(about: Description, known: Provenance, title: str) -> ModelCardData:
    """The hub's fields; see https://huggingface.co/docs/hub/model-cards."""
    task = "super-resolution" if about.task == "super-resolution" else "image-translation"
    tags = [LIBRARY, task, about.network.lower(), *([f"x{about.scale}"] if about.scale > 1 else [])]
    tags += ["knowledge-distillation"] if known.distilled else []
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="image-to-image",
        license="other",
        license_name="not-recorded" if about.licence == UNKNOWN else "of-the-training-data",
        license_link=LICENCE,
        tags=tags,
        datasets=list(known.datasets) or None,
        metrics=list(dict.fromkeys(number.metric for number in known.measured)) or None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-to-image",
                task_name=task,
                dataset_type=_identifier(number.test_set),
                dataset_name=number.test_set,
                metric_type=number.metric,
                metric_name=f"{number.label} ({number.protocol})",
                metric_value=number.value,
                metric_args={"weights": number.chosen},
            )
            for number in known.measured
        ]
        or None,
    )


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


def _check_out(out: Path, files: Mapping[str, bytes]) -> None:
    """UserError when `out` holds anything that is neither ours nor what is to be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    found = [path for path in sorted(out.iterdir()) if path.name not in _IGNORED] if out.is_dir() else []
    ours = _digests(out) or {}
    for path in found:
        if path.name == CONFIG and (ours or path.read_bytes() == files[CONFIG]):
            continue
        if path.name not in files or not path.is_file():
            raise UserError(f"--out {out}: holds {path.name}, which is no part of a model card; name an empty folder")
        digest = _sha256(path.read_bytes())
        if digest not in (ours.get(path.name), _sha256(files[path.name])):
            changed = "was changed since it was written" if ours else "was not written by this command"
            raise UserError(f"--out {out}: its {path.name} {changed}; move it away, or name another folder")


def _digests(folder: Path) -> dict[str, str] | None:
    """The digests that the config.json of a card says; None where there is no such file of ours."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(config, dict)
        or config.get("library_name") != LIBRARY
        or not isinstance(config.get("files"), dict)
    ):
        return None
    return {str(name): str(digest) for name, digest in config["files"].items()}


def _check_loads(out: Path, network: nn.Module) -> None:
    """RuntimeError unless the folder gives the very network back: hub mixins have left layers random in silence."""
    state, back = network.state_dict(), load_generator(out)[0].state_dict()
    if state.keys() != back.keys() or not all(torch.equal(state[name], back[name]) for name in state):
        raise RuntimeError(f"{out}: does not give the network back that was written there")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
