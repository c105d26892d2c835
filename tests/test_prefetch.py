"""`hpcdistill prefetch`: what runs need, fetched once; and what a run says where it is missing."""

from __future__ import annotations

import io
import shlex
import tarfile
from pathlib import Path

import pytest
import yaml
from packed_sets import encode, noise
from serving import Server

from hpcdistill import prefetch, train
from hpcdistill.config import split_runs
from hpcdistill.data.index import load_index
from hpcdistill.data.pack import fetching
from hpcdistill.data.pack import recipes as recipes_module
from hpcdistill.data.places import data_root
from hpcdistill.errors import UserError
from hpcdistill.requirements import check_present, missing_for, needed_sets, needed_weights
from hpcdistill.run import load_run
from hpcdistill.sweep import submit

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes with the one recipe `tiny` (train, test); its archive is served from the folder beside it."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(recipes_module, "RECIPES", folder)
    monkeypatch.setattr(fetching, "RECIPES", folder)
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "tiny.tar", "w") as tar:
        for number in range(4):
            content = encode(noise(16, 20, number), "hr.png")
            entry = tarfile.TarInfo(f"tiny/{'train' if number < 3 else 'test'}/{number}.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return folder / "tiny.yaml"


def write_recipe(path: Path, address: str) -> None:
    values = {
        **{"name": "tiny", "title": "t", "licence": "none", "origin": "here", "roots": [".", "tiny"]},
        "downloads": [{"file": "tiny.tar", "addresses": [address]}],
        "layouts": [{"train": {"hr": "train"}, "test": {"hr": "test"}}],
    }
    path.write_text(yaml.safe_dump(values))


def write_config(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        "name: tiny\nmethod: {name: plain_sr, scale: 2}\n"
        "data: {train: '${oc.env:HPCDISTILL_DATA}/tiny/train', eval: {tiny: '${oc.env:HPCDISTILL_DATA}/tiny/test'}}\n"
        f"runs: {folder / 'runs'}\n"
    )
    return path


def test_what_a_run_needs_is_fetched_once(tmp_path: Path, root: Path, recipe: Path) -> None:
    config = write_config(tmp_path)
    with Server(tmp_path / "served") as server:
        write_recipe(recipe, server.address("tiny.tar"))
        prefetch.main([str(config)])
        assert [len(load_index(root / "tiny" / split).samples) for split in ("train", "test")] == [3, 1]
        requests = len(server.requests)
        prefetch.main([str(config), str(config), "seed=3"])
        assert len(server.requests) == requests
    check_present(load_run([str(config)]))


def test_a_compute_node_is_told_what_to_run_and_where(tmp_path: Path, root: Path, recipe: Path) -> None:
    config = write_config(tmp_path)
    write_recipe(recipe, "http://127.0.0.1:9/tiny.tar")
    with pytest.raises(UserError) as error:
        train.main([str(config), "seed=3"])
    assert f"run `hpcdistill prefetch {config} seed=3` where there is a network" in str(error.value)
    assert str(root / "tiny" / "train") in str(error.value)
    assert str(root / "tiny" / "test") in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_set_that_is_packed_by_half_is_not_there(tmp_path: Path, root: Path, recipe: Path) -> None:
    config = write_config(tmp_path)
    (root / "tiny" / "train").mkdir(parents=True)
    (root / "tiny" / "train" / "shard-00000.tar").write_bytes(b"of a packer that was killed")
    (root / "tiny" / "train" / ".shard-00000.json").write_text("{}")
    write_recipe(recipe, "http://127.0.0.1:9/tiny.tar")
    with pytest.raises(UserError, match="not on this machine; run") as error:
        check_present(load_run([str(config)]))
    assert str(root / "tiny" / "train") in str(error.value)
    with Server(tmp_path / "served") as server:
        write_recipe(recipe, server.address("tiny.tar"))
        prefetch.main([str(config)])
    assert len(load_index(root / "tiny" / "train").samples) == 3


def test_the_command_that_is_named_can_be_pasted(tmp_path: Path, root: Path, recipe: Path) -> None:
    config = write_config(tmp_path)
    write_recipe(recipe, "http://127.0.0.1:9/tiny.tar")
    with pytest.raises(UserError) as error:
        check_present(load_run([str(config), "data.eval={my set: x}"]))
    command = str(error.value).split("`")[1]
    assert shlex.split(command)[-1] == "data.eval={my set: x}"


def test_the_command_that_a_sweep_names_gets_all_that_its_runs_need(
    tmp_path: Path, root: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, grid, overlay = write_config(tmp_path), tmp_path / "my grid.yaml", tmp_path / "over.yaml"
    overlay.write_text("train: {steps: 3}\n")
    grid.write_text(
        "metrics: {psnr: {of: student/tiny/psnr, better: higher}}\n"
        f"base: {config}\naxes: {{rate: {{one: {{}}, two: {{set: [method.optimizer.learning_rate=2e-3]}}}}}}\n"
    )
    words = [str(grid), str(overlay), "--local", "--folder", str(tmp_path / "sweeps")]
    write_recipe(recipe, "http://127.0.0.1:9/tiny.tar")
    with pytest.raises(UserError) as error:
        submit.main(words)
    said = str(error.value)
    assert said.count(str(root / "tiny" / "train")) == said.count(str(root / "tiny" / "test")) == 1
    assert not (tmp_path / "sweeps" / "tasks").exists()
    program, command, *arguments = shlex.split(said.split("`")[1])
    assert (program, command) == ("hpcdistill", "prefetch")
    with Server(tmp_path / "served") as server:
        write_recipe(recipe, server.address("tiny.tar"))
        prefetch.main(arguments)
    assert len(load_index(root / "tiny" / "train").samples) == 3
    capsys.readouterr()
    assert submit.main([*words, "--dry-run"]) == 0
    assert "not on this machine" not in capsys.readouterr().err


def test_what_is_packed_when_a_run_needs_it_is_not_missing(tmp_path: Path, root: Path) -> None:
    variant = load_run([str(CONFIGS / "fsrcnn" / "x4.yaml"), str(CONFIGS / "variants" / "cpu.yaml")])
    assert missing_for([variant]) == ([], []), "scikit-image's photographs"
    sets, weights = missing_for([load_run([str(CONFIGS / "fesd" / "horse2zebra.yaml")])] * 2)
    assert [Path(place).parent.name for place in sets] == ["horse2zebra"] * 2
    assert sorted(weights) == sorted(dict.fromkeys(weights)), "each once"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("~nobody-here/data", "HPCDISTILL_DATA '~nobody-here/data': there is no such home"), ("~/data", None)],
)
def test_a_tilde_that_the_shell_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, expected: str | None
) -> None:
    """It is the home folder, for the data root and for the configurations, which read the same variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HPCDISTILL_DATA", value)
    if expected is not None:
        with pytest.raises(UserError, match=expected):
            data_root()
        return
    assert data_root() == tmp_path / "data"
    loaded = load_run([str(CONFIGS / "dssd/x4.yaml")])
    assert needed_sets(loaded)[0] == f"{tmp_path}/data/div2k/train"


def test_the_teacher_s_sets_are_needed_too() -> None:
    loaded = load_run([str(CONFIGS / "dssd/x4.yaml"), "data.train=[a,b]", "data.eval={c: d}"])
    assert needed_sets(loaded) == ["a", "b", "d"]
    loaded = load_run(
        [str(CONFIGS / "dssd/x4.yaml"), "data.train=[a]", "data.eval={c: d}", "teacher.overrides={data: {train: [e]}}"]
    )
    assert needed_sets(loaded) == ["a", "d", "e"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dssd/x4.yaml"], []),
        (["fesd/horse2zebra.yaml"], ["vgg16", "inception"]),
        (["fesd/edges2shoes.yaml"], ["vgg16", "inception", "alexnet"]),
        (["original/edges2shoes.yaml"], ["inception", "alexnet"]),
        (["fesd/edges2shoes.yaml", "variants/gan-cpu.yaml"], ["alexnet"]),
        (["original/horse2zebra.yaml", "data.eval={}"], []),
    ],
)
def test_published_weights_by_configuration(arguments: list[str], expected: list[str]) -> None:
    run = [argument if "=" in argument else str(CONFIGS / argument) for argument in arguments]
    assert needed_weights(load_run(run)) == expected


def test_overlays_belong_to_the_run_before_them() -> None:
    dssd, fsrcnn = str(CONFIGS / "dssd/x4.yaml"), str(CONFIGS / "fsrcnn/x4.yaml")
    overlay = str(CONFIGS / "variants/cpu.yaml")
    assert split_runs([dssd, overlay, "seed=1", fsrcnn]) == [[dssd, overlay, "seed=1"], [fsrcnn]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to fetch"),
        (["--weights", "vgg"], "did you mean 'vgg16'"),
        (["{config}", "data.train=nowhere/mine"], r"nowhere/mine: is not there, and no recipe is called so"),
        (["{config}", "data.train=nowhere/t91/all"], r"shards/fetch.py t91 --from FOLDER"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, root: Path) -> None:
    config = write_config(tmp_path)
    with pytest.raises(UserError, match=message):
        prefetch.main([argument.format(config=config) for argument in arguments])
