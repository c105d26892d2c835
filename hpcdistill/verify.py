"""Check packed data sets, find their duplicates and mend them: `python shards/verify.py DIR [DIR ...]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpcdistill.command import Parser, UserPath, program, run_command
from hpcdistill.console import Table, out, say, warn
from hpcdistill.data.check.duplicates import Duplicate, Findings, find_duplicates
from hpcdistill.data.check.verify import Report, data_sets, repair_index, repair_shards, verify
from hpcdistill.data.fetch.location import join
from hpcdistill.data.pack.fetching import refetch, refetch_named
from hpcdistill.errors import UserError, plural
from hpcdistill.storage import user_place

EXIT_FAULTS = 1
LISTED = 20  # duplicates shown in the terminal; --json has all


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog=program("verify"),
        description="Read every byte of packed data sets: shard lengths, checksums, each image at its place and of the "
        "size it should have. Report images that are there more than once, by their decoded pixels: repeated in one "
        "split, or leaked from one split or data set into another.",
        epilog=f"Exit code 0 when all is whole, {EXIT_FAULTS} when faults are left (one line each), or duplicates with "
        "--strict, 2 for a usage error or a folder without a readable index.",
    )
    parser.add_argument(
        "folders", action=UserPath, nargs="+", metavar="DIR", help="packed data sets, or folders of their splits"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    parser.add_argument("--strict", action="store_true", help=f"exit with {EXIT_FAULTS} for duplicates too")
    parser.add_argument("--repair", action="store_true", help="mend what is damaged, then check again")
    parser.add_argument(
        "--from",
        dest="place",
        metavar="PLACE",
        help="with --repair and one DIR: a folder or http(s) address with a copy of DIR; without it the recipe is "
        "fetched and packed again",
    )
    options = parser.parse_args(arguments)
    if options.place is not None and not options.repair:
        parser.error("--from needs --repair")
    if options.place is not None and len(options.folders) > 1:
        parser.error("--from mends one DIR at a time")
    if options.place is not None:
        options.place = user_place(options.place, "--from")
    reports = []
    for folder in _folders(options.folders, options.place, options.repair):
        report = verify(folder)
        if options.repair and report.faults:
            report = _repaired(report, _copy_of(folder, options.folders[0], options.place))
        reports.append(report)
    findings = find_duplicates(reports)
    if options.json:
        out.out(json.dumps(_plain(reports, findings), indent=2), highlight=False)  # FORCE_COLOR must not reach JSON
    else:
        out.print(_shard_table(reports))
        out.print(_set_table(reports, findings))
    for report in reports:
        for fault in report.faults:
            say(f"fault: {fault}", style="bold red")
    _say_duplicates(findings.duplicates)
    failed = any(report.faults for report in reports) or (options.strict and findings.duplicates)
    return EXIT_FAULTS if failed else 0


def _folders(given: Sequence[Path], place: str | None, repair: bool) -> list[Path]:
    """The data sets to check, each once; when they are to be mended, their indices are mended first."""
    if repair and place is None:
        for folder in given:
            try:
                data_sets(folder)
            except UserError as error:
                warn(str(error))
                if not refetch_named(folder):
                    raise
    if place is not None:
        (folder,) = given
        splits = sorted(path.parent for path in folder.glob("*/index.json"))
        for split in splits if splits and not (folder / "index.json").exists() else [folder]:
            repair_index(split, _copy_of(split, folder, place) or place)
    found = [path for folder in given for path in data_sets(folder)]
    return list({path.resolve(): path for path in found}.values())


def _copy_of(folder: Path, given: Path, place: str | None) -> str | None:
    """Where the copy of `folder` is, which is `given` or a split in it."""
    return place if place is None or folder == given else join(place, str(folder.relative_to(given)))


def _repaired(report: Report, place: str | None) -> Report:
    if place is None:
        try:
            refetch(report.folder)
        except UserError as error:  # the faults are still to be reported, and other data sets to be mended
            warn(str(error))
            return report
    elif not repair_shards(report, place):
        return report
    return verify(report.folder)


def _say_duplicates(duplicates: Sequence[Duplicate]) -> None:
    for duplicate in duplicates[:LISTED]:
        say(duplicate.line(), style="yellow")
    if len(duplicates) > LISTED:
        say(f"and {plural(len(duplicates) - LISTED, 'more group')} of equal images; --json lists all", style="yellow")


def _plain(reports: Sequence[Report], findings: Findings) -> dict[str, object]:
    return {
        "ok": not any(report.faults for report in reports),
        "data_sets": [
            {
                "folder": str(report.folder),
                "recipe": report.recipe,
                "split": report.split,
                "kind": report.kind,
                "lr": report.lr,
                "index_sha256": report.digest,
                "samples": report.samples,
                "images": report.images,
                "repeated": findings.count_in(report, "repeated"),
                "leaks": findings.count_in(report, "leak"),
                "shards": [
                    {
                        "shard": shard.shard,
                        "samples": shard.samples,
                        "images": shard.members,
                        "faults": list(shard.faults),
                    }
                    for shard in report.shards
                ],
                "faults": list(report.faults),
            }
            for report in reports
        ],
        "duplicates": {
            "repeated": findings.count("repeated"),
            "leaks": findings.count("leak"),
            "groups": [
                {
                    "kind": duplicate.kind,
                    "images": [
                        {
                            "folder": str(image.folder),
                            "split": image.split,
                            "key": image.key,
                            "source": image.source,
                            "role": image.role,
                        }
                        for image in duplicate.occurrences
                    ],
                }
                for duplicate in findings.duplicates
            ],
            "sides": findings.sides,
        },
    }


def _shard_table(reports: Sequence[Report]) -> Table:
    table = Table("data set", "shard", "samples", "images", "MB", "state")
    for report in reports:
        for shard in report.shards:
            state = "damaged" if shard.faults else "ok"
            name = f"{report.recipe} ({report.split})"
            table.add_row(name, shard.shard, str(shard.samples), str(shard.members), f"{shard.length / 1e6:.1f}", state)
    return table


def _set_table(reports: Sequence[Report], findings: Findings) -> Table:
    table = Table("data set", "kind", "LR images", "samples", "images", "faults", "repeated", "leaks")
    for report in reports:
        images = ", ".join(f"{role} {count}" for role, count in sorted(report.images.items()))
        counts = (len(report.faults), findings.count_in(report, "repeated"), findings.count_in(report, "leak"))
        name = f"{report.recipe} ({report.split})"
        table.add_row(name, report.kind, report.lr or "-", str(report.samples), images, *map(str, counts))
    return table


if __name__ == "__main__":
    run_command(main)
