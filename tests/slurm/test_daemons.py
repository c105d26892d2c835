"""The test cluster itself: it says why it cannot be, and leaves nothing behind, whatever happens to it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import daemons
import psutil
import pytest
from cluster import ClusterError, until
from daemons import HOSTS, Daemons, unavailable


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not tmp_path: a socket's path may have no more than 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_why_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(daemons, "_program", lambda name: f"/usr/sbin/{name}")
    assert unavailable() == "SLURM's daemons need root"
    monkeypatch.setattr(daemons, "_program", lambda name: None if name == "slurmctld" else f"/usr/sbin/{name}")
    assert unavailable() == "SLURM is not installed here (no slurmctld); `make test-slurm` installs it"


@pytest.mark.slurm
def test_a_cluster_with_accounting_remembers_its_jobs(folder: Path) -> None:
    if reason := unavailable(accounting=True):
        pytest.skip(reason)
    started = Daemons(folder, nodes=1, accounting=True)
    cluster = started.start()
    try:
        assert cluster.run("srun", "--job-name=fails", "false").returncode == 1
        known = ("sacct", "--noheader", "--parsable2", "--format=JobName,State,ExitCode")
        until(lambda: cluster.ask(*known), lambda lines: "fails|FAILED|1:0" in lines, 20, "the job in sacct")
        job = cluster.submit("--wrap=sleep 300", f"--output={folder}/job.log")
        cluster.wait_for(job, lambda shown: shown["JobState"] == "RUNNING", 20)
    finally:
        started.stop()  # with a job that runs
    assert _left(folder) == []
    assert cluster.nodes[0] not in HOSTS.read_text()


@pytest.mark.slurm
def test_a_start_that_fails_says_why_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(daemons, "SLURM_CONF", daemons.SLURM_CONF + "NoSuchKey=1\n")
    started = Daemons(folder)
    with pytest.raises(ClusterError, match="NoSuchKey"):
        started.start()
    assert _left(folder) == []
    assert started.cluster.nodes[0] not in HOSTS.read_text()


def _left(folder: Path) -> list[str]:
    """The processes that still use the cluster in `folder`."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return left
