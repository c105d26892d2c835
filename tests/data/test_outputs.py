"""Nothing of a user's is written over: every command that writes beside its inputs refuses before it writes."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import numpy as np
import pytest
from packed_sets import noise, write_set
from PIL import Image

from hpcdistill.data.fetch import location
from hpcdistill.data.images import encode_png, read_rgb
from hpcdistill.data.index import load_index
from hpcdistill.data.outputs import check_images_out, check_page, save_image
from hpcdistill.data.pack.fetching import refetch_named
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.read.staging import stage
from hpcdistill.errors import UserError
from hpcdistill.evaluate import main as evaluate
from hpcdistill.requirements import check_runs_apart
from hpcdistill.run import load_run
from hpcdistill.sweep.grid_report import make_folder

FOLDER, PAIRED = load_recipe("folder"), load_recipe("paired")


def picture(number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def photographs(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names or ("a.png", "b.png")):
        Image.fromarray(picture(number)).save(folder / name)
    return folder


def packed_set(folder: Path) -> Path:
    write_set(folder, "lr-hr", [{"hr.png": noise(24, 24, 1)}])
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones too, with its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("mine", "mine"),
        ("mine", "link"),
        ("link", "mine"),
        ("mine", "mine/../mine"),
        ("set", "set/HR"),
        ("set", "set"),
        ("set/HR", "set/HR"),
        ("set", "set/LR"),  # its LR images have the names of its HR images
        ("mine", "set/HR"),  # not what is evaluated, but somebody's all the same
    ],
)
def test_images_are_not_saved_over_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "mine")
    photographs(tmp_path / "set" / "HR")
    photographs(tmp_path / "set" / "LR")
    (tmp_path / "link").symlink_to("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"--save-images {out}: .* name another") as error:
        evaluate(["--baseline", "bicubic", "--scale", "2", "--data", data, "--save-images", out])
    assert "\n" not in str(error.value)
    assert content(tmp_path) == before


def test_images_are_saved_again_where_they_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photographs(tmp_path / "mine"))
    for data in (".", ".", "../mine"):  # a folder of its own beside the images is no input
        assert evaluate(["--baseline", "bicubic", "--scale", "2", "--data", data, "--save-images", "sr"]) == 0
    assert sorted(content(tmp_path / "mine" / "sr")) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="a packed data set"):
        check_images_out(packed_set(tmp_path / "packed"), [], [])


def test_a_saved_image_says_where_it_is_from(tmp_path: Path) -> None:
    save_image(tmp_path, "x", picture())
    np.testing.assert_array_equal(read_rgb(tmp_path / "x.png"), picture())
    check_images_out(tmp_path, ["x", "y"], [])
    (tmp_path / "y.png").write_bytes(encode_png(picture()))
    with pytest.raises(UserError, match=r"y\.png is there, and was not saved by this command"):
        check_images_out(tmp_path, ["x", "y"], [])
    (tmp_path / "y.png").write_bytes(b"no PNG at all")
    with pytest.raises(UserError, match=r"y\.png is there"):
        check_images_out(tmp_path, ["x", "y"], [])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["mine", "link", "mine/../mine"])
def test_nothing_is_packed_among_its_images(tmp_path: Path, out: str, overwrite: bool) -> None:
    source = photographs(tmp_path / "mine")
    (tmp_path / "link").symlink_to(source)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"--out .*: is where the images are that are packed; name another folder"):
        pack(FOLDER, source, tmp_path / out, overwrite=overwrite, processes=1)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "out", "named"),
    [("pairs", "pairs", "pairs"), ("side", "side", "side"), ("pairs", "pairs/A", "pairs/A/train")],
)
def test_no_split_is_packed_among_its_images(tmp_path: Path, source: str, out: str, named: str) -> None:
    for folder in ("pairs/A/train", "pairs/B/train", "pairs/A/test", "pairs/B/test", "side/train", "side/test"):
        photographs(tmp_path / folder)
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"{named}: is where the images are that are packed"):
        pack(PAIRED, tmp_path / source, tmp_path / out, processes=1)
    assert content(tmp_path) == before
    pack(PAIRED, tmp_path / source, tmp_path / source / "packed", processes=1)  # a folder of its own beside them
    assert len(load_index(tmp_path / source / "packed" / "test").samples) == 2


@pytest.mark.parametrize(
    ("there", "overwrite", "message"),
    [
        ("holiday.JPG", False, r"holds images \(holiday\.JPG\), which are not packed among; choose another --out"),
        ("holiday.JPG", True, r"holds images \(holiday\.JPG\)"),
        (
            "letter.txt",
            False,
            r"holds letter\.txt, which was not packed here; choose another --out, or add --overwrite",
        ),
        ("letter.txt", True, None),
        (".DS_Store", False, None),
        ("index.json 1.jpg", True, r"holds images \(1\.jpg\)"),
    ],
)
def test_a_folder_that_holds_something_else(tmp_path: Path, there: str, overwrite: bool, message: str | None) -> None:
    source, out = photographs(tmp_path / "mine"), tmp_path / "out"
    out.mkdir()
    for name in there.split():
        (out / name).write_bytes(b"mine")
    if message is None:
        pack(FOLDER, source, out, overwrite=overwrite, processes=1)
        pack(FOLDER, source, out, processes=1)  # what is beside a packed set does not make it another
        assert len(load_index(out).samples) == 2
    else:
        with pytest.raises(UserError, match=message):
            pack(FOLDER, source, out, overwrite=overwrite, processes=1)
        assert sorted(content(out)) == sorted(there.split())
    assert all((out / name).read_bytes() == b"mine" for name in there.split())


def test_a_repair_by_name_does_not_pack_among_photographs(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos" / "test")  # named as a split of a recipe
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"holds images \(a\.png\)"):
        refetch_named(folder)
    assert content(tmp_path) == before


@pytest.mark.parametrize("place", ["data.train={0}", "data.eval.x={0}", "data.eval.x={1}"])
def test_runs_are_not_put_into_their_data(tmp_path: Path, place: str) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nmethod: {name: plain_sr, scale: 4}\n")
    packed, test = tmp_path / "packed", tmp_path / "test"
    (test / "HR").mkdir(parents=True)
    packed.mkdir()
    (tmp_path / "link").symlink_to(packed)
    override = place.format(packed, test)
    for runs in ("link", "packed") if "packed" in override else ("test", "test/HR"):
        config = load_run([str(tmp_path / "a.yaml"), override, f"runs={tmp_path / runs}"]).config
        with pytest.raises(UserError, match=rf"runs .*{runs}: is a data set of this run; name another folder"):
            check_runs_apart(config)
    check_runs_apart(load_run([str(tmp_path / "a.yaml"), override, "data.train=https://host/set"]).config)


def test_a_set_is_not_staged_into_itself(tmp_path: Path) -> None:
    packed = packed_set(tmp_path / "packed")
    before = content(packed)
    with pytest.raises(UserError, match="is the data set itself"):
        stage(str(packed), packed)
    assert content(packed) == before


def test_a_page_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    check_page(page)
    page.write_text("<title>hpcdistill sweep</title>")
    make_folder(tmp_path)
    page.write_text("<title>My home page</title>")
    with pytest.raises(UserError, match=r"its index\.html is not a report of hpcdistill; name another folder"):
        make_folder(tmp_path)


def test_the_command_that_is_named_packs_elsewhere_and_can_be_pasted(tmp_path: Path) -> None:
    mine = photographs(tmp_path / "my holiday's photographs")
    with pytest.raises(UserError) as error:
        load_index(mine)
    words = shlex.split(str(error.value).split("`")[1])
    assert words[words.index("--source") + 1] == str(mine)
    assert words[words.index("--out") + 1] == f"{mine}-packed"
    with pytest.raises(UserError) as error:
        load_index(tmp_path / "not there")
    assert shlex.split(str(error.value).split("`")[1])[-1] == str(tmp_path / "not there")


def test_remedies_quote_the_folders_that_they_name() -> None:
    place = "my holiday's sets/one"
    assert place in shlex.split(location.remedy(place).split("`")[1])
