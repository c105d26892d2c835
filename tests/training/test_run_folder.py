"""One process a run folder, and what the folder remembers of its sessions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdistill.errors import UserError
from hpcdistill.training.run_folder import RunFolder

HOLDER = """
import sys
from pathlib import Path
from hpcdistill.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.create("", {})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is training this run"):
            RunFolder(run).create("", {})
        holder.kill()
    RunFolder(run).create("", {})


def test_sessions_are_added_and_a_change_of_code_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for revision in ("aaa", "aaa", "bbb"):
        monkeypatch.setattr("hpcdistill.training.run_folder.code_revision", lambda revision=revision: revision)
        folder = RunFolder(tmp_path / "run")
        folder.create("seed: 1\n", {"short": "x"})
        folder.release()
    saved = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [session["revision"] for session in saved["sessions"]] == ["aaa", "aaa", "bbb"]
    assert capsys.readouterr().err.count("started with code revision aaa, going on with bbb") == 1
