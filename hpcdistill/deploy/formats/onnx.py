"""ONNX, which onnxruntime and most other programs read: one file that says what it eats, with no trace of its place."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcdistill.deploy.description import METADATA_KEY, Description
from hpcdistill.deploy.fast_form import fast_form, with_leaky_relu
from hpcdistill.deploy.formats.base import (
    Format,
    Opened,
    Options,
    dynamic_axes,
    example,
    in_eval_mode,
)
from hpcdistill.deploy.interface import in_words
from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.deploy.session import Batch, Session, check_made
from hpcdistill.errors import UserError, is_out_of_memory
from hpcdistill.storage import write_bytes

# PyTorch's exporter writes 18 and has anything else converted. onnxruntime reads it, and IR 8 with it, since 1.14.
OPSET = 18
INPUT, OUTPUT = "input", "output"
CHECKSUM_KEY = "sha256"  # of all bytes before it
_SEAL = len(CHECKSUM_KEY) + 64 + 6  # bytes: key and value, each with a tag and a length, in an entry with the same
_OURS = ("", "ai.onnx")  # domains of operators that every runtime has
_NOT_OURS = "is no ONNX file that hpcdistill exported; export the network with `hpcdistill export onnx`"


class Onnx(Format):
    """`input` [batch, channels, height, width] to `output`, both float32, in one file.

    With `half` weights and arithmetic are float16 and the casts are inside, so that a program that runs the one file
    runs the other. The same network gives the same bytes.
    """

    name = "onnx"
    suffix = ".onnx"
    extra = "export"
    modules = ("onnx", "onnxscript", "onnxruntime")
    options = frozenset({"graph", "half", "opset"})

    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        import onnx

        network = in_eval_mode(with_leaky_relu(network) if options.half else fast_form(network))
        opset = OPSET if options.opset is None else options.opset
        if options.half and isinstance(network, RgbGraph):
            network.network = _Half(network.network)  # colour costs nothing, and would lose another level
        elif options.half:
            network = _Half(network)
        model = _exported(network, about, opset)
        _check_opset(model, opset)
        _strip(model)
        # Nothing is left of what the exporter's newer one is for, and older runtimes refuse that.
        model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
        texts = {METADATA_KEY: about.to_json(), **in_words(about)}
        if options.half:
            texts["precision"] = "float16 inside; input and output are float32"
        for key, value in texts.items():
            model.metadata_props.add(key=key, value=value)
        write_bytes(path, _sealed(model.SerializeToString(deterministic=True)))
        return (path,)

    def open(self, path: Path) -> Opened:
        self.check_packages()
        content = path.read_bytes()
        about = _description(content, path)
        if _sealed(content[:-_SEAL]) != content:
            raise UserError(f"{path}: is damaged, or was changed since it was exported; copy it or export it again")
        return Opened(about, _session(content, about, path))

    def is_ours(self, path: Path) -> bool:
        self.check_packages()
        try:
            _description(path.read_bytes(), path)
        except UserError:
            return False
        return True

    def runtime(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"


class _Half(nn.Module):
    """A network in float16 that takes and gives float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, image: Tensor) -> Tensor:
        made: Tensor = self.network(image.half())
        return made.float()


def _exported(network: nn.Module, about: Description, opset: int) -> Any:
    with _quiet():
        try:
            program = torch.onnx.export(
                network,
                (example(about),),
                None,
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(dynamic_axes(about),),
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"PyTorch cannot write this {about.network} as ONNX of opset {opset}: {reason}") from None
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, of which none is the user's business: what it did is looked at afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_opset(model: Any, asked: int) -> None:
    """The exporter writes another opset where it cannot convert, and calls that success."""
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("") != asked:
        raise UserError(
            f"--opset {asked}: the exporter wrote {written.get('')} in its place; leave --opset out ({OPSET})"
        )
    if others := sorted(set(written) - set(_OURS)):
        raise UserError(
            f"the exporter used operators that other runtimes lack ({', '.join(others)}); nothing was written"
        )


def _strip(message: Any) -> None:
    """Remove what the exporter notes on every part: stack traces with the paths of this machine, names of classes."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string", "value_info"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _sealed(content: bytes) -> bytes:
    """`content` and its checksum: bytes of a protobuf message may follow those of another, and add to its lists.

    One wrong bit in a size has onnxruntime take all memory that there is, one in a weight makes another picture.
    """
    import onnx

    seal = onnx.ModelProto()
    seal.metadata_props.add(key=CHECKSUM_KEY, value=hashlib.sha256(content).hexdigest())
    added: bytes = seal.SerializeToString()
    assert len(added) == _SEAL
    return content + added


def _description(content: bytes, path: Path) -> Description:
    """What the file says of itself; UserError for one that is damaged, is not ours, or is more than this one file."""
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception:  # protobuf's own class, which has no types
        raise UserError(f"{path}: {_NOT_OURS}") from None
    texts = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in texts:
        raise UserError(f"{path}: {_NOT_OURS}")
    about = Description.from_json(texts[METADATA_KEY], str(path))
    if any(entry.domain not in _OURS for entry in model.opset_import) or model.functions:
        raise UserError(f"{path}: has operators of its own, which no export of ours has; export it again")
    if _has_external_data(model):
        raise UserError(f"{path}: keeps weights in another file, which no export of ours does; export it again")
    return about


def _has_external_data(message: Any) -> bool:
    for field, value in message.ListFields():
        if field.name == "external_data" or (field.name == "data_location" and value):
            return True
        if field.message_type is not None:
            parts = [value] if hasattr(value, "ListFields") else value
            if any(_has_external_data(part) for part in parts):
                return True
    return False


def _session(content: bytes, about: Description, path: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()  # OMP_NUM_THREADS means it too
    try:
        # Its fallback would print a banner to stdout, and try the same again.
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # its own class for each of its codes, and none above them
        raise UserError(f"{path}: onnxruntime cannot run it ({_first_line(error)}); export the network again") from None
    ends = [*session.get_inputs(), *session.get_outputs()]
    if [(end.name, end.type) for end in ends] != [(INPUT, "tensor(float)"), (OUTPUT, "tensor(float)")]:
        raise UserError(f"{path}: {_NOT_OURS}")

    def run(images: Batch) -> Batch:
        try:
            made: Batch = session.run([OUTPUT], {INPUT: np.ascontiguousarray(images, dtype=np.float32)})[0]
        except Exception as error:
            if is_out_of_memory(error) or "alloc" in str(error).lower():
                raise MemoryError from None
            raise UserError(f"{path}: onnxruntime: {_first_line(error)}") from None
        return check_made(about, images, made, str(path))

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
