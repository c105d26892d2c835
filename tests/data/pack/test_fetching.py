"""Every recipe, from a server and from local copies, down to verified shards; archives are small ones made here."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from damaged_sets import script
from packed_sets import encode, noise
from serving import Server

from hpcdistill.data.check.verify import data_sets, verify
from hpcdistill.data.index import load_index
from hpcdistill.data.pack import fetching
from hpcdistill.data.pack import recipes as recipes_module
from hpcdistill.data.pack.recipes import UNSPLIT, Recipe, load_recipe, recipe_names
from hpcdistill.errors import UserError

SHARDS = Path(__file__).resolve().parents[3] / "shards"
PUBLIC = [name for name in recipe_names() if load_recipe(name).downloads]
LOCAL = [name for name in recipe_names() if not load_recipe(name).downloads and name != "photos"]
# Images a role in the small copies: different for each, so that an exchange would show.
COUNTS = {"hr": 3, "a": 2, "b": 4, "ab": 3}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data root"  # a path with a space, as people have them
    monkeypatch.setenv("HPCDISTILL_DATA", str(folder))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("served")) as running:
        yield running


def count(recipe: Recipe, role: str) -> int:
    if recipe.files:
        return len(next(iter(recipe.files.values())))
    return COUNTS[role] if recipe.kind == "unpaired" or role in ("hr", "ab") else 3


def contents(recipe: Recipe) -> dict[str, bytes]:
    """Path below the archive's root -> image, in the recipe's official layout."""
    files: dict[str, bytes] = {}
    prefix = recipe.roots[-1] + "/" if recipe.roots[-1] != "." else ""
    for number, (split, folders) in enumerate(recipe.layouts[0].items()):
        for role, names in folders.items():
            scale = int(role[2:]) if role.startswith("lr") else 1
            tail = f"x{scale}" if scale > 1 else ""
            suffix = "png" if recipe.kind == "lr-hr" else "jpg"
            for folder in names:
                place = f"{prefix}{folder}/" if folder != "." else prefix
                if recipe.members:
                    place = recipe.members[0].rpartition("/")[0] + "/"
                if split in recipe.files:  # and one beside them that is not taken
                    for at, name in enumerate((*recipe.files[split], "0899.png")):
                        files[f"{place}{name}"] = encode(noise(24, 24, at), f"x.{suffix}")
                    continue
                for at in range(count(recipe, "hr" if tail else role)):
                    seed = hash_of(f"{split} {folder} {at}") if not tail else at
                    image = noise(24 // scale, (48 if role == "ab" else 24) // scale, seed)
                    files[f"{place}{at + 1:04d}{tail}.{suffix}"] = encode(image, f"x.{suffix}")
        assert number < 3
    return files


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def archive(name: str, files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(content, "w") as zipped:
            for path, image in files.items():
                zipped.writestr(path, image)
    else:
        with tarfile.open(fileobj=content, mode="w:gz" if name.endswith("gz") else "w") as tar:
            for path, image in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(image)
                tar.addfile(entry, io.BytesIO(image))
    return content.getvalue()


def small(name: str, folder: Path, address: Callable[[str], str] | None) -> tuple[Path, Path]:
    """The recipe `name` with small archives, its addresses those of a server: (its YAML, the archives' folder)."""
    recipe = load_recipe(name)
    raw = yaml.safe_load((recipes_module.RECIPES / f"{name}.yaml").read_text())
    files = contents(recipe)
    archives = folder / name
    archives.mkdir(parents=True, exist_ok=True)
    for download in raw.get("downloads", ()):
        stem = download["file"].partition(".")[0]
        part = files
        if name == "div2k":  # an archive a folder
            key = stem.removesuffix("_X2").removesuffix("_X3").removesuffix("_X4")
            scale = stem.rpartition("_")[2] if "_X" in stem else ""
            part = {path: image for path, image in files.items() if key + "/" in path and f"/{scale}" in path}
        content = archive(download["file"], part)
        (archives / download["file"]).write_bytes(content)
        if download.get("bytes"):
            download["bytes"] = len(content)
        if download.get("sha256"):
            download["sha256"] = hashlib.sha256(content).hexdigest()
        download.pop("md5_third_party", None)
        if address:
            download["addresses"] = [address(f"{name}/{download['file']}") for _ in download["addresses"]]
    raw["images"] = {
        split: {role: len(names) * count(recipe, role) for role, names in folders.items() if not role.startswith("lr")}
        for split, folders in recipe.layouts[0].items()
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path, archives


def check_packed(recipe: Recipe, out: Path) -> None:
    """All splits are there with the right samples, and every byte is verified."""
    splits = [index.split for index in map(load_index, data_sets(out))]
    assert sorted(splits) == sorted(recipe.splits)
    for folder in data_sets(out):
        index = load_index(folder)
        assert not verify(folder).faults
        assert (index.recipe, index.kind, index.licence) == (recipe.name, recipe.kind, recipe.licence)
        roles = [next(iter(sample.members)).partition(".")[0] for sample in index.samples]
        layout = recipe.layouts[0][index.split]
        for role in ("hr", "ab", "a") if recipe.kind != "unpaired" else ("a", "b"):
            if role in layout:
                assert roles.count(role) == len(layout[role]) * count(recipe, role)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_recipe_comes_from_a_server(name: str, server: Server, tmp_path: Path, root: Path) -> None:
    path, _ = small(name, server.folder, server.address)
    parts = ["--with", "lr"] if name == "div2k" else []
    script("fetch").main([str(path), "--processes", "1", *parts])
    check_packed(load_recipe(name), root / name)
    if name == "div2k":
        assert load_index(root / name / "train").notes["resize"] == "official"
    unknown = [d.file for d in load_recipe(name).downloads if d.sha256 is None]
    recorded = root / "downloads" / "recorded.json"
    assert sorted(json.loads(recorded.read_text()) if recorded.exists() else []) == sorted(unknown)


@pytest.mark.parametrize("name", ["div2k", "facades", "set5", "horse2zebra"])
def test_a_recipe_comes_from_local_archives(name: str, tmp_path: Path, root: Path) -> None:
    path, archives = small(name, tmp_path, None)
    origin = archives if name == "div2k" else next(archives.iterdir())
    script("fetch").main([str(path), "--processes", "1", "--from", str(origin)])
    check_packed(load_recipe(name), root / name)


@pytest.mark.parametrize("name", ["div2k", *LOCAL])
def test_a_recipe_comes_from_a_folder_of_images(name: str, tmp_path: Path, root: Path) -> None:
    recipe = load_recipe(name)
    path, _ = small(name, tmp_path, None)
    folder = tmp_path / "images"
    for place, image in contents(recipe).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(image)
    before = sorted(folder.rglob("*"))
    script("fetch").main([str(path), "--processes", "1", "--from", str(folder)])
    check_packed(recipe, root / name)
    assert sorted(folder.rglob("*")) == before, "the user's folder was changed"


def test_what_is_there_is_not_fetched_again(server: Server, root: Path) -> None:
    path, _ = small("horse2zebra", server.folder, server.address)
    script("fetch").main([str(path), "--processes", "1"])
    requests = len(server.requests)
    script("fetch").main([str(path), "--processes", "1"])
    assert len(server.requests) == requests


def test_an_unknown_checksum_is_compared_from_the_first_fetch_on(tmp_path: Path, root: Path) -> None:
    path, archives = small("facades", tmp_path, None)
    copy = archives / "facades.tar.gz"
    script("fetch").main([str(path), "--processes", "1", "--from", str(copy)])
    other = archives / "other.tar.gz"
    other.write_bytes(archive("facades.tar.gz", {**contents(load_recipe("facades")), "facades/train/x.txt": b"x"}))
    with pytest.raises(UserError, match=r"recorded on .* remove the entry facades.tar.gz"):
        script("fetch").main([str(path), "--from", str(other)])


def test_another_file_than_the_published_one_is_refused(tmp_path: Path) -> None:
    path, archives = small("horse2zebra", tmp_path, None)
    copy = archives / "horse2zebra.zip"
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"horse2zebra.zip: is not .*sha256"):
        script("fetch").main([str(path), "--from", str(copy)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t91"], "no public address"),
        (["horse2zebra", "--with", "lr"], "no optional part 'lr'; it has none"),
        (["div2k", "--with", "rl"], "no optional part 'rl'; valid: lr"),
        (["horse2zebra", "--from", "nowhere"], "no such file or folder"),
        (["horse2zebr"], "did you mean 'horse2zebra'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script("fetch").main(arguments)


def test_an_incomplete_set_is_refused_before_packing(tmp_path: Path, root: Path) -> None:
    path, _ = small("summer2winter", tmp_path, None)
    folder = tmp_path / "images"
    for place, image in list(contents(load_recipe("summer2winter")).items())[:-1]:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(image)
    with pytest.raises(
        UserError, match=r"testB: found 3 images, the recipe summer2winter expects 4; .*recipe unpaired"
    ):
        script("fetch").main([str(path), "--from", str(folder)])
    with pytest.raises(UserError, match="found 3 images"):  # not only the packer looks
        script("fetch").main([str(path), "--from", str(folder), "--no-pack"])
    assert not (root / "summer2winter").exists()


def test_a_damaged_set_is_fetched_again(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = small("set5", server.folder, server.address)
    script("fetch").main([str(path), "--processes", "1"])
    shard = root / "set5" / "shard-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + b"!" + whole[701:])
    monkeypatch.setattr(recipes_module, "RECIPES", path.parent)
    monkeypatch.setattr(fetching, "RECIPES", path.parent)
    fetching.refetch(root / "set5")
    assert shard.read_bytes() == whole


def test_names_of_folders_tell_the_recipe() -> None:
    wanted = fetching.wanted_at(Path("x/div2k/train"))
    assert wanted is not None
    assert (wanted.recipe.name, wanted.out) == ("div2k", Path("x/div2k"))
    wanted = fetching.wanted_at(Path("x/set5"))
    assert wanted is not None
    assert (wanted.recipe.splits, wanted.out) == ((UNSPLIT,), Path("x/set5"))
    assert fetching.wanted_at(Path("x/div2k")) is None
    assert fetching.wanted_at(Path("x/div2k/tests")) is None
    assert fetching.wanted_at(Path("mine")) is None


def test_a_damaged_index_is_mended_by_the_folder_s_name(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = small("set14", server.folder, server.address)
    script("fetch").main([str(path), "--processes", "1"])
    index = root / "set14" / "index.json"
    whole = index.read_bytes()
    index.write_bytes(whole[:100])
    monkeypatch.setattr(recipes_module, "RECIPES", path.parent)
    monkeypatch.setattr(fetching, "RECIPES", path.parent)
    with pytest.raises(UserError, match="damaged"):
        script("verify").main([str(root / "set14")])
    assert script("verify").main([str(root / "set14"), "--repair"]) == 0
    assert index.read_bytes() == whole


def test_a_set_without_an_address_says_how_it_is_mended(tmp_path: Path, root: Path) -> None:
    path, _ = small("t91", tmp_path, None)
    for place, image in contents(load_recipe("t91")).items():
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / place).write_bytes(image)
    script("fetch").main([str(path), "--from", str(tmp_path / "images")])
    with pytest.raises(
        UserError, match=r"--from PACKED_COPY, or pack it again: `python shards/pack.py t91 --source IMAGES"
    ):
        fetching.refetch(root / "t91")


def test_the_data_root_is_verified_as_a_whole(tmp_path: Path, root: Path) -> None:
    for name in ("set5", "horse2zebra"):
        path, archives = small(name, tmp_path / name, None)
        script("fetch").main([str(path), "--processes", "1", "--from", str(next(archives.iterdir()))])
    found = [str(folder.relative_to(root)) for folder in data_sets(root)]
    assert found == ["horse2zebra/test", "horse2zebra/train", "set5"]


def test_two_commands_that_pack_the_same_set_take_turns(tmp_path: Path, root: Path) -> None:
    path, archives = small("monet2photo", tmp_path, None)
    command = [sys.executable, str(SHARDS / "fetch.py"), str(path), "--from", str(next(archives.iterdir()))]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ends
    assert sum("shards:" in end for end in ends) == 1, "packed once"
    check_packed(load_recipe("monet2photo"), root / "monet2photo")
    assert not list(root.rglob(".packing.lock"))


@pytest.mark.parametrize("option", ["--processes=0", "--max-pixels=-3", "--processes=x"])
def test_counts_are_one_or_more(option: str) -> None:
    with pytest.raises(UserError, match="must be a whole number, 1 or more"):
        script("fetch").main(["photos", option])


def test_of_several_recipes_each_has_its_own_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a recipe that cannot be had nor a full disk hides what the others came to."""
    with pytest.raises(UserError, match="2 of 3 recipes failed: bsd, t91; the same command goes on"):
        script("fetch").main(["bsd", "photos", "t91", "--processes", "1"])
    assert [path.name for path in data_sets(root / "photos")] == ["test", "train"]
    results = capsys.readouterr().err.splitlines()[-3:]
    assert [line.partition(": ")[2][:28] for line in results] == [
        "failed: the recipe bsd has n",
        "packed",
        "failed: the recipe t91 has n",
    ]


def test_the_disk_of_one_recipe_does_not_hide_the_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, asked = script("fetch"), []

    def obtain(recipe: Recipe, out: Path, **options: object) -> None:
        asked.append(recipe.name)
        if recipe.name == "set5":
            raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(fetch, "obtain", obtain)
    with pytest.raises(UserError, match="1 of 2 recipes failed: set5"):
        fetch.main(["set5", "set14", "set5"])
    assert asked == ["set5", "set14"]  # each once


@pytest.mark.parametrize("option", ["--from", "--out", "--with"])
def test_what_fits_one_recipe_is_refused_of_several(option: str, root: Path) -> None:
    with pytest.raises(UserError, match=f"{option}: belongs to one recipe; fetch set5 and set14 one after the other"):
        script("fetch").main(["set5", "set14", option, "x"])
    with pytest.raises(UserError, match="sett5"):
        script("fetch").main(["photos", "sett5"])
    assert not root.exists()  # nothing was begun
