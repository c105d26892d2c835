"""Pack images into a data set that hpcdistill trains on: `python shards/pack.py RECIPE [--source DIR] [--out DIR]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from hpcdistill.command import Parser, UserPath, positive, program, run_command
from hpcdistill.data.images import MAX_PIXELS, colour
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import OWN, Recipe, load_recipe, recipe_names
from hpcdistill.data.pack.sources import of_two_folders
from hpcdistill.data.places import data_root, sources_folder
from hpcdistill.errors import UserError
from hpcdistill.ops.downsampling import ResizeRule

_KINDS = {
    "lr-hr": "single images, packed with their down-sampled versions at 2, 3 and 4 (super-resolution)",
    "paired": "pairs of A and B",
    "unpaired": "A and B apart",
}


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog=program("pack"),
        description="Pack images into shards: lossless, or with the bytes of the files themselves.",
        epilog=f"{recipes()}\n\nStopped or killed, the same command goes on where it was. See docs/data.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="one of the recipes below, or the path of a recipe's YAML")
    parser.add_argument(
        "--source",
        action=UserPath,
        metavar="DIR",
        help="folder of the images (default: where shards/fetch.py puts them)",
    )
    for side, what in (("a", "are translated"), ("b", "they become, of the same names: a teacher's, say")):
        parser.add_argument(
            f"--{side}",
            action=UserPath,
            metavar="DIR",
            help=f"paired: folder of the images that {what}; --a and --b take the place of --source",
        )
    parser.add_argument(
        "--out",
        action=UserPath,
        metavar="DIR",
        help="folder of the packed data set (default: RECIPE in $HPCDISTILL_DATA, or in data/packed)",
    )
    parser.add_argument(
        "--lr",
        choices=["computed", *get_args(ResizeRule), "official"],
        default="computed",
        help="down-sampled images: newer, older = as MATLAB of about 2018 or of 2015 computes them, exact = as this "
        "package did before it had these rules, official = those that came with the set; computed (default) = by the "
        "rule of the set that lies in --out, else newer",
    )
    parser.add_argument(
        "--on-error", choices=["stop", "skip"], default="stop", help="what to do with a bad image (default: stop)"
    )
    parser.add_argument("--recursive", action="store_true", help="take the images in folders below, too")
    parser.add_argument(
        "--flatten", metavar="COLOUR", help="lay transparent pixels over it: white, #808080 (default: refuse them)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in --out")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse images with more pixels (default: {MAX_PIXELS})",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="the bytes are the same for any number (default: all cores this process may use)",
    )
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe)
    source = options.source or fetched(recipe)
    if options.a or options.b:
        recipe, source = of_folders(recipe, options), options.a
    pack(
        recipe,
        source,
        options.out or data_root() / recipe.name,
        on_error=options.on_error,
        overwrite=options.overwrite,
        max_pixels=options.max_pixels,
        official_lr=options.lr == "official",
        resize=options.lr if options.lr in get_args(ResizeRule) else None,
        recursive=options.recursive,
        flatten=colour(options.flatten) if options.flatten is not None else None,
        processes=options.processes,
    )


def of_folders(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe `paired` with the folders --a and --b; UserError for another, and for what does not go with them."""
    given = f"--a {options.a}" if options.a else f"--b {options.b}"
    if recipe.name != OWN["paired"]:
        raise UserError(f"{given}: is for the recipe {OWN['paired']}; the recipe {recipe.name} knows its folders")
    if not (options.a and options.b):
        raise UserError(f"{given}: pairs are of two folders; add --{'b' if options.a else 'a'} DIR")
    if options.source or not options.out:
        wrong = (
            f"leave --source {options.source} out" if options.source else "say with --out DIR where they are packed to"
        )
        raise UserError(f"{given}: names the images; {wrong}")
    return of_two_folders(recipe, options.a, options.b, recursive=options.recursive)


def fetched(recipe: Recipe) -> Path | None:
    """The folder that `shards/fetch.py` unpacked the recipe's images to, if it did."""
    folder = sources_folder(recipe.name)
    return folder if not recipe.builtin and folder.is_dir() else None


def recipes() -> str:
    """The recipes of the clone by kind."""
    loaded = [load_recipe(name) for name in recipe_names()]
    width = max(len(recipe.name) for recipe in loaded)
    return "\n".join(
        f"{kind}: {what}\n" + "\n".join(f"  {r.name:<{width}}  {r.title}" for r in loaded if r.kind == kind)
        for kind, what in _KINDS.items()
    )


if __name__ == "__main__":
    run_command(main)
