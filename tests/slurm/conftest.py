"""One cluster a session, shared by the workers of pytest-xdist; skipped, with the reason, where there can be none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, until
from daemons import Daemons, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running SLURM of two nodes, without accounting."""
    if reason := unavailable():
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    # With pytest-xdist each worker has a folder of its own in a common one.
    shared = base.parent if base.name.startswith("popen-") else base
    with (shared / "slurm-users.lock").open("w") as users:
        # The first worker to come starts the cluster, and is the last to leave it.
        with _locked(shared / "slurm-start.lock"):
            note, daemons = shared / "slurm-cluster.json", None
            if note.exists():
                known = json.loads(note.read_text())
                found = Cluster(Path(known["folder"]), tuple(known["nodes"]))
            else:
                # A short path: those of munge's socket and the like may have no more than 107 bytes.
                daemons = Daemons(Path(tempfile.mkdtemp(prefix="slurm-")))
                found = daemons.start()
                note.write_text(json.dumps({"folder": str(found.folder), "nodes": found.nodes}))
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield found
        finally:
            if daemons is None:
                fcntl.flock(users, fcntl.LOCK_UN)
            else:
                with _locked(shared / "slurm-start.lock"):
                    note.unlink()
                try:
                    until(lambda: _alone(users.fileno()), bool, 600, "other workers' tests on the cluster")
                finally:
                    daemons.stop()
                    shutil.rmtree(found.folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
