"""ncnn: layers in a .param file and weights in a .bin file, which upscayl and realesrgan-ncnn-vulkan read, by pnnx.

A .param file has no room for what the network is: that lies beside both in a .json file, with a digest of all three.
ncnn trusts what it loads: damaged files end in a crash or in nonsense.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcdistill.deploy.description import METADATA_KEY, Description
from hpcdistill.deploy.formats.base import Format, Opened, Options, beside, example, in_eval_mode
from hpcdistill.deploy.formats.ncnn_layers import PROGRAMS, PlainRgb
from hpcdistill.deploy.formats.traced import save, traced
from hpcdistill.deploy.interface import in_words
from hpcdistill.deploy.rgb_graph import RgbGraph
from hpcdistill.deploy.session import Batch, check_made, check_size
from hpcdistill.errors import UserError
from hpcdistill.storage import json_object, parse_json, write_bytes

# What both programs call them: `ex.input("data", ...)` and `ex.extract("output", ...)` in src/realesrgan.cpp of
# xinntao/Real-ESRGAN-ncnn-vulkan (37026f4) and of upscayl/upscayl-ncnn (d02fa88).
INPUT, OUTPUT = "data", "output"
OVERLAP = 10  # pixels, `prepadding` in their src/main.cpp: so far do their tiles reach into each other
_PNNX_NAMES = {"in0": INPUT, "out0": OUTPUT}
_MAGIC = b"7767517\n"  # how every .param file begins
_MOST = 2**24  # bytes of a .param or .json file that are looked at; IDN's have 10 kB
_NO_MEMORY = -100  # what ncnn's layers return then
_REMEDY = "export the network with `hpcdistill export ncnn`"


class Ncnn(Format):
    """.param, .bin and, with what the network is, .json. Blobs: `data` [channels, H, W] to `output`, float32.

    The file named is the .param; the three are copied together. The same network gives the same bytes.
    """

    name = "ncnn"
    suffix = ".param"
    extra = "export"
    modules = ("ncnn", "pnnx")
    options = frozenset({"graph", "half"})

    def remarks(self, path: Path, about: Description, options: Options) -> tuple[str, ...]:
        """What upscayl and realesrgan-ncnn-vulkan make of it: most people who ask for such files run these."""
        programs = " and ".join(PROGRAMS)
        if about.task == "translation":
            return (f"not for {programs}: they give RGB in 0 .. 1, this network takes {about.low:g} .. {about.high:g}",)
        if about.colour == "luma":
            return (f"not for {programs}: they give RGB, this network takes luma; for them export it with --graph rgb",)
        kinds = {words[0] for words in _layers(path.read_text(encoding="utf-8"))}
        lacking = {program: sorted(kinds - layers) for program, layers in PROGRAMS.items()}
        said = [f"not for {program}, which has no {', '.join(lacks)}" for program, lacks in lacking.items() if lacks]
        fitting = [program for program, lacks in lacking.items() if not lacks]
        if fitting:
            place = "put the .param and the .bin into a folder named models"
            said.append(f"for {' and '.join(fitting)}: {place}, and give -n {path.stem}")
        if "upscayl" in fitting and _scale_of_name(path.stem) != about.scale:
            said.append(f"upscayl takes the scale from the name: rename the files so that it says x{about.scale}")
        if fitting and (about.overlap is None or about.overlap > OVERLAP):
            seen = "the whole picture" if about.overlap is None else f"{about.overlap} to each side"
            said.append(f"their tiles overlap by {OVERLAP} pixels and this network sees {seen}: seams may show")
        return tuple(said)

    def write(self, network: nn.Module, about: Description, path: Path, options: Options) -> tuple[Path, ...]:
        """UserError for a network with an operation that pnnx or ncnn does not have."""
        layers, weights = _converted(in_eval_mode(network), about, options.half)
        if unknown := unknown_layers(layers):
            raise UserError(f"ncnn has no {', '.join(unknown)}, which this {about.network} needs; export it as onnx")
        text = named(layers).encode()
        values = json.loads(about.to_json())
        said = {METADATA_KEY: values, "sha256": _digest(values, text, weights), "in words": in_words(about)}
        files = _files(path)
        # The one that is opened comes last: where it is, the others are.
        contents = text, weights, (json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode()
        for file, content in reversed(list(zip(files, contents, strict=True))):
            write_bytes(file, content)
        return files

    def open(self, path: Path) -> Opened:
        """UserError for files that are not ours, that are not complete, or of which anything has changed."""
        self.check_packages()
        about = _checked(*_files(path))
        return Opened(about, NcnnSession(path, about))

    def is_ours(self, path: Path) -> bool:
        try:
            _checked(*_files(path))
        except UserError:
            return False
        return True

    def runtime(self) -> str:
        import ncnn

        return f"ncnn {ncnn.__version__}"


class NcnnSession:
    """A network in ncnn on the CPU, in float32 arithmetic, with as many threads as PyTorch."""

    def __init__(self, path: Path, about: Description) -> None:
        import ncnn

        self.about = about
        self.origin = str(path)
        self.network = ncnn.Net()
        options = self.network.opt
        options.num_threads = torch.get_num_threads()
        options.use_vulkan_compute = False
        # On processors that can (ARM), ncnn would compute in 16 bits, however wide the weights are.
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        if self.network.load_param(str(path)) or self.network.load_model(str(beside(path, ".bin"))):
            raise UserError(f"{path}: ncnn {ncnn.__version__} cannot load it; {_REMEDY} again")

    def __call__(self, images: Batch) -> Batch:
        """`[B, C, H, W]` to `[B, C, scale H, scale W]`, one image after the other: ncnn has no batch."""
        check_size(self.about, images, self.origin)
        return check_made(self.about, images, np.stack([self._made(image) for image in images]), self.origin)

    def _made(self, image: Batch) -> Batch:
        import ncnn

        # ncnn.Mat reads memory as it lies, whatever an array's strides are, and does not keep the array alive.
        held = np.ascontiguousarray(image, dtype=np.float32)
        extractor = self.network.create_extractor()
        extractor.input(INPUT, ncnn.Mat(held))
        code, made = extractor.extract(OUTPUT)
        if code == _NO_MEMORY:
            raise MemoryError
        if code:
            raise UserError(f"{self.origin}: ncnn fails at {held.shape} ({code}); {_REMEDY} again")
        result: Batch = np.array(made)  # a copy: ncnn's own memory goes with `made`
        return result


def named(layers: str) -> str:
    """The text of a .param file with the names that the programs look for in place of pnnx's."""
    lines = layers.splitlines()
    return "\n".join([*lines[:2], *map(_renamed, lines[2:]), ""])


