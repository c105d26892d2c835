#!/usr/bin/env bash
# safetensors 0.8.0 (Python package; the writer is its Rust core): the same tensors with the same metadata are not the same bytes.
#
# `save(tensors, metadata)` with two or more metadata keys writes them into the header in an order that changes from call
# to call, so sha256 of a checkpoint names the call and not its content: a content-addressed store keeps one network many
# times, a digest in a manifest or a run's identity never comes back, and a reproducible build is none. The order of the
# tensors is fixed. One metadata key (with everything else as JSON inside) gives the same bytes each time; what hpcdistill
# writes has one key for that reason (hpcdistill/models/registry.py).
#
# Seen with safetensors 0.8.0 and numpy 2.3.5 on Linux, 40 calls each:
#   4 keys: more than one digest    1 key: one digest    no metadata: one digest
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PY'
import hashlib
import json

import numpy as np
from safetensors.numpy import save

tensors = {"weight": np.arange(6, dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}
notes = {"network": "fsrcnn", "scale": "4", "steps": "1000", "seed": "0"}
cases = {"4 keys": notes, "1 key": {"notes": json.dumps(notes)}, "no metadata": None}
digests = {
    name: {hashlib.sha256(save(tensors, metadata)).hexdigest() for _ in range(40)} for name, metadata in cases.items()
}
for name, found in digests.items():
    print(f"{name}: {len(found)} digests in 40 calls")
assert len(digests["4 keys"]) > 1, "several metadata keys are written in one order now"
assert len(digests["1 key"]) == len(digests["no metadata"]) == 1
PY
