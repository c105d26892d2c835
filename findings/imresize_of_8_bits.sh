#!/usr/bin/env bash
# resize-right 0.0.2 and the imresize in pyiqa 0.1.15, both said to give MATLAB's results, against a pixel that MATLAB wrote.
#
# MATLAB's imresize works along one axis after the other, and for uint8 images the result of the first pass is rounded and
# clipped to 8 bits before the second. The Python ports compute both in floating point and leave one rounding to the
# caller. At saturated edges, where the kernel overshoots and is clipped, that is several levels; over Set5 every tenth
# pixel of the LR images differs from the files MATLAB wrote. So LR images made in Python are not the ones that published
# networks were trained and measured on. hpcdistill rounds between the passes (rule `newer`, hpcdistill/ops/downsampling.py).
#
# The patch is one channel of a part of Set5's butterfly; MATLAB's pixel is from the x2 LR file of SRFBN's repository
# (2018). No border is within the kernel's reach of it, so that border rules play no part.
#
# Seen with numpy 2.3.5 and torch 2.13.0 on Linux:
#   MATLAB 22; resize-right 19.70; pyiqa 19.70; rounded to 8 bits between the passes: 22
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 resize-right==0.0.2
# One file of pyiqa is needed; its dependencies are not.
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$folder" pyiqa==0.1.15
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import zipfile

import numpy as np
import torch
from resize_right import resize_right

zipfile.ZipFile("pyiqa-0.1.15-py3-none-any.whl").extract("pyiqa/matlab_utils/resize.py")
spec = importlib.util.spec_from_file_location("resize", "pyiqa/matlab_utils/resize.py")
pyiqa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pyiqa)

PATCH = np.array([
    [108, 35, 0, 48, 88, 71, 74, 70, 69, 69], [170, 94, 2, 21, 89, 80, 77, 76, 75, 73],
    [163, 141, 34, 10, 49, 79, 77, 77, 76, 73], [145, 151, 60, 12, 12, 79, 83, 68, 71, 80],
    [116, 157, 119, 35, 0, 42, 90, 69, 74, 78], [101, 139, 158, 73, 0, 25, 87, 74, 81, 65],
    [74, 101, 163, 146, 27, 9, 53, 80, 76, 59], [32, 78, 130, 170, 106, 11, 14, 90, 84, 70],
    [21, 36, 102, 160, 141, 34, 0, 48, 81, 69], [45, 17, 90, 162, 170, 79, 0, 5, 74, 83],
])
MATLAB = 22


def shrink(columns):
    """Half as many rows by Keys' kernel (a = -0.5) at twice its width; zeros beyond the ends."""
    taps = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    padded = np.pad(columns, ((3, 3), (0, 0)))
    return np.stack([taps @ padded[2 * i : 2 * i + 8] for i in range(len(columns) // 2)])


def eight_bits(values):
    return np.floor(np.clip(values, 0, 255) + 0.5)


image = PATCH.astype(np.float64)
found = {
    "resize-right": float(resize_right.resize(image, scale_factors=0.5)[2, 2]),
    "pyiqa": float(pyiqa.imresize(torch.from_numpy(image)[None, None], scale=0.5, kernel="cubic", antialiasing=True)[0, 0, 2, 2]),
    "one rounding": float(eight_bits(shrink(shrink(PATCH).T).T)[2, 2]),
    "rounded between": float(eight_bits(shrink(eight_bits(shrink(PATCH)).T).T)[2, 2]),
}
print(f"MATLAB: {MATLAB};", "; ".join(f"{name}: {value:.2f}" for name, value in found.items()))
assert found["rounded between"] == MATLAB
for port in ("resize-right", "pyiqa"):
    assert round(found[port]) == found["one rounding"] == 20, f"{port} gives another pixel now"
PY
