"""Get a data set: download, check, unpack and pack it: `python shards/fetch.py RECIPE [--from FILE_OR_FOLDER]`."""

from __future__ import annotations

import argparse
import shlex

from hpcdistill.command import UserPath, positive, run_command
from hpcdistill.console import say
from hpcdistill.data.images import MAX_PIXELS, colour
from hpcdistill.data.pack.fetching import fetch, obtain
from hpcdistill.data.pack.recipes import load_recipe, recipe_names
from hpcdistill.data.places import VARIABLE, data_root


def main(arguments: list[str]) -> None:
    recipes = "\n".join(f"  {name:<14} {load_recipe(name).title}" for name in recipe_names())
    parser = argparse.ArgumentParser(
        prog="python shards/fetch.py",
        description="Download a data set with its checksums, unpack it safely and pack it for training.",
        epilog=f"recipes:\n{recipes}\n\nStopped or killed, the same command goes on where it was. Everything lies "
        f"below ${VARIABLE} (now {data_root()}). See docs/data.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="one of the recipes below, or the path of a recipe's YAML")
    parser.add_argument(
        "--from",
        dest="origin",
        action=UserPath,
        metavar="FILE_OR_FOLDER",
        help="your own copy: the archive, a folder of the archives, or a folder of the images; nothing is downloaded",
    )
    parser.add_argument("--mirror", metavar="ADDRESS", help="try ADDRESS/<file> first; checksums are compared as ever")
    parser.add_argument(
        "--with",
        dest="parts",
        action="append",
        default=[],
        metavar="PART",
        help="an optional part too (div2k: lr, the official LR images, packed in place of computed ones)",
    )
    parser.add_argument(
        "--out", action=UserPath, metavar="DIR", help=f"folder of the packed set (default: ${VARIABLE}/RECIPE)"
    )
    parser.add_argument("--no-pack", action="store_true", help="stop after unpacking")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="packing: what to do with a bad image (default: stop)",
    )
    parser.add_argument("--recursive", action="store_true", help="packing: take the images in folders below, too")
    parser.add_argument("--flatten", metavar="COLOUR", help="packing: lay transparent pixels over it: white, #808080")
    parser.add_argument("--overwrite", action="store_true", help="packing: replace another data set in --out")
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help="packing: refuse images with more pixels"
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="packing processes (default: all cores)")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe)
    what = {key: getattr(options, key) for key in ("origin", "mirror", "parts", "recursive")}
    if options.no_pack:
        source = fetch(recipe, **what)
        if source is None:
            say(f"the recipe {recipe.name} ships inside {recipe.builtin}; there is nothing to fetch")
        else:
            official = " --lr official" if "lr" in options.parts else ""
            command = shlex.join(["python", "shards/pack.py", options.recipe, "--source", str(source)])
            say(f"next: {command}{official}{' --recursive' * options.recursive}")
        return
    obtain(
        recipe,
        options.out or data_root() / recipe.name,
        on_error=options.on_error,
        overwrite=options.overwrite,
        max_pixels=options.max_pixels,
        flatten=colour(options.flatten) if options.flatten is not None else None,
        processes=options.processes,
        **what,
    )


if __name__ == "__main__":
    run_command(main)
