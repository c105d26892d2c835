#!/usr/bin/env bash
# pnnx writes `torch.narrow` as a layer that ncnn does not have, and ends with exit code 0.
#
# A slice and a narrow are one operation; PyTorch documents the second as a view of the first. Behaviour of pnnx 20261020:
# of `x[:, :, 1:5]` it makes ncnn's Crop; of `x.narrow(2, 1, 4)` a layer `torch.narrow` or `Tensor.narrow`, which ncnn
# 1.0.20261020 has not: it says so at load time only, and gives no output. The converter's exit code is 0 for both.
# Seen: "slice 0 ['Input', 'Convolution', 'Crop']", "narrow 0 ['Input', 'Convolution', 'torch.narrow']", load_param -1 (and "layer torch.narrow not exists or registered").
# What we do about it: hpcdistill/deploy/formats/traced.py turns narrow into a slice while it traces, and every layer of
# what pnnx wrote is looked up before the export counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pnnx==20261020 ncnn==1.0.20261020 numpy==2.4.6
cd "$folder"
cat > cut.py <<'PY'
import os
import subprocess
import warnings

import ncnn
import pnnx
import torch

warnings.simplefilter("ignore")
program = os.path.join(os.path.dirname(pnnx.__file__), "pnnx")


class Cut(torch.nn.Module):
    def __init__(self, narrow):
        super().__init__()
        self.conv, self.narrow = torch.nn.Conv2d(1, 2, 1), narrow

    def forward(self, x):
        x = self.conv(x)
        return x.narrow(2, 1, 4) if self.narrow else x[:, :, 1:5]


found = {}
for name in ("slice", "narrow"):
    image = torch.rand(1, 1, 8, 8)
    torch.jit.trace(Cut(name == "narrow").eval(), image).save(f"{name}.pt")
    done = subprocess.run([program, f"{name}.pt", "inputshape=[1,1,8,8]"], capture_output=True)
    with open(f"{name}.ncnn.param") as file:
        layers = [line.split()[0] for line in file.read().splitlines()[2:] if line.strip()]
    loaded = ncnn.Net().load_param(f"{name}.ncnn.param")
    print(name, done.returncode, layers, "load_param", loaded)
    found[name] = (done.returncode, layers[-1], loaded)
assert found["slice"] == (0, "Crop", 0), found
assert found["narrow"][0] == 0, "pnnx says it now"
assert found["narrow"][1].endswith("narrow"), "pnnx knows narrow now: deploy/formats/traced.py can go"
assert found["narrow"][2] != 0
PY
"$folder/env/bin/python" cut.py
