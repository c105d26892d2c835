"""A process that runs one network in one form and says the most memory it has had: started by `peak_memory`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

TORCH_ALONE = ""  # in place of a variant: what PyTorch and hpcdistill take without a network


def peak_memory(job: dict[str, Any]) -> int | None:
    """The largest resident memory, in bytes, of a process that does nothing but `job` (see `main`).

    PyTorch and all other libraries are in it. None where the process could not say.
    """
    command = [sys.executable, "-m", "hpcdistill.deploy.latency.memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return None
    return int(done.stdout.split()[-1])


def main(text: str) -> None:
    """`text`: JSON with `file` (a generator's or an exported one), `variant`, `size` and `threads`."""
    job: dict[str, Any] = json.loads(text)
    import torch

    from hpcdistill.deploy.latency.subjects import find_subject
    from hpcdistill.deploy.latency.variants import Place, prepare

    if job["variant"] != TORCH_ALONE:
        torch.set_num_threads(job["threads"])
        subject = find_subject(job["file"])
        height, width = job["size"]
        run = prepare(job["variant"], subject, Place(subject.example((height, width)), "cpu", Path()))
        run()
        forget_peak()  # a compiler's, say
        run()
    sys.stdout.write(f"{peak()}\n")


def forget_peak() -> None:
    """Let the kernel count the peak from what is in use now; where it cannot, all that has been counts."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The most resident memory, in bytes. What `getrusage` says may be the parent's, from before this process began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main(sys.argv[1])
