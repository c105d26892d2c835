"""Layouts recognised, pairs matched, counts checked; what is missing is one line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcdistill.data.pack.recipes import Recipe, load_recipe
from hpcdistill.data.pack.sources import find_sources, unread
from hpcdistill.errors import UserError

PAIRED, UNPAIRED = load_recipe("paired"), load_recipe("unpaired")


def fill(root: Path, **folders: str) -> Path:
    """Small images: the keyword is the folder ("__" for a slash, "here" for the root), the value their names."""
    for folder, names in folders.items():
        place = root if folder == "here" else root / folder.replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        for name in names.split():
            Image.fromarray(np.zeros((12, 24, 3), np.uint8)).save(place / name)
    return root


def found(recipe: Recipe, root: Path, **options: bool) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """split -> (name, role -> path below `root`)."""
    return {
        split: [(sample.name, {role: str(path.relative_to(root)) for role, path in sample.files}) for sample in samples]
        for split, samples in find_sources(recipe, root, **options).items()
    }


def changed(name: str, **values: object) -> Recipe:
    return Recipe(**{**load_recipe(name).model_dump(), **values})


def test_unpaired_lists_all_of_a_then_all_of_b(tmp_path: Path) -> None:
    root = fill(tmp_path, trainA="2.png 10.jpg", trainB="2.png", testA="1.png", testB="1.png 3.webp")
    assert found(UNPAIRED, root) == {
        "train": [
            ("trainA/2.png", {"a": "trainA/2.png"}),
            ("trainA/10.jpg", {"a": "trainA/10.jpg"}),
            ("trainB/2.png", {"b": "trainB/2.png"}),
        ],
        "test": [
            ("testA/1.png", {"a": "testA/1.png"}),
            ("testB/1.png", {"b": "testB/1.png"}),
            ("testB/3.webp", {"b": "testB/3.webp"}),
        ],
    }


@pytest.mark.parametrize(
    ("folders", "splits", "roles"),
    [
        (".", "all", "ab"),
        ("train", "train", "ab"),
        ("train val", "train test", "ab"),  # Pix2Pix calls its test pairs val
        ("train test", "train test", "ab"),
        ("train val test", "train val test", "ab"),
        ("edges photos", "all", "a b"),
        ("labels photos", "all", "a b"),
        # Of two domains, which may be unpaired, too.
        ("A B", "all", "A B"),
        ("A/train A/val A/test B/train B/val B/test", "train val test", "A B"),
        ("A/train A/val B/train B/val", "train test", "A B"),  # as side by side: what there is to test on
        ("A/train B/train", "train", "A B"),
        ("train/A train/B val/A val/B test/A test/B", "train val test", "A B"),
        ("train/A train/B val/A val/B", "train test", "A B"),
        ("train/A train/B", "train", "A B"),
        ("trainA trainB valA valB testA testB", "train val test", "A B"),
        ("trainA trainB valA valB", "train test", "A B"),
        ("trainA trainB", "train", "A B"),
    ],
)
def test_layouts(tmp_path: Path, folders: str, splits: str, roles: str) -> None:
    for folder in folders.split():
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        fill(tmp_path / folder, here="1.png 2.png")
    found = find_sources(PAIRED, tmp_path)
    assert list(found) == splits.split()
    for samples in found.values():
        assert [(sample.name, " ".join(sample.roles)) for sample in samples] == [
            (name, roles.lower()) for name in ("1.png", "2.png")
        ]
    assert unread(PAIRED, tmp_path) == []
    if roles == "A B":
        apart = find_sources(UNPAIRED, tmp_path)
        assert {split: len(samples) for split, samples in apart.items()} == dict.fromkeys(splits.split(), 4)
        assert unread(UNPAIRED, tmp_path) == []


def test_pairs_are_matched_by_name_whatever_their_suffixes(tmp_path: Path) -> None:
    root = fill(tmp_path, A="x1.png x2.png", B="x2.jpg x1.webp")
    assert found(PAIRED, root)["all"] == [
        ("x1.png", {"a": "A/x1.png", "b": "B/x1.webp"}),
        ("x2.png", {"a": "A/x2.png", "b": "B/x2.jpg"}),
    ]


@pytest.mark.parametrize(
    ("a", "b", "line"),
    [
        (
            "1.png 2.png",
            "1.png",
            r"A/2\.png: has no partner 2\.\* in .*/B \(a and b belong together\); add it",
        ),
        ("1.png", "1.png 2.png", r"B/2\.png: has no partner 2\.\* in .*/A "),
        ("1.png", "1.png 1.jpg", r"B/1\.png: has the same name as .*/B/1\.jpg, so its partner cannot be told"),
        ("1.png 1.jpg", "1.png", r"A/1\.png: has the same name as .*/A/1\.jpg"),
        ("1.png", "", r"B: no images in this folder; expected files ending in .*; the recipe paired needs it"),
    ],
)
def test_unequal_pairs(tmp_path: Path, a: str, b: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        find_sources(PAIRED, fill(tmp_path, A=a, B=b))


def test_half_a_set_is_not_left_out_silently(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", trainA="1.png", trainB="", testA="1.png", testB="1.png")
    with pytest.raises(UserError, match=r"trainB: no images in this folder; .*; the recipe unpaired needs it"):
        find_sources(UNPAIRED, root)
    (root / "trainB" / "1.tif").write_bytes(b"")
    with pytest.raises(UserError, match=r"trainB: no images in this folder; .* found \.tif: convert them to PNG"):
        find_sources(UNPAIRED, root)
    (root / "trainB" / "1.tif").unlink()
    (root / "trainB").rmdir()
    with pytest.raises(UserError, match=r"trainB: no such folder, but .*/trainA has images; the split 'train' of unp"):
        find_sources(UNPAIRED, root)
    fill(root, trainB="1.png")
    (root / "testB" / "1.png").unlink()
    with pytest.raises(UserError, match=r"testB: no images in this folder; .*; the split 'test' needs it"):
        find_sources(UNPAIRED, root)
    (root / "testB").rmdir()
    with pytest.raises(UserError, match=r"testB: no such folder, but .*/testA has images; the split 'test' needs"):
        find_sources(UNPAIRED, root)
    with pytest.raises(UserError, match=r"val: no images in this folder; .*; the split 'val' needs it"):
        find_sources(PAIRED, fill(tmp_path / "pairs", train="1.png", val="", test="1.png"))


def test_the_number_of_pairs_does_not_depend_on_how_they_are_stored(tmp_path: Path) -> None:
    recipe = changed("edges2shoes", images={"train": {"ab": 2}, "test": {"ab": 1}})
    joined = fill(tmp_path / "joined" / "edges2shoes", train="1.jpg 2.jpg", val="1.jpg")
    apart = fill(tmp_path / "apart", trainA="1.jpg 2.jpg", trainB="1.jpg 2.jpg", testA="1.jpg", testB="1.jpg")
    for root in (joined.parent, joined, apart):
        assert {split: len(samples) for split, samples in find_sources(recipe, root).items()} == {"train": 2, "test": 1}
    (apart / "testB" / "1.jpg").rename(apart / "testB" / "2.jpg")
    with pytest.raises(UserError, match=r"testA/1\.jpg: has no partner"):
        find_sources(recipe, apart)
    (joined / "train" / "2.jpg").unlink()
    line = r"train: found 1 images, the recipe edges2shoes expects 2; .* what is there with the recipe paired"
    with pytest.raises(UserError, match=line):
        find_sources(recipe, joined)


def test_the_numbers_of_an_unpaired_set(tmp_path: Path) -> None:
    recipe = changed("horse2zebra", images={"train": {"a": 1, "b": 2}, "test": {"a": 1, "b": 1}})
    root = fill(tmp_path / "horse2zebra", trainA="1.jpg", trainB="1.jpg", testA="1.jpg", testB="1.jpg")
    line = r"trainB: found 1 images, the recipe horse2zebra expects 2; .* with the recipe unpaired"
    with pytest.raises(UserError, match=line):
        find_sources(recipe, tmp_path)
    fill(root, trainB="2.jpg")
    assert [name for name, _ in found(recipe, tmp_path)["train"]] == ["trainA/1.jpg", "trainB/1.jpg", "trainB/2.jpg"]


def div2k(root: Path) -> Path:
    """As DIV2K's archives unpack: train 0001 and 0002, valid 0801."""
    for part, names in (("train", ("0001", "0002")), ("valid", ("0801",))):
        fill(root / f"DIV2K_{part}_HR", here=" ".join(f"{name}.png" for name in names))
        for s in (2, 3, 4):
            fill(root / f"DIV2K_{part}_LR_bicubic" / f"X{s}", here=" ".join(f"{name}x{s}.png" for name in names))
    return root


