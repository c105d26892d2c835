#!/usr/bin/env bash
# onnxruntime joins a LeakyRelu with the convolution before it, but not a PRelu of one slope, which is the same function.
#
# FSRCNN, and most small super-resolution networks after it, have a PReLU behind each convolution. A PRelu with a single
# slope equals a LeakyRelu with it, so one would expect the optimiser to treat them alike. Behaviour of onnxruntime 1.32.0
# (CPU provider, all optimisations on): of Conv -> LeakyRelu one node is left (FusedConv), of Conv -> PRelu two are, and
# PRelu runs alone. For a network of 12,644 parameters (320x180 -> 1280x720, one thread) that was 44 ms against 20.
# Seen: "LeakyRelu ['FusedConv']", "PRelu ['Conv', 'PRelu']". What we do about it: hpcdistill/deploy/fast_form.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > joined.py <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

made, outputs = {}, []
image = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
for name in ("LeakyRelu", "PRelu"):
    weights = np.random.default_rng(1).standard_normal((8, 8, 3, 3)).astype(np.float32)
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.full((1, 1, 1), 0.25, np.float32), "s")]
    last = helper.make_node(name, ["c"] + (["s"] if name == "PRelu" else []), ["y"], **({} if name == "PRelu" else {"alpha": 0.25}))
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), last]
    x, y = (helper.make_tensor_value_info(t, TensorProto.FLOAT, [1, 8, "h", "w"]) for t in "xy")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants[: 2 if name == "PRelu" else 1]),
                              opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = f"{name}.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs.append(session.run(None, {"x": image})[0])
    made[name] = [node.op_type for node in onnx.load(f"{name}.onnx").graph.node]
    print(name, made[name])
assert np.abs(outputs[0] - outputs[1]).max() < 1e-5, "they are one function"
assert made == {"LeakyRelu": ["FusedConv"], "PRelu": ["Conv", "PRelu"]}, "onnxruntime does otherwise now: look at deploy/fast_form.py"
PY
"$folder/env/bin/python" joined.py
