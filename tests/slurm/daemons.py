"""SLURM's daemons for the tests: on loopback, with their own ports, key and folder; nothing of them outlives `stop`.

`python tests/slurm/daemons.py FOLDER [NODES] [--accounting]` starts a cluster to try things on, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from cluster import SYSTEM_PATH, Cluster, ClusterError, until

HOSTS = Path("/etc/hosts")
NODE_CPUS, NODE_GPUS = 8, 4  # what each node claims to have; the tests' jobs are small
START_SECONDS = 60
_OWNER = "# SLURM test cluster of process"

# Memory is a resource that jobs must ask for, as on real clusters, but nothing enforces it here.
# cred_expire: the shorter, the sooner a requeued job is started again (cred_expire + 1 seconds).
# KillWait: between a cancelled job's SIGTERM and its SIGKILL; SLURM's default.
SLURM_CONF = """\
ClusterName=hpcdistill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=30
MinJobAge=600
JobRequeue=1
MaxArraySize=10001
MaxJobCount=20000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,max_array_tasks=10000,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
{resources}
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} State=UNKNOWN {node_resources}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment,job_script
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""
DATABASE_USER = """\
create database slurm_acct;
create user slurm@'127.0.0.1' identified by 'slurm';
grant all on slurm_acct.* to slurm@'127.0.0.1';
"""


def unavailable(accounting: bool = False) -> str | None:
    """Why no cluster can be started here; None when one can."""
    needed = ["munged", "slurmctld", "slurmd", "srun"] + (["slurmdbd", "mariadbd"] if accounting else [])
    missing = [name for name in needed if _program(name) is None]
    if missing:
        return f"SLURM is not installed here (no {', '.join(missing)}); `make test-slurm` installs it"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} is not writable, and the names of the nodes must resolve"
    return None