def test_official_lr_images(tmp_path: Path) -> None:
    recipe = changed("div2k", images={"train": {"hr": 2}, "valid": {"hr": 1}})
    root = div2k(tmp_path)
    assert found(recipe, root)["train"] == [(f"000{n}.png", {"hr": f"DIV2K_train_HR/000{n}.png"}) for n in (1, 2)]
    assert found(recipe, root, official_lr=True)["train"][1] == (
        "0002.png",
        {"hr": "DIV2K_train_HR/0002.png"} | {f"lr{s}": f"DIV2K_train_LR_bicubic/X{s}/0002x{s}.png" for s in (2, 3, 4)},
    )
    (root / "DIV2K_train_LR_bicubic" / "X3" / "0002x3.png").rename(root / "DIV2K_train_LR_bicubic" / "X3" / "0002.png")
    with pytest.raises(UserError, match=r"DIV2K_train_HR/0002\.png: has no partner 0002x3\.\* in .*/X3 "):
        find_sources(recipe, root, official_lr=True)
    find_sources(recipe, root)  # nobody asked for them


def test_official_lr_images_that_are_not_there(tmp_path: Path) -> None:
    recipe = changed("div2k", images={})
    root = fill(tmp_path, DIV2K_train_HR="0001.png", DIV2K_valid_HR="0801.png")
    line = r"DIV2K_train_LR_bicubic/X2: no official LR images; fetch them with .*div2k --with lr`, or leave them out"
    with pytest.raises(UserError, match=line):
        find_sources(recipe, root, official_lr=True)
    with pytest.raises(UserError, match="the recipe set5 has no official LR images; leave them out"):
        find_sources(changed("set5", images={}), fill(tmp_path / "set5", here="1.png"), official_lr=True)


