"""Pack images into a data set that hpcdistill trains on: `python shards/pack.py RECIPE --source DIR --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hpcdistill.command import run_command
from hpcdistill.console import warn
from hpcdistill.data.images import MAX_PIXELS, other_suffixes
from hpcdistill.data.packing import pack
from hpcdistill.data.recipes import load_recipe, recipe_names
from hpcdistill.errors import UserError


def main(arguments: list[str]) -> None:
    recipes = "\n".join(f"  {name:<10} {load_recipe(name).title}" for name in recipe_names())
    parser = argparse.ArgumentParser(
        prog="python shards/pack.py",
        description="Pack images: each with its down-sampled versions at 2, 3 and 4 (MATLAB's bicubic), lossless.",
        epilog=f"recipes:\n{recipes}\n\nStopped or killed, the same command goes on where it was. See docs/data.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="one of the recipes below, or the path of a recipe's YAML")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of the images (photos needs none)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the packed data set")
    parser.add_argument(
        "--on-error", choices=["stop", "skip"], default="stop", help="what to do with a bad image (default: stop)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in --out")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse images with more pixels (default: {MAX_PIXELS})",
    )
    options = parser.parse_args(arguments)
    if options.max_pixels < 1:
        raise UserError(f"--max-pixels {options.max_pixels}: must be 1 or more")
    torch.set_num_threads(1)  # the packer has its own threads, one image each
    recipe = load_recipe(options.recipe)
    if recipe.name == "folder" and options.source is not None and options.source.is_dir():
        left = other_suffixes(options.source)
        if left:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left.items()))
            warn(f"{options.source}: not read: {listed}; convert them to PNG to have them packed")
    pack(
        recipe,
        options.source,
        options.out,
        on_error=options.on_error,
        overwrite=options.overwrite,
        max_pixels=options.max_pixels,
    )


if __name__ == "__main__":
    run_command(main)
