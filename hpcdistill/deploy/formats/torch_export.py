"""PyTorch's own format, .pt2 of `torch.export`: a graph that needs none of our classes, for `torch.export.load`.

That function is not for files of strangers: what `weights_only` refuses it unpickles with all rights, it evaluates the
sizes as Python, and calls whatever function of torch the graph names (2.13, `_export/serde/serialize.py`). So `open`
does not call it: it reads the description and the raw weights as data and builds the network anew. Only `verify`, on
what was written a moment before, runs the graph itself.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hpcdistill.deploy.description import METADATA_KEY, Description
from hpcdistill.deploy.formats.base import (
    Format,
    NotVerified,
    Opened,
    Options,
    Verified,
    dynamic_axes,
    example,
    in_eval_mode,
)
from hpcdistill.deploy.interface import in_words
from hpcdistill.deploy.rgb_graph import RgbGraph, is_rgb_graph
from hpcdistill.deploy.session import Batch, Session
from hpcdistill.errors import UserError
from hpcdistill.models.registry import rebuild
from hpcdistill.storage import write_bytes

_NOT_OURS = "is no .pt2 file that hpcdistill exported; export the network with `hpcdistill export torch`"
_WEIGHTS = "data/weights/"
_TYPES = {5: "<i8", 6: "<f2", 7: "<f4", 8: "<f8"}  # of torch._export.serde.schema.ScalarType
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    NotImplementedError,
    EOFError,
    RuntimeError,
)  # by zipfile
_LARGEST = 1 << 31  # bytes; what a damaged or evil archive claims is not unpacked beyond


class TorchExport(Format):
    """One file for `torch.export.load(file).module()`, with any batch, height and width that the network takes."""

    name = "torch"
    suffix = ".pt2"
    options = frozenset({"graph"})

    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        network = in_eval_mode(network)
        inner = network.network if isinstance(network, RgbGraph) else network
        # Of the form that is written, in which a transposed convolution may have become a sub-pixel one.
        about = replace(about, arguments=dict(cast(Any, getattr(inner, "arguments", about.arguments))))
        program = torch.export.export(network, (example(about),), dynamic_shapes=(dynamic_axes(about),), strict=False)
        program.example_inputs = None  # they would be most of the file
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # with paths of this machine
        texts = {METADATA_KEY: about.to_json(), **in_words(about)}
        content = io.BytesIO()
        torch.export.save(program, content, extra_files=texts)
        write_bytes(path, content.getvalue())
        return (path,)

    def open(self, path: Path) -> Opened:
        about, archive = _archive(path)
        network = rebuild(about.network, about.arguments, _weights(archive, path), str(path))
        if is_rgb_graph(about):
            network = RgbGraph(network, about.scale)
        return Opened(about, _session(network.eval()))

    def verify(
        self, network: nn.Module, about: Description, path: Path, options: Options, allowed: float
    ) -> Verified | NotVerified:
        from hpcdistill.deploy.verification import compare

        program = torch.export.load(io.BytesIO(path.read_bytes()))
        return compare(network, about, _session(program.module()), self.runtime(), allowed)

    def is_ours(self, path: Path) -> bool:
        try:
            _archive(path)
        except UserError:
            return False
        return True

    def runtime(self) -> str:
        return f"torch.export {torch.__version__}"


def _session(network: nn.Module) -> Session:
    def run(images: Batch) -> Batch:
        with torch.inference_mode():
            made: Tensor = network(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
            result: Batch = made.contiguous().numpy()
            return result

    return run


def _archive(path: Path) -> tuple[Description, dict[str, bytes]]:
    """What the file says of itself, and its members by their names below the archive's own folder."""
    content = io.BytesIO(path.read_bytes())  # a damaged one would have the system seek to places that there are not
    try:
        with zipfile.ZipFile(content) as file:
            if sum(member.file_size for member in file.infolist()) > _LARGEST:
                raise ValueError("it is too large")
            members = {member.filename.partition("/")[2]: file.read(member) for member in file.infolist()}
        text = members[f"extra/{METADATA_KEY}"].decode()
    except (zipfile.BadZipFile, zlib.error, struct.error, ArithmeticError, *_DAMAGED):
        raise UserError(f"{path}: {_NOT_OURS}") from None
    return Description.from_json(text, str(path)), members


def _weights(members: dict[str, bytes], path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict, which the archive holds as plain numbers."""
    weights = {}
    try:
        config = json.loads(members[f"{_WEIGHTS}model_weights_config.json"])["config"]
        for name, entry in config.items():
            about = entry["tensor_meta"]
            shape = [size["as_int"] for size in about["sizes"]]
            values = np.frombuffer(members[_WEIGHTS + entry["path_name"]], _TYPES[about["dtype"]])
            weights[name] = torch.from_numpy(values.reshape(shape).copy())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} in its weights); export the network again") from None
    return weights