@pytest.mark.parametrize("layout", [".", "HR", "Set5/HR", "Set5", "benchmark/Set5/HR"])
def test_layouts_of_a_test_set_and_the_number_of_images(tmp_path: Path, layout: str) -> None:
    folder = fill(tmp_path / layout, here="0.png 1.png 2.png 3.png")
    with pytest.raises(UserError, match=r"found 4 images, the recipe set5 expects 5; .*with the recipe folder"):
        find_sources(load_recipe("set5"), tmp_path)
    fill(folder, here="4.png")
    assert [source.name for source in find_sources(load_recipe("set5"), tmp_path)["all"]] == [
        f"{n}.png" for n in range(5)
    ]


def test_images_of_several_folders_are_called_by_them(tmp_path: Path) -> None:
    recipe = changed("bsd", images={})
    root = fill(tmp_path, BSDS500_train="1.png", BSDS500_test="1.png")
    assert [name for name, _ in found(recipe, root)["all"]] == ["BSDS500_train/1.png", "BSDS500_test/1.png"]


def test_named_files_only(tmp_path: Path) -> None:
    recipe = changed("folder", files={"all": ("2.png", "1.png")})
    root = fill(tmp_path, here="1.png 2.png 3.png")
    assert [name for name, _ in found(recipe, root)["all"]] == ["2.png", "1.png"]
    (root / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png: missing, the recipe folder names it; complete the folder"):
        find_sources(recipe, root)


@pytest.mark.parametrize(
    ("recipe", "folder", "line"),
    [
        ("bsd", None, r"bsd needs the folder of its images: --source DIR$"),
        ("facades", None, r"--source DIR, or `python shards/fetch.py facades`"),
        ("photos", "", "leave --source out"),
        ("set5", "nothing", "nothing: no such folder"),
        ("bsd", "", r"no images of bsd; expected them in the folder's BSDS500_train and BSDS500_"),
        ("horse2zebra", "", r"; .* trainA and trainB and testA and testB, or the same in its folder horse2zebra"),
        ("paired", "", r"no images of paired; expected them in the folder's train and val and test;"),
        ("folder", "", r"no images in this folder; its folders inside have some: name one of them"),
    ],
)
def test_wrong_folders(tmp_path: Path, recipe: str, folder: str | None, line: str) -> None:
    if recipe == "folder":
        fill(tmp_path, inside="1.png")
    with pytest.raises(UserError, match=line):
        find_sources(load_recipe(recipe), None if folder is None else tmp_path / folder)


def test_real_sets(test_data: Path) -> None:
    for name, count in (("bsd", 399), ("t91", 91)):
        assert len(find_sources(load_recipe(name), test_data / "sr_train")["all"]) == count
    pairs = find_sources(PAIRED, test_data / "i2i" / "edges2shoes")
    assert {split: len(samples) for split, samples in pairs.items()} == {"train": 100, "test": 20}
    apart = find_sources(PAIRED, test_data / "i2i" / "facades" / "test")["all"]
    assert len(apart) == 50
    assert apart[0].roles == ("a", "b")


def test_names_of_two_domains_with_splits_inside(tmp_path: Path) -> None:
    root = fill(tmp_path, A__train="1.png", B__train="1.png")
    assert [name for name, _ in found(UNPAIRED, root)["train"]] == ["A/train/1.png", "B/train/1.png"]


def test_the_remedy_for_unknown_splits_works(tmp_path: Path) -> None:
    root = fill(tmp_path, A__training="1.png", B__training="1.png")
    line = r"A: no images in this folder, only in its folders training; .*train, val, test, or take all .* --recursive"
    with pytest.raises(UserError, match=line):
        find_sources(PAIRED, root)
    assert found(PAIRED, root, recursive=True)["all"] == [
        ("training/1.png", {"a": "A/training/1.png", "b": "B/training/1.png"})
    ]
    for side in "AB":
        (root / side / "training").rename(root / side / "train")
    assert list(find_sources(PAIRED, root)) == ["train"]


def official(root: Path, *names: str) -> Recipe:
    fill(root, HR=" ".join(f"{name}.png" for name in names))
    return changed("folder", layouts=({"all": {"hr": ("HR",), "lr4": ("LR",)}},))


@pytest.mark.parametrize("form", ["{}.png", "{}x4.png", "{}_x4.png", "{}.jpg"])
def test_names_of_lr_images(tmp_path: Path, form: str) -> None:
    recipe = official(tmp_path, "0", "a.b")
    fill(tmp_path, LR=" ".join(form.format(name) for name in ("0", "a.b")))
    assert [files["lr4"] for _, files in found(recipe, tmp_path, official_lr=True)["all"]] == [
        f"LR/{form.format(name)}" for name in ("0", "a.b")
    ]


def test_one_form_of_lr_names_is_taken_in_a_folder(tmp_path: Path) -> None:
    """Where some have the official name, one without it may be anything."""
    recipe = official(tmp_path, "0", "1")
    fill(tmp_path, LR="0x4.png 1.png")
    with pytest.raises(UserError, match=r"HR/1\.png: has no partner 1x4\.\* in .*/LR"):
        find_sources(recipe, tmp_path, official_lr=True)


def test_folders_inside_are_taken_with_recursive(tmp_path: Path) -> None:
    root = fill(tmp_path / "mine", here="b.png", holiday="a.png", holiday__deep="b.png", **{".hidden": "x.png"})
    for old, new in (("a.png", "c.jfif"), ("deep/b.png", "deep/b.JPE")):
        (root / "holiday" / new).write_bytes((root / "holiday" / old).read_bytes())
    (root / "holiday" / "deep" / "b.png").unlink()
    (root / "holiday" / "again").symlink_to(root)  # leads around
    assert [name for name, _ in found(load_recipe("folder"), root)["all"]] == ["b.png"]
    names = [name for name, _ in found(load_recipe("folder"), root, recursive=True)["all"]]
    assert names == ["b.png", "holiday/a.png", "holiday/c.jfif", "holiday/deep/b.JPE"]
    pairs = fill(tmp_path / "pairs", A__x="1.png", A__y="1.png", B__x="1.png", B__y="1.jpg")
    assert [files["b"] for _, files in found(PAIRED, pairs, recursive=True)["all"]] == ["B/x/1.png", "B/y/1.jpg"]


@pytest.mark.parametrize(
    ("recipe", "folders", "lines"),
    [
        (
            "folder",
            {"here": "a.png", "holiday": "c.png", "notes": ""},
            ["{}: not read: holiday/ (1 image); take folders"],
        ),
        (
            "folder",
            {"here": "a.png", "x": "1.png 2.png", "y__z": "1.png"},
            ["x/ (2 images), y/ (1 image); take folders"],
        ),
        ("paired", {"A": "1.png", "B": "1.png", "A__more": "2.png"}, ["{}/A: not read: more/ (1 image); take folders"]),
        (
            "paired",
            {"A": "1.png", "B": "1.png", "C": "1.png"},
            ["{}: not read: C/ (1 image); folders that paired does"],
        ),
        ("unpaired", {"trainA": "1.png", "trainB": "1.png"}, []),
        ("bsd", {"BSDS500_train": "1.png", "BSDS500_test": "2.png"}, []),
    ],
)
def test_what_is_left_out_is_named_and_counted(
    tmp_path: Path, recipe: str, folders: dict[str, str], lines: list[str]
) -> None:
    said = unread(changed(recipe, images={}), fill(tmp_path, **folders))
    assert len(said) == len(lines)
    assert all(line.format(tmp_path) in found for line, found in zip(lines, said, strict=True))


@pytest.mark.parametrize("recipe", ["folder", "set5", "paired"])
def test_formats_that_are_not_read_are_named_by_every_recipe(tmp_path: Path, recipe: str) -> None:
    fill(tmp_path, here="1.png")
    for name in ("2.tif", "3.TIF", "4.cr2", "readme.txt", ".5.tif"):
        (tmp_path / name).write_bytes(b"")
    assert unread(changed(recipe, images={}), tmp_path) == [
        f"{tmp_path}: not read: 1 .cr2 file, 2 .tif files; convert files to PNG"
    ]
