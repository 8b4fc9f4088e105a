"""Sessions of the calibration free each tensor as early as possible, also where nodes only observe tensors."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
from pathlib import Path
import numpy as np
import onnx_ir as ir
from ldm_calibration.probes import add_shapes
from ldm_calibration.sessions import Session

value = source = ir.Value(name="x", shape=ir.Shape(["size"]), type=ir.TensorType(ir.DataType.FLOAT))
nodes = []
for index in range(60):
    node = ir.node("Add", [value, source], name=f"add.{index}")
    value = node.outputs[0]
    value.name, value.shape, value.type = f"sum.{index}", source.shape, source.type
    nodes.append(node)
graph = ir.Graph([source], [value], nodes=nodes, name="sums", opset_imports={"": 20})
model = ir.Model(graph, ir_version=10)
shapes = add_shapes(model, [node.outputs[0].name for node in nodes[:-1]])
session = Session(model, Path())
feed = {"x": np.zeros(4_000_000, np.float32)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outputs = session.run(feed, list(shapes))
assert all(array.tolist() == [4_000_000] for array in outputs.values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_observed_tensors_are_freed() -> None:
    """60 tensors of 16 MB are observed one after the other; a few of them are in memory at once."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 16_000_000