def unknown_layers(layers: str) -> list[str]:
    """Kinds of layers in the text of a .param file that ncnn does not have; pnnx leaves them there without a word."""
    import ncnn

    return sorted({words[0] for words in _layers(layers) if ncnn.layer_to_index(words[0]) < 0})


def _layers(text: str) -> Iterator[list[str]]:
    """The words of each layer: its kind, its name, how many inputs and outputs, their blobs, parameters."""
    return (line.split() for line in text.splitlines()[2:])


def _renamed(line: str) -> str:
    words = line.split()
    blobs = 4 + int(words[2]) + int(words[3])
    words[1] = _PNNX_NAMES.get(words[1], words[1])
    words[4:blobs] = [_PNNX_NAMES.get(blob, blob) for blob in words[4:blobs]]
    return f"{words[0]:<24} {words[1]:<24} {' '.join(words[2:])}"


def _converted(network: nn.Module, about: Description, half: bool) -> tuple[str, bytes]:
    """What pnnx makes of `network`: the text of the .param file, and the .bin file.

    pnnx leaves seven files, programs with local paths among them, and talks: all that stays in a temporary folder.
    """
    import pnnx

    if isinstance(network, RgbGraph):
        network = PlainRgb(network).eval()
    picture = example(about)[:1]  # ncnn has no batch
    with tempfile.TemporaryDirectory(prefix="hpcdistill-ncnn-") as place:
        folder = Path(place)
        save(traced(network, picture), folder / "network.pt")
        shape = ",".join(map(str, picture.shape))
        done = subprocess.run(
            [pnnx.EXEC_PATH, "network.pt", f"inputshape=[{shape}]f32", f"fp16={int(half)}", "device=cpu"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        layers, weights = folder / "network.ncnn.param", folder / "network.ncnn.bin"
        if done.returncode or not layers.is_file() or not weights.is_file():
            said = (done.stdout + done.stderr).decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), f"code {done.returncode}")
            raise UserError(f"pnnx cannot convert this {about.network} ({last:.200}); export it as onnx")
        return layers.read_text(encoding="utf-8"), weights.read_bytes()


def _files(path: Path) -> tuple[Path, Path, Path]:
    return path, beside(path, ".bin"), beside(path, ".json")


def _digest(values: dict[str, Any], layers: bytes, weights: bytes) -> str:
    """Of all that the three files say; how the .json file is laid out does not matter."""
    made = hashlib.sha256()
    for part in (json.dumps(values, sort_keys=True).encode(), layers, weights):
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.hexdigest()


def _checked(param: Path, binary: Path, card: Path) -> Description:
    """What the files say that they are, once they are known to be what `write` has written."""
    layers = _start(param)
    if not layers.startswith(_MAGIC):
        raise UserError(f"{param}: is no ncnn network, or a damaged one; {_REMEDY}")
    for other in (binary, card):
        if not other.is_file():
            raise UserError(f"{param}: {other.name} is not beside it; copy it there, or {_REMEDY}")
    try:
        said = parse_json(_start(card), json_object)
    except ValueError:
        said = {}
    values = said.get(METADATA_KEY)
    if not isinstance(values, dict):
        raise UserError(f"{card}: is not what hpcdistill writes beside {param.name}; {_REMEDY}")
    if said.get("sha256") != _digest(values, layers, binary.read_bytes()):
        raise UserError(
            f"{param}: it, {binary.name} or {card.name} is damaged or belongs to another export; copy all three again"
        )
    return Description.from_json(json.dumps(values), str(card))


def _start(path: Path) -> bytes:
    """The file, of which larger ones are none of ours: those are cut."""
    with open(path, "rb") as file:
        return file.read(_MOST)


def _scale_of_name(name: str) -> int | None:
    """The scale that upscayl sees in a network's name: src/main.cpp of upscayl-ncnn, in its order."""
    return next((scale for scale in (1, 2, 3, 4, 8, 16) if f"x{scale}" in name or f"{scale}x" in name), None)
