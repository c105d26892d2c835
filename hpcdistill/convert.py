"""`hpcdistill convert FILE --out NAME.safetensors`: a published generator as a file that every command takes.

FILE is a PyTorch checkpoint (.pth) of CycleGAN, Pix2Pix, OMGD, DCD or GAN Compression: a state dict, perhaps behind
DataParallel's `module.`, or several by name. Only tensors are read: nothing in the file is executed. Which network it
is, its widths too, the tensors say. `evaluate`, `infer`, `export` and `init.<generator>=` take what is written.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

from hpcdistill.command import Parser, UserPath, program, run_command
from hpcdistill.console import out
from hpcdistill.errors import UserError


def main(argv: list[str]) -> int:
    """Write the file, and print which network it holds."""
    options = _parser().parse_args(argv)
    source, target = options.file, options.out
    if target.suffix != ".safetensors":
        raise UserError(f"--out {target}: must end in .safetensors")
    if target.exists():
        raise UserError(f"--out {target}: is there already; give another name, or remove it first")
    # Imported only now: --help and a misspelt name answer at once.
    from hpcdistill.models.published import read_published
    from hpcdistill.models.registry import save_generator
    from hpcdistill.storage import sha256_file

    network, layout = read_published(source, options.part)
    notes = {"converted_from": source.name, "sha256": sha256_file(source), "layout": layout.name}
    if options.part is not None:
        notes["part"] = options.part
    target.parent.mkdir(parents=True, exist_ok=True)
    save_generator(network, target, notes)
    count = sum(parameter.numel() for parameter in network.parameters())
    named = ", ".join(f"{key} {value}" for key, value in cast(Any, network).arguments.items())
    out.print(
        f"{target}: {type(network).__name__}, {count / 1e6:.3f} M parameters ({named})", markup=False, soft_wrap=True
    )
    return 0


def _parser() -> Parser:
    parser = Parser(prog=program("convert"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", action=UserPath, metavar="FILE", help="the published .pth file")
    parser.add_argument("--out", action=UserPath, required=True, metavar="NAME.safetensors", help="what to write")
    parser.add_argument("--part", metavar="NAME", help="which network, of a file that holds several: G_A, say")
    return parser


if __name__ == "__main__":
    run_command(main)
