"""The formats that a network is exported in, one a file, and which of them a file is in."""

from __future__ import annotations

from pathlib import Path

from hpcdistill.registry import Registry

# Subclasses of `formats.base.Format`, by the word that the command takes.
FORMATS = Registry(
    "format",
    {
        "onnx": "hpcdistill.deploy.formats.onnx:Onnx",
        "shader": "hpcdistill.deploy.formats.shader:Shader",
        "ncnn": "hpcdistill.deploy.formats.ncnn:Ncnn",
        "openvino": "hpcdistill.deploy.formats.openvino:OpenVino",
        "torch": "hpcdistill.deploy.formats.torch_export:TorchExport",
    },
)
SUFFIXES = {".onnx": "onnx", ".param": "ncnn", ".xml": "openvino", ".pt2": "torch"}  # of what can be opened again


def format_of(path: Path) -> str | None:
    """The format whose file `path` is, by its suffix; None for one that is none of them."""
    return SUFFIXES.get(path.suffix.lower())
