"""Get data sets: download, check, unpack and pack them: `python shards/fetch.py RECIPE [RECIPE ...]`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

from hpcdistill.command import Parser, UserPath, mendable, positive, program, run_command
from hpcdistill.console import say
from hpcdistill.data.images import MAX_PIXELS, colour
from hpcdistill.data.pack.fetching import fetch, obtain
from hpcdistill.data.pack.recipes import Recipe, load_recipe, recipe_names
from hpcdistill.data.places import VARIABLE, data_root
from hpcdistill.errors import UserError

OF_ONE = {"origin": "--from", "out": "--out", "parts": "--with"}  # options that fit one recipe only


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    recipes = {name: load_recipe(name) for name in options.recipe}  # a misspelt one is said before hours of downloading
    if len(recipes) == 1:
        for name, recipe in recipes.items():
            _get(name, recipe, options)
        return
    for option, written in OF_ONE.items():
        if getattr(options, option):
            raise UserError(f"{written}: belongs to one recipe; fetch {' and '.join(recipes)} one after the other")
    _get_all(recipes, options)


def _get_all(recipes: Mapping[str, Recipe], options: argparse.Namespace) -> None:
    """Each recipe on its own: what one cannot get does not keep the others. UserError when one has failed."""
    results: dict[str, str | None] = {}
    for name, recipe in recipes.items():
        try:
            _get(name, recipe, options)
            results[name] = None
        except (UserError, OSError) as error:
            results[name] = mendable(error)
            say(f"{name}: {results[name]}", style="bold red")
    for name, reason in results.items():
        done = "fetched" if options.no_pack else "packed"
        say(f"{name}: {done if reason is None else f'failed: {reason}'}", None if reason is None else "bold red")
    failed = [name for name, reason in results.items() if reason is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} recipes failed: {', '.join(failed)}; the same command goes on with them"
        )


def _get(name: str, recipe: Recipe, options: argparse.Namespace) -> None:
    """Fetch and, unless told not to, pack one recipe; `name` is what the user calls it."""
    what = {"origin": options.origin, "mirror": options.mirror, "parts": options.parts, "recursive": options.recursive}
    if options.no_pack:
        source = fetch(recipe, **what)
        if source is None:
            say(f"the recipe {recipe.name} ships inside {recipe.builtin}; there is nothing to fetch")
        else:
            official = " --lr official" if "lr" in options.parts else ""
            command = shlex.join(["python", "shards/pack.py", name, "--source", str(source)])
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


def _parser() -> Parser:
    recipes = "\n".join(f"  {name:<14} {load_recipe(name).title}" for name in recipe_names())
    parser = Parser(
        prog=program("fetch"),
        description="Download data sets with their checksums, unpack them safely and pack them for training.",
        epilog=f"recipes:\n{recipes}\n\nStopped or killed, the same command goes on where it was. Of several recipes "
        f"each is fetched on its own. Everything lies below ${VARIABLE} (now {data_root()}). See docs/data.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="+", metavar="RECIPE", help="recipes of those below, or the path of a recipe's YAML"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        action=UserPath,
        metavar="FILE_OR_FOLDER",
        help="your own copy of one: the archive, a folder of its archives, or of the images; nothing is downloaded",
    )
    parser.add_argument("--mirror", metavar="ADDRESS", help="try ADDRESS/<file> first; checksums are compared as ever")
    parser.add_argument(
        "--with",
        dest="parts",
        action="append",
        default=[],
        metavar="PART",
        help="an optional part of one too (div2k: lr, the official LR images, packed in place of computed ones)",
    )
    parser.add_argument(
        "--out",
        action=UserPath,
        metavar="DIR",
        help=f"of one recipe: folder of the packed set (default: ${VARIABLE}/RECIPE)",
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
    return parser


if __name__ == "__main__":
    run_command(main)
