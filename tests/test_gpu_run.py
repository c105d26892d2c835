"""bench/gpu.py: parts that end, fail, hang and print half a line; what is on disk while it runs; the rehearsal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hpcdistill.errors import UserError

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """The script as a module; it finds the files beside it as it does when it is run."""
    sys.path.insert(0, str(BENCH))
    import gpu

    yield gpu
    sys.path.remove(str(BENCH))


def stub(gpu: ModuleType, name: str, code: str, seconds: float = 5, **options: Any) -> Any:
    """A part that runs a line of Python; its result is the number of lines."""
    command = [sys.executable, "-c", code]
    read = options.pop("read", lambda folder, output: {"lines": output.splitlines()})
    return gpu.Part(name, f"stub {name}", seconds, lambda place: command, read, **options)


def run(gpu: ModuleType, tmp_path: Path, *chosen: Any, minutes: float | None = None) -> dict[str, dict[str, Any]]:
    """The parts by name, as the JSON has them."""
    place = gpu.Place("cpu", tmp_path / "sets", tmp_path / "work")
    place.folder.mkdir()
    gpu.run_all(chosen, place, minutes or sum(part.seconds for part in chosen) / 60, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    return {part["name"]: part for part in report["parts"]}


def test_one_fails_and_one_hangs(gpu: ModuleType, tmp_path: Path) -> None:
    """Both are named with their last lines, the others are measured, and no process is left of the one that hangs."""
    pid = tmp_path / "pid"
    hang = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('so far', flush=True); time.sleep(60)"
    )
    found = run(
        gpu,
        tmp_path,
        stub(gpu, "broken", "import sys; print('one'); sys.exit('the reason')"),
        stub(gpu, "hanging", hang, 3),
        stub(gpu, "good", "print('measured')"),
        gpu.Part("gone", "no script", 9, lambda place: None, None, absent="not written yet"),
    )
    assert {name: part["status"] for name, part in found.items()} == {
        "broken": "failed",
        "hanging": "cut",
        "good": "done",
        "gone": "absent",
    }
    assert found["broken"]["exit_code"] == 1
    assert found["broken"]["last_lines"] == ["one", "the reason"]
    assert found["hanging"]["last_lines"] == ["so far"]
    assert found["hanging"]["seconds"] < 20
    assert found["good"]["result"] == {"lines": ["measured"]}
    assert not _alive("sleep", "60", pid=pid.read_text())
    for page in ("gpu.html", "gpu.md"):
        text = (tmp_path / "out" / page).read_text()
        assert "Failed or cut: broken, hanging." in text
        assert "the reason" in text
        assert "None of its numbers is a result" in text
        assert "not written yet" in text


def test_all_that_was_measured_is_on_disk(gpu: ModuleType, tmp_path: Path) -> None:
    """While a part runs, the JSON holds those before it, and says which one runs."""
    seen = tmp_path / "seen"
    look = f"import shutil; shutil.copy({str(tmp_path / 'out' / 'gpu.json')!r}, {str(seen)!r})"
    run(gpu, tmp_path, stub(gpu, "first", "print(1)"), stub(gpu, "looks", look), stub(gpu, "last", "print(2)"))
    at_that_time = json.loads(seen.read_text())["parts"]
    assert [part["status"] for part in at_that_time] == ["done", "running", "not reached"]
    assert at_that_time[0]["result"] == {"lines": ["1"]}


def test_a_training_is_ended_by_its_time(gpu: ModuleType, tmp_path: Path) -> None:
    """That is no failure, where it has written its log; ending early with an error is one."""
    until_told = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(60)"
    found = run(
        gpu,
        tmp_path,
        stub(gpu, "ended", until_told, 4, read=lambda folder, output: dict(LOGGED), endless=True),
        stub(gpu, "silent", until_told, 4, read=lambda folder, output: {"runs": {}}, endless=True),
        stub(gpu, "crashed", "raise SystemExit(3)", 4, read=lambda folder, output: dict(LOGGED), endless=True),
    )
    assert [found[name]["status"] for name in ("ended", "silent", "crashed")] == ["done", "cut", "failed"]


RUN = {"steps": 9, "seconds": 1.5, "steps_per_second": 6.0, "first": {"a/b": 2.0}, "last": {"a/b": 1.0}}
LOGGED = {"runs": {"run": RUN}}


def test_rows_of_a_part_that_was_cut(gpu: ModuleType, tmp_path: Path) -> None:
    """Whole lines are kept, half a line is not."""
    import gpu_parts

    row = {"row": "fsrcnn", "form": "contiguous", "seconds": 0.002, "best": 0.001, "steps": 15}
    code = f"import time; print({json.dumps(row)!r}); print('{{\"row\": \"dss', end='', flush=True); time.sleep(60)"
    found = run(gpu, tmp_path, stub(gpu, "steps", code, 3, read=gpu_parts._json_lines))
    assert found["steps"]["status"] == "cut"
    assert found["steps"]["result"] == {"rows": [row]}
    assert "| fsrcnn, contiguous | 2.00 | 1.00 |  | 15 |" in (tmp_path / "out" / "gpu.md").read_text()


def test_stopped_from_outside(tmp_path: Path) -> None:
    """A signal to the whole: the part's process ends too, and the JSON is there."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCH / "gpu.py"), "--rehearse", "--only", "train fsrcnn", "--out", str(out)]
    paths = os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
    program = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    assert program.stderr is not None
    for line in program.stderr:
        if line.startswith("train fsrcnn:"):
            break
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=60)
    assert program.returncode != 0
    [part] = json.loads((out / "gpu.json").read_text())["parts"]
    assert part["status"] == "running"
    deadline = time.monotonic() + 10
    while _alive("train.steps=1000000", str(tmp_path)) and time.monotonic() < deadline:
        os.sched_yield()
    assert not _alive("train.steps=1000000", str(tmp_path))


def _alive(*words: str, pid: str = "[0-9]*") -> bool:
    """Whether a process (of this number) has all these words in its command line; one that has ended has none."""
    for entry in Path("/proc").glob(f"{pid}/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            return True
    return False


def test_a_part_as_it_is(gpu: ModuleType, tmp_path: Path) -> None:
    """FSRCNN, really trained for a few seconds on drawn pictures: the one short part that is no stub."""
    code = gpu.main(["--rehearse", "--only", "train fsrcnn", "--minutes", "0.5", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    [part] = report["parts"]
    assert code == 0, part
    [run_of] = part["result"]["runs"].values()
    assert run_of["steps"] > 0
    assert report["rehearsal"] is True
    assert report["machine"]["revision"] is None or isinstance(report["machine"]["revision"], str)
    assert "Rehearsal of the GPU run" in (tmp_path / "gpu.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no CUDA device is visible; .* --rehearse"),
        (["--only", "stepps"], "--only: no part 'stepps'; did you mean"),
        (["--rehearse", "--minutes", "-1"], "--minutes: -1 is not more than 0"),
        (["--rehearse", "--data", "nowhere"], "nowhere: no packed sets"),
    ],
)
def test_what_cannot_be(gpu: ModuleType, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gpu.main(words)


def test_every_wheel_is_locked(gpu: ModuleType) -> None:
    """`--wheels` names the versions of requirements.lock."""
    command = [sys.executable, str(BENCH / "gpu.py"), "--wheels"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lock = {line.replace("_", "-") for line in (BENCH.parent / "requirements.lock").read_text().splitlines()}
    assert set(done.stdout.split()) <= lock
    assert len(done.stdout.split()) == len(gpu.WHEELS)
