"""`hpcdistill infer [MODEL] PICTURE_OR_FOLDER ... --out DIR`: enlarge or translate pictures.

MODEL is a run folder, a generator's .safetensors file, a file that `hpcdistill.export` made, or `pretrained:x4` (x2,
x3); without one the shipped x4 student enlarges. Pictures come back as PNG and as the kind they were: gray, 16 bits,
transparency and colour profile stay, EXIF turns them upright. A bad picture is named and passed over. Of a packed set
of images to translate DIR/A gets its images A and DIR/B what is made of them: pairs that `pack.py paired` takes.
"""

from __future__ import annotations

import argparse
import time
from itertools import chain
from typing import TYPE_CHECKING

from hpcdistill.command import Parser, UserPath, end_in_order_when_terminated, positive, program, run_command, whole
from hpcdistill.console import err, say, warn
from hpcdistill.deploy.formats import format_of
from hpcdistill.deploy.shipped import DEFAULT, PREFIX
from hpcdistill.errors import EXIT_FAILED, UserError, plural
from hpcdistill.storage import user_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpcdistill.deploy.model import Model
    from hpcdistill.deploy.picture_files import Conversion
    from hpcdistill.deploy.tiles import OnProgress


def main(argv: list[str]) -> int:
    """Make a picture of each that the command line names; returns the exit code."""
    options = _parser().parse_args(argv)
    name, words = split_model(options.words)
    if not words:
        raise UserError(
            f"{name}: and which pictures? name some after the model; where this is a folder of pictures, name a model "
            f"before it: {DEFAULT}"
        )
    if late := next((word for word in words if is_model(word)), None):
        raise UserError(f"{late}: is a model; it comes first, the pictures after it")
    # Imported only now: --help and a misspelt path answer at once.
    from hpcdistill.deploy.allocator import keep_freed_memory
    from hpcdistill.deploy.picture_files import conversions, packed_set

    keep_freed_memory()
    end_in_order_when_terminated()
    pictures = [user_path(word) for word in words]
    packed = packed_set(pictures)
    if options.direction and not packed:
        raise UserError(f"--direction {options.direction}: is for packed sets; leave it out for pictures")
    work, unusable = ([], []) if packed else conversions(pictures, options.out)
    from hpcdistill.deploy.model import load

    model = load(name, which=options.which, generator=options.generator, device=_device(options.device))
    if options.scale not in (None, model.about.scale):
        raise UserError(f"--scale {options.scale}: {name} enlarges x{model.about.scale}; use a network of that scale")
    model.refuse_tiles(options.tile)
    if packed:
        from hpcdistill.deploy.packed_pictures import unpack_inputs

        if model.about.task == "super-resolution":
            raise UserError(f"{packed}: is a packed set, which networks that translate take; give {name} pictures")
        inputs, options.out = unpack_inputs(packed, options.out, options.direction or "AtoB")
        work, unusable = conversions([inputs], options.out)
    return _convert(model, work, unusable, options)


def is_model(word: str) -> bool:
    """Whether a word of the command line names a model: by its form, or by what lies in a folder."""
    if word.startswith(PREFIX):
        return True
    path = user_path(word)
    if not path.is_dir():
        return path.suffix.lower() in (".safetensors", ".pth") or format_of(path) is not None
    saved = any((path / name).is_file() for name in ("environment.json", "model.safetensors"))
    return saved or any(path.glob("generators/*/*.safetensors"))


def split_model(words: Sequence[str]) -> tuple[str, list[str]]:
    """The model that the first word is, and the others; where it is no model, the shipped student, and all."""
    first = words[0]
    if is_model(first):
        return first, list(words[1:])
    if user_path(first).suffix.lower() == ".glsl":
        raise UserError(f"{first}: is a shader, which video players run; give the run or the file that it was made of")
    if not user_path(first).exists():
        raise UserError(f"{first}: no such model, picture or folder; check the path")
    return DEFAULT, list(words)


def _convert(model: Model, work: Sequence[Conversion], unusable: Sequence[str], options: argparse.Namespace) -> int:
    from rich.progress import Progress

    from hpcdistill.data.images import MAX_PIXELS, count_pixels

    most = options.max_megapixels * 1_000_000 if options.max_megapixels else MAX_PIXELS
    begun = time.perf_counter()
    skipped = list(unusable)
    with Progress(console=err, transient=True, disable=not err.moves) as bar:
        sizes = [count_pixels(conversion.source) for conversion in work]
        task = bar.add_task("pictures", total=sum(sizes))
        for conversion, size in zip(work, sizes, strict=True):
            before = bar.tasks[0].completed
            try:
                _make(model, conversion, options.tile, most, lambda done: bar.advance(task, done))
            except UserError as error:
                source = str(conversion.source)
                skipped.append(source)
                about = "" if str(error).startswith(source) else f"{source}: "
                warn(f"skipped {about}{error}")
            bar.update(task, completed=before + size)
    made = len(work) + len(unusable) - len(skipped)
    if not made:
        raise UserError("no picture could be made; see the warnings above")
    took = time.perf_counter() - begun
    say(f"{model.origin}: wrote {plural(made, 'picture')} to {options.out} in {took:.1f} s")
    if skipped:
        say(f"{plural(len(skipped), 'picture')} could not be used: {', '.join(skipped)}", "yellow")
    return EXIT_FAILED if skipped else 0


def _make(model: Model, conversion: Conversion, tile: int | None, most: int, progress: OnProgress) -> None:
    """Read, make, write; UserError for a picture that cannot be used."""
    from hpcdistill.deploy.pictures import read_picture, write_png

    picture = read_picture(conversion.source, most)
    strips = model.strips(picture, tile, progress)
    first = next(strips)  # a network that refuses the picture leaves no folder behind
    conversion.out.parent.mkdir(parents=True, exist_ok=True)
    write_png(conversion.out, model.size(*picture.pixels.shape[:2]), chain([first], strips), picture.profile)


def _device(asked: str) -> str:
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu, or run where there is a GPU")
    return "cpu"


def _parser() -> Parser:
    parser = Parser(prog=program("infer"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="MODEL|PICTURE|FOLDER", help="a model, then pictures or folders")
    parser.add_argument("--out", action=UserPath, required=True, metavar="DIR", help="where the pictures go, as PNG")
    parser.add_argument("--which", choices=("best", "last"), help="which of a run's weights; default: best, else last")
    parser.add_argument("--generator", metavar="NAME", help="which of a run's networks; default: its student")
    parser.add_argument("--scale", type=whole, help="refuse a network of another scale")
    parser.add_argument(
        "--tile",
        type=positive,
        metavar="PIXELS",
        help="of the input, computed at once; default: 512. Tiles equal the whole picture. Translation has none",
    )
    parser.add_argument(
        "--max-megapixels", type=positive, metavar="N", help="of a picture that is read; default: 80, as a guard"
    )
    parser.add_argument(
        "--direction",
        choices=("AtoB", "BtoA"),
        help="of a packed set, which side is translated: A (default), or B, and DIR/A gets what is made of it",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    run_command(main)