class Daemons:
    """Starts a cluster's daemons as children of this process, and stops them, whatever has happened in between."""

    def __init__(self, folder: Path, nodes: int = 2, *, accounting: bool = False) -> None:
        self.folder = folder
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._accounting = accounting
        # Freely chosen ports, so that several clusters can be on one machine. The first also names the nodes.
        controller, dbd, database, *self._node_ports = _free_ports(3 + nodes)
        self._ports = {"controller": controller, "dbd": dbd, "database": database}
        names = tuple(f"node-{controller}-{number + 1}" for number in range(nodes))
        self.cluster = Cluster(folder, names)

    def start(self) -> Cluster:
        """All daemons, each awaited; ClusterError with the end of the log of the one that did not come up."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self.cluster

    def _start(self) -> None:
        for name in ("state", "spool", "gpus", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        with _hosts() as lines:
            lines[:] = [line for line in lines if not _is_stale(line)]
            lines.extend(f"127.0.0.1 {node} {_OWNER} {os.getpid()}" for node in self.cluster.nodes)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        own = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed")}
        self._run(
            "munged",
            "--foreground",
            "--force",  # the folder may be writable by others, as /tmp is
            f"--key-file={own['key']}",
            f"--socket={own['socket']}",
            f"--pid-file={own['pid']}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
            f"--seed-file={own['seed']}",
        )
        self._await("munged", own["socket"].exists)
        if self._accounting:
            self._start_accounting()
        self._run("slurmctld", "-D")
        self._await("slurmctld", lambda: _works(self.cluster, "sinfo"))
        for node in self.cluster.nodes:
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            self._run("slurmd", "-D", "-N", node, log=node)
        idle = ("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D")
        self._await(
            self.cluster.nodes[0], lambda: self.cluster.run(*idle).stdout.strip() == str(len(self.cluster.nodes))
        )

    def _start_accounting(self) -> None:
        data, socket_file = self.folder / "database", self.folder / "database.socket"
        make = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        self.cluster.ask(*make, "--auth-root-authentication-method=normal")
        self._run(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={socket_file}",
            f"--pid-file={self.folder / 'database.pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self._ports['database']}",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=16M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        )
        client = ["mariadb", "--no-defaults", "--user=root", f"--socket={socket_file}"]
        self._await("mariadbd", lambda: _works(self.cluster, *client, "--execute=select 1"))
        self.cluster.ask(*client, f"--execute={DATABASE_USER}")
        self._run("slurmdbd", "-D")
        self._await("slurmdbd", lambda: _works(self.cluster, "sacctmgr", "--noheader", "list", "cluster"))
        self.cluster.ask("sacctmgr", "--immediate", "--quiet", "add", "cluster", "hpcdistill")

    def stop(self) -> None:
        """End all jobs and daemons, in the order that lets each say goodbye to the next; then whoever is left."""
        if any(name == "slurmctld" and process.poll() is None for name, process in self._started):
            with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
                self.cluster.cancel_all()
        for name, process in reversed(self._started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                print(f"{name} had to be killed", file=sys.stderr)
                process.kill()
                process.wait()
        self._started.clear()
        for process in self._strays():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with _hosts() as lines:
            lines[:] = [line for line in lines if not set(self.cluster.nodes).intersection(line.split())]

    def _strays(self) -> Iterator[psutil.Process]:
        """Whatever still runs for this cluster (slurmstepd, a task, a client): told by SLURM_CONF, which all carry."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]:
                    yield process

    def _configure(self) -> None:
        folder, ports = self.folder, self._ports
        devices = _fake_gpus(folder / "gpus")
        if devices:
            lines = f"NodeName={','.join(self.cluster.nodes)} Name=gpu Type=fake File={devices}\n"
            (folder / "gres.conf").write_text(lines)
        # Read even where no cgroup plugin is in use.
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainRAMSpace=no\n")
        accounting = ACCOUNTING.format(folder=folder, port=ports["dbd"]) if self._accounting else NO_ACCOUNTING
        host = socket.gethostname()
        nodes = (
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for node, port in zip(self.cluster.nodes, self._node_ports, strict=True)
        )
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=host,
                folder=folder,
                controller_port=ports["controller"],
                accounting=accounting,
                resources="GresTypes=gpu" if devices else "",
                node_resources=f"Gres=gpu:fake:{NODE_GPUS}" if devices else "",
                cpus=NODE_CPUS,
                memory=NODE_CPUS * 500,
                nodes="\n".join(nodes),
            )
        )
        dbd = folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses one that others may read: it has a password
        dbd.write_text(SLURMDBD_CONF.format(folder=folder, port=ports["dbd"], database_port=ports["database"]))

    def _run(self, name: str, *arguments: str, log: str = "") -> None:
        program = _program(name)
        assert program is not None, name
        # Should this process be killed, the kernel ends the daemons: they do not stay behind.
        parent = [setpriv, "--pdeathsig", "TERM"] if (setpriv := shutil.which("setpriv")) else []
        with (self.folder / "log" / f"{log or name}.out").open("wb") as output:
            process = subprocess.Popen(
                [*parent, program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.cluster.environment,
                start_new_session=True,  # Ctrl-C at the tests' terminal is for pytest, which then stops them in order
            )
        self._started.append((log or name, process))

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            for started, process in self._started:
                if process.poll() is not None:
                    raise ClusterError(f"{started} ended with code {process.returncode}: {self._log(started)}")
            return ready()

        try:
            until(look, bool, START_SECONDS, name)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self._log(name)}") from None

    def _log(self, name: str) -> str:
        lines = (self.folder / "log" / f"{name}.out").read_text(errors="replace").splitlines()
        return "\n".join(lines[-10:])


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}")


def _works(cluster: Cluster, *command: str) -> bool:
    try:
        return cluster.run(*command, seconds=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are known, so that no two are the same."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _fake_gpus(folder: Path) -> str:
    """The devices of a node's pretended GPUs as gres.conf names them; "" where no device can be made.

    They are character devices like /dev/null: slurmd refuses plain files.
    """
    try:
        for number in range(NODE_GPUS):
            os.mknod(folder / f"nvidia{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        return ""
    return f"{folder}/nvidia[0-{NODE_GPUS - 1}]"


def _is_stale(line: str) -> bool:
    """Whether this line of /etc/hosts is of a test cluster whose process was killed."""
    _, found, owner = line.partition(_OWNER)
    return bool(found) and not psutil.pid_exists(int(owner))


@contextlib.contextmanager
def _hosts() -> Iterator[list[str]]:
    """The lines of /etc/hosts, to be changed in place; one process at a time, and in place as it may be a mount."""
    with HOSTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        lines = before.splitlines()
        yield lines
        after = "".join(f"{line}\n" for line in lines)
        if after != before:
            file.seek(0)
            file.write(after)
            file.truncate()


if __name__ == "__main__":
    daemons = Daemons(
        Path(sys.argv[1]).resolve(), int(([*sys.argv[2:], "2"])[0]), accounting="--accounting" in sys.argv
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    daemons.start()
    try:
        print(f"export SLURM_CONF={daemons.folder / 'slurm.conf'}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        daemons.stop()
