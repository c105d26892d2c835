"""A stand-in for `python -m hpcdistill.train` that knows no torch: it does what the run's name says."""

from __future__ import annotations

from pathlib import Path

TRAIN = """\
import json, os, pathlib, shlex, signal, sys, time
config = pathlib.Path(sys.argv[1])
values = json.loads(config.read_text())
name = values["name"]
shown = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "HPCDISTILL_DATA", "SLURM_JOB_ID", "SLURM_PROCID",
         "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMP_NUM_THREADS")
print(name, sys.argv[2:], {key: os.environ.get(key) for key in shown},
      "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
run = pathlib.Path(values["runs"]) / (name + "-" + config.parent.name)
if name.startswith("waits"):
    got = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: got.append(number))
    (config.parent / ("waiting" + os.environ.get("RANK", ""))).touch()
    while not got:
        time.sleep(0.02)
    print("saved after", [signal.Signals(number).name for number in got], flush=True)
    (config.parent / "waiting").unlink(missing_ok=True)
    sys.exit(75)
if name.startswith("fails"):
    print("error: no such thing; mend it", flush=True)
    sys.exit(2)
if name.startswith("dies"):
    os.kill(os.getpid(), signal.SIGKILL)
if name.startswith("loses"):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    print("error: rank 1 is lost", flush=True)
    sys.exit(71)
if name.startswith("stops"):
    sys.exit(75)
if os.environ.get("RANK", "0") == "0":
    run.mkdir(parents=True, exist_ok=True)
    session = {"command": shlex.join(sys.orig_argv)}
    (run / "environment.json").write_text(json.dumps({"sessions": [session]}))
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    if (run / "result.json").is_file():
        json.loads((run / "result.json").read_text())  # training refuses one that is damaged
    result = {"name": name, "key": config.parent.name, "seconds": time.time()}
    (run / "result.json").write_text(json.dumps(result))
"""


def put_stand_in(folder: Path) -> None:
    """From now on `python -m hpcdistill.train`, called in `folder`, is the stand-in: its folder comes first."""
    (folder / "hpcdistill").mkdir()
    (folder / "hpcdistill" / "__init__.py").touch()
    (folder / "hpcdistill" / "train.py").write_text(TRAIN)
