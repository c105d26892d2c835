"""OpenVINO: a graph in an .xml file, which says what the network is, and weights in a .bin file beside it."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcdistill.deploy.description import METADATA_KEY, Description
from hpcdistill.deploy.formats.base import Format, Opened, Options, beside, example, in_eval_mode
from hpcdistill.deploy.formats.traced import traced
from hpcdistill.deploy.interface import in_words
from hpcdistill.deploy.session import Batch, check_made, check_size
from hpcdistill.errors import UserError, is_out_of_memory
from hpcdistill.storage import write_bytes

INPUT, OUTPUT = "input", "output"
_MOST = 2**26  # bytes of an .xml file that are looked at; IDN's has 100 kB
_UNSEALED = "0" * 64  # what the digest is computed over in its own place
_SEAL = re.compile(rb'<sha256 value="([0-9a-f]{64})" ?/>')
_REMEDY = "export the network with `hpcdistill export openvino`"


class OpenVino(Format):
    """`input` [batch, channels, height, width] to `output`, both float32; .xml and .bin are copied together.

    The file named is the .xml. Its `rt_info` says what the network is. The same network gives the same bytes. With
    `half` the weights are float16 and the arithmetic stays float32.
    """

    name = "openvino"
    suffix = ".xml"
    extra = "openvino"
    modules = ("openvino",)
    options = frozenset({"graph", "half"})

    def remarks(self, path: Path, about: Description, options: Options) -> tuple[str, ...]:
        """What whoever runs it elsewhere would not guess."""
        return (
            "OpenVINO computes in bfloat16 on some processors (57 dB from float32): compile it with "
            "INFERENCE_PRECISION_HINT f32, as hpcdistill does",
        )

    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        """UserError for a network with an operation that OpenVINO does not have."""
        import openvino

        model = _converted(in_eval_mode(network), about)
        model.set_rt_info(about.to_json(), [METADATA_KEY, "description"])
        for key, text in in_words(about).items():
            model.set_rt_info(text, [METADATA_KEY, key])
        model.set_rt_info(_UNSEALED, [METADATA_KEY, "sha256"])
        with tempfile.TemporaryDirectory(prefix="hpcdistill-openvino-") as place:
            written = Path(place) / "network.xml"
            openvino.save_model(model, written, compress_to_fp16=options.half)
            graph, weights = written.read_bytes(), beside(written, ".bin").read_bytes()
        assert _seal(graph) == _UNSEALED
        graph = _sealed(graph, _digest(graph, weights))
        files = path, beside(path, ".bin")
        write_bytes(files[1], weights)
        write_bytes(path, graph)  # last: where it is, the other is
        return files

    def open(self, path: Path) -> Opened:
        """UserError for files that are not ours, that are not complete, or of which anything has changed."""
        self.check_packages()
        _check(path, beside(path, ".bin"))
        return _opened(path)

    def is_ours(self, path: Path) -> bool:
        try:
            _check(path, beside(path, ".bin"))
        except UserError:
            return False
        return True

    def runtime(self) -> str:
        import openvino

        return f"OpenVINO {openvino.__version__.partition('-')[0]}"


class OpenVinoSession:
    """A network in OpenVINO on the CPU, in float32 arithmetic, with as many threads as PyTorch."""

    def __init__(self, compiled: Any, about: Description, origin: str) -> None:
        self.compiled = compiled
        self.about = about
        self.origin = origin

    def __call__(self, images: Batch) -> Batch:
        """`[B, C, H, W]` to `[B, C, scale H, scale W]`."""
        check_size(self.about, images, self.origin)
        try:
            # A new request each time: two threads may ask one session.
            found = self.compiled.create_infer_request().infer([images])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError from None
            raise UserError(f"{self.origin}: OpenVINO: {_reason(error)}") from None
        made: Batch = found[0]
        if not made.size:
            raise MemoryError  # OpenVINO gives an empty array then, and no error
        return check_made(self.about, images, made, self.origin)


def _converted(network: nn.Module, about: Description) -> Any:
    """`network` as an openvino.Model with any batch, height and width.

    Not by `openvino.convert_model`, which does the same and tells Google Analytics of it unless told otherwise.
    """
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    picture = example(about)
    try:
        frontend = FrontEndManager().load_by_framework("pytorch")
        recorded = TorchScriptPythonDecoder(traced(network, picture), example_input=(picture,))
        model = frontend.convert(frontend.load(recorded))
    except Exception as error:  # a class of its own for each kind of failure, and none above them
        raise UserError(f"OpenVINO cannot convert this {about.network} ({_reason(error)}); export it as onnx") from None
    apply_moc_transformations(model, cf=True, smart_reshape=False)  # half as large, and no slower to compile
    # OpenVINO's own names count what this process has made; with them no two files are the same.
    model.set_friendly_name(about.network)
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    model.reshape([-1, about.channels, -1, -1])
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    return model


def _opened(path: Path) -> Opened:
    import openvino

    try:
        core = openvino.Core()
        model = core.read_model(path)
        about = Description.from_json(model.get_rt_info([METADATA_KEY, "description"]).astype(str), str(path))
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"{path}: OpenVINO cannot load it ({_reason(error)}); {_REMEDY} again") from None
    return Opened(about, OpenVinoSession(compiled, about, str(path)))


def _check(path: Path, weights: Path) -> None:
    """UserError for what is not, to the last byte, what `write` has written."""
    with open(path, "rb") as file:
        graph = file.read(_MOST)
    seal = _seal(graph)
    if seal is None:
        raise UserError(f"{path}: is no OpenVINO network that hpcdistill exported, or a damaged one; {_REMEDY}")
    if not weights.is_file():
        raise UserError(f"{path}: {weights.name} is not beside it; copy it there, or {_REMEDY}")
    if seal != _digest(_sealed(graph, _UNSEALED), weights.read_bytes()):
        raise UserError(f"{path}: it or {weights.name} is damaged or belongs to another export; copy both again")


def _seal(graph: bytes) -> str | None:
    """The digest that an .xml file holds; None where there is not exactly one."""
    found = _SEAL.findall(graph)
    return found[0].decode() if len(found) == 1 else None


def _sealed(graph: bytes, digest: str) -> bytes:
    return _SEAL.sub(f'<sha256 value="{digest}" />'.encode(), graph)


def _digest(graph: bytes, weights: bytes) -> str:
    made = hashlib.sha256(len(graph).to_bytes(8, "little"))
    made.update(graph)
    made.update(weights)
    return made.hexdigest()


def _reason(error: Exception) -> str:
    """The one line of what OpenVINO says that helps: many others are places in its own source."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "No conversion rule" in line), lines[-1])[:200]
