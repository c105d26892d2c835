import hashlib
from pathlib import Path

import pytest
from serving import Server

from hpcdistill.data.fetch import weights
from hpcdistill.data.fetch.download import Download
from hpcdistill.data.fetch.weights import WEIGHTS, Weights, fetch_weights, find_weights
from hpcdistill.errors import UserError

CONTENT = b"not really a network" * 50
FILE = f"tiny-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def known(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    download = Download(file=FILE, addresses=(address,), sha256_prefix=FILE[5:13])
    monkeypatch.setitem(weights.WEIGHTS, "tiny", Weights("a tiny network", download))


def test_the_published_files_are_known_by_name_and_digest() -> None:
    assert {name: (entry.download.file, entry.download.sha256_prefix) for name, entry in WEIGHTS.items()} == {
        "inception": ("pt_inception-2015-12-05-6726825d.pth", "6726825d"),
        "vgg16": ("vgg16-397923af.pth", "397923af"),
        "alexnet": ("alexnet-owt-7be5be79.pth", "7be5be79"),
    }


def test_weights_are_fetched_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_bytes(CONTENT)
    with Server(tmp_path) as server:
        known(monkeypatch, server.address(FILE))
        with pytest.raises(UserError, match=r"not here .* `hpcdistill prefetch --weights tiny` .* login node"):
            find_weights("tiny")
        fetched = fetch_weights("tiny")
        assert fetch_weights("tiny") == find_weights("tiny") == fetched == tmp_path / "data" / "weights" / FILE
        assert len(server.requests) == 1
    assert fetched.read_bytes() == CONTENT


def test_what_torch_hub_has_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, "http://127.0.0.1:9/nobody")
    there = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    there.parent.mkdir(parents=True)
    there.write_bytes(CONTENT)
    assert find_weights("tiny") == there
    copied = fetch_weights("tiny")
    assert copied == tmp_path / "data" / "weights" / FILE, "a compute node may not see this user's home"
    assert copied.read_bytes() == CONTENT


def test_damaged_weights_are_named_and_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_bytes(CONTENT)
    ours, hub = tmp_path / "data" / "weights" / FILE, tmp_path / "torch" / "hub" / "checkpoints" / FILE
    hub.parent.mkdir(parents=True)
    ours.parent.mkdir(parents=True)
    with Server(tmp_path) as server:
        known(monkeypatch, server.address(FILE))
        hub.write_bytes(CONTENT[:-1] + b"?")
        with pytest.raises(UserError, match=r"damaged, its sha256 does not begin with .* --weights tiny"):
            find_weights("tiny")
        ours.write_bytes(b"<html>Sign in</html>")
        with pytest.raises(UserError, match=r"tiny-.*damaged \(it is a web page: .*\), its sha256 does not begin with"):
            find_weights("tiny")
        assert fetch_weights("tiny").read_bytes() == CONTENT
    assert find_weights("tiny") == ours


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(UserError, match="did you mean 'vgg16'"):
        find_weights("vgg19")
