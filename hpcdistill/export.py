"""`hpcdistill export FORMAT MODEL --out FILE`: write a trained network in a form that other programs run.

FORMAT is onnx, shader, ncnn, openvino or torch. MODEL is a run folder, a generator's .safetensors file, or
`pretrained:x4` (x2, x3). What is written is run and compared with PyTorch before it counts as done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpcdistill.command import Parser, UserPath, end_in_order_when_terminated, program, run_command, whole
from hpcdistill.console import out, warn
from hpcdistill.deploy.formats import FORMATS, format_of
from hpcdistill.deploy.shipped import model_path
from hpcdistill.errors import UserError

if TYPE_CHECKING:
    from hpcdistill.deploy.formats.base import Options


def main(argv: list[str]) -> int:
    """Export what the command line names, and print what was written and how far it is from PyTorch."""
    arguments = _parser().parse_args(argv)
    FORMATS.check(arguments.format)
    end_in_order_when_terminated()
    # Imported only now: --help and a misspelt format answer at once.
    from hpcdistill.deploy.formats.base import Format, NotVerified, Options
    from hpcdistill.deploy.model import load_network
    from hpcdistill.deploy.rgb_graph import rgb_graph
    from hpcdistill.deploy.verification import check_replaceable, export, files_in_words, in_words

    exporter: Format = FORMATS[arguments.format]()
    path = model_path(arguments.model)
    if format_of(path) and path.is_file():
        raise UserError(f"{path}: is an export already; give the run folder or .safetensors that it was made of")
    options = Options(arguments.graph or "luma", arguments.half, arguments.opset)
    exporter.check_packages()
    target = _target(arguments.out, path, exporter.suffix, options)
    if target.exists() and path.exists() and target.samefile(path):
        raise UserError(f"--out {target}: is the network itself; give another name")
    check_replaceable(exporter, target)
    network, about, _ = load_network(path, arguments.which, arguments.generator)
    if arguments.graph == "luma" and about.colour != "luma":
        raise UserError(f"--graph luma: this {about.network} takes RGB; leave --graph out")
    if arguments.graph == "rgb":
        network, about = rgb_graph(network, about)
    files, report = export(exporter, network, about, target, options)
    out.print(f"wrote {files_in_words(files)}", markup=False, soft_wrap=True)
    if isinstance(report, NotVerified):
        warn(in_words(report))
    else:
        out.print(in_words(report), markup=False, soft_wrap=True)
    for remark in exporter.remarks(target, about, options):
        out.print(remark, markup=False, soft_wrap=True)
    return 0


def _target(given: Path | None, model: Path, suffix: str, options: Options) -> Path:
    """The file to write: the one that was named, or one named after the network in the folder that was, or here."""
    if given is not None and not given.is_dir():
        if given.suffix.lower() != suffix:
            raise UserError(f"--out {given}: must end in {suffix}, or be a folder that there is")
        return given
    name = model.resolve().name if model.is_dir() else model.stem
    if suffix == ".xml":  # beside it lies a .bin, as beside ncnn's .param
        name += "-openvino"
    graph = "-rgb" if options.graph == "rgb" else ""
    half = "-half" if options.half else ""
    return (given or Path()) / f"{name}{graph}{half}{suffix}"


def _parser() -> Parser:
    parser = Parser(
        prog=program("export"),
        description="Write a trained network in a form that other programs run, and compare what was written with "
        "PyTorch: a larger difference than rounding, and nothing is left.",
    )
    parser.add_argument("format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("model", metavar="MODEL", help="run folder, .safetensors, or pretrained:x4 (x2, x3)")
    parser.add_argument("--out", action=UserPath, metavar="FILE", help="file or folder; default: after MODEL, here")
    parser.add_argument(
        "--graph",
        choices=("luma", "rgb"),
        help="of a network of luma: luma (default), as it was trained; rgb, with colour, chroma and clamp inside",
    )
    parser.add_argument("--half", action="store_true", help="16-bit weights and arithmetic; input and output: float32")
    parser.add_argument("--opset", type=whole, metavar="N", help="of ONNX; default 18, for onnxruntime 1.14 and later")
    parser.add_argument("--which", choices=("best", "last"), help="which of a run's weights; default: best, else last")
    parser.add_argument("--generator", metavar="NAME", help="which of a run's networks; default: its student")
    return parser


if __name__ == "__main__":
    run_command(main)
