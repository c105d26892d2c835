"""Each recipe says what was published, and a wrong one is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdistill.data.pack.recipes import OWN, Recipe, load_recipe, recipe_names
from hpcdistill.errors import UserError

# Sizes and sha256 as TensorFlow Datasets publishes them (url_checksums/cycle_gan.txt, datasets/div2k/checksums.tsv).
PUBLISHED = {
    "horse2zebra": {
        "horse2zebra.zip": (116867962, "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1"),
    },
    "summer2winter": {
        "summer2winter_yosemite.zip": (132640856, "167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9"),
    },
    "monet2photo": {
        "monet2photo.zip": (305231073, "88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04"),
    },
    "div2k": {
        "DIV2K_train_HR.zip": (3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
        "DIV2K_train_LR_bicubic_X2.zip": (
            925390592,
            "a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850",
        ),
        "DIV2K_train_LR_bicubic_X3.zip": (
            427847282,
            "ad5c8e5507e2765823d3c2c5bd0934842efcd487c5370604c224090898b3163a",
        ),
        "DIV2K_train_LR_bicubic_X4.zip": (
            246914039,
            "f006b837f4eb52b82909aa01478e6d6d199eefce932179491d0c9dbb706dde3a",
        ),
        "DIV2K_valid_HR.zip": (448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
        "DIV2K_valid_LR_bicubic_X2.zip": (
            117763600,
            "60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57",
        ),
        "DIV2K_valid_LR_bicubic_X3.zip": (
            54513392,
            "04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3",
        ),
        "DIV2K_valid_LR_bicubic_X4.zip": (
            31505881,
            "a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553",
        ),
    },
    "div2k-801-810": {
        "DIV2K_valid_HR.zip": (448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
    },
    # Their authors publish none, and none is invented: the first fetch records what came.
    "edges2shoes": {"edges2shoes.tar.gz": (None, None)},
    "edges2shoes-r": {"edges2shoes-r.tar.gz": (None, None)},
    "facades": {"facades.tar.gz": (None, None)},
    **{name: {"benchmark.tar": (None, None)} for name in ("set5", "set14", "b100", "urban100")},
    # Nothing to download: one's own images, a local copy only, or inside a package.
    **{name: {} for name in ("bsd", "t91", "photos", "folder", "paired", "unpaired")},
}
# Of the papers and of the authors' pages; a pair counts once.
COUNTS = {
    "horse2zebra": {"train": {"a": 1067, "b": 1334}, "test": {"a": 120, "b": 140}},
    "summer2winter": {"train": {"a": 1231, "b": 962}, "test": {"a": 309, "b": 238}},
    "monet2photo": {"train": {"a": 1072, "b": 6287}, "test": {"a": 121, "b": 751}},
    "edges2shoes": {"train": {"ab": 49825}, "test": {"ab": 200}},
    "edges2shoes-r": {"train": {"ab": 47977}, "test": {"ab": 2048}},
    "facades": {"train": {"ab": 400}, "val": {"ab": 100}, "test": {"ab": 106}},
    "div2k": {"train": {"hr": 800}, "valid": {"hr": 100}},
    "div2k-801-810": {"valid": {"hr": 10}},
    "set5": {"all": {"hr": 5}},
    "set14": {"all": {"hr": 14}},
    "b100": {"all": {"hr": 100}},
    "urban100": {"all": {"hr": 100}},
    "t91": {"all": {"hr": 91}},
    "bsd": {"all": {"hr": 399}},
}


def test_the_recipes() -> None:
    assert recipe_names() == sorted(PUBLISHED)
    assert {name: load_recipe(name).kind for name in OWN.values()} == {
        "folder": "lr-hr", "paired": "paired", "unpaired": "unpaired"
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_checksums_and_counts_are_those_published(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert {download.file: (download.bytes, download.sha256) for download in recipe.downloads} == PUBLISHED[name]
    assert recipe.images == COUNTS.get(name, {})
    assert recipe.licence
    assert recipe.origin
    assert all(download.addresses for download in recipe.downloads)


def test_official_lr_images_of_div2k_are_optional() -> None:
    recipe = load_recipe("div2k")
    assert recipe.parts == ("lr",)
    assert [download.file for download in recipe.downloads if not download.optional] == [
        "DIV2K_train_HR.zip", "DIV2K_valid_HR.zip"
    ]  # fmt: skip
    assert recipe.splits == ("train", "valid")


def test_a_third_partys_md5_is_marked_as_one() -> None:
    (download,) = load_recipe("edges2shoes").downloads
    assert download.md5_third_party == "71da478b54fedde126e234a2a050bc15"


def test_the_re_split_is_taken_from_where_its_authors_say() -> None:
    """datasets/download_pix2pix_dataset.sh of mit-han-lab/gan-compression at 111093fc; its test set is called val."""
    recipe = load_recipe("edges2shoes-r")
    assert recipe.downloads[0].addresses == (
        "https://huggingface.co/mit-han-lab/gan-compression/resolve/main/datasets/edges2shoes-r.tar.gz",
    )
    assert "edges2shoes-r" in recipe.roots
    assert recipe.layouts[0] == {"train": {"ab": ("train",)}, "test": {"ab": ("val",)}}


HEAD = "name: mine\ntitle: t\nlicence: l\norigin: o\n"
HR = "layouts: [{train: {hr: x}}]\n"


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "layouts: [{train: {hr: [a, b]}, test: {hr: c}}]\nimages: {train: {hr: 3}}\n")
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    assert (recipe.kind, recipe.splits, recipe.roots) == ("lr-hr", ("train", "test"), (".",))
    assert recipe.layouts == ({"train": {"hr": ("a", "b")}, "test": {"hr": ("c",)}},)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("name: [", r"not valid YAML: "),
        ("- x", r"expected `key: value` lines at the top level; see .*folder\.yaml$"),
        ("name: mine\ntitle: t\norigin: o\n" + HR, r"licence: missing$"),
        (HEAD + HR + "license: l\n", r"license: unknown key; did you mean 'licence'\?$"),
        (HEAD + HR + "places: [[a, b]]\n", r"places: unknown key; valid: builtin, downloads, .*layouts"),
        (
            HEAD + HR + "downloads: [{file: x, adresses: []}]\n",
            r"downloads\.0\.adresses: unknown key; did you mean 'ad",
        ),
        (
            HEAD + HR + "downloads: [{file: x, addresses: ['pipe:ls']}]\n",
            r"downloads\.0\.addresses\.0: pipe:ls: not an",
        ),
        (HEAD + HR + "downloads: [{file: ../x}]\n", r"downloads\.0\.file: String should match"),
        (HEAD + HR + "kind: paird\n", r"kind: expected 'lr-hr', 'paired' or 'unpaired', got \"paird\"$"),
        (HEAD + HR + "kind: paired\n", r"paired splits consist of ab or a\+b; train has hr$"),
        (HEAD + "kind: unpaired\nlayouts: [{train: {ab: x}}]\n", r"unpaired splits consist of a\+b; train has ab$"),
        (HEAD + "kind: paired\nlayouts: [{train: {a: x, b: y, lr2: z}}]\n", r"paired splits consist of .*a\+b\+lr2$"),
        (HEAD + "layouts: [{train: {lr5: x}}]\n", r"layouts\.0\.train\.lr5.*: expected 'hr', 'lr2'"),
        (HEAD + "layouts: [{all: {hr: x}, test: {hr: y}}]\n", r"'all' stands for a set without splits; rename it"),
        (HEAD + "layouts: [{}]\n", r"layouts\.0: Dictionary should have at least 1 item"),
        (HEAD + "layouts: [{train: {hr: []}}]\n", r"layouts\.0\.train\.hr: Tuple should have at least 1 item"),
        (HEAD + HR + "images: {tran: {hr: 3}}\n", r"no layout has the split 'tran' .*; did you mean 'train'\?$"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^{path}: .*{line}") as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe 'sett5'; did you mean 'set5'"):
        load_recipe("sett5")
    with pytest.raises(UserError, match=r"mine\.yaml: no such recipe file"):
        load_recipe(str(tmp_path / "mine.yaml"))
