"""What importing the runtime loads: few modules, no engine; a first image must not wait for what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COUNT = "import json, sys; before = set(sys.modules); import {}; print(json.dumps(sorted(set(sys.modules) - before)))"
LATER = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch", "onnx", "diffusers", "transformers"}
LATER |= {"cuda", "ldm_export.bundle.build", "asyncio", "multiprocessing", "matplotlib", "scipy", "pandas", "requests"}


@pytest.mark.parametrize(("name", "most"), [("ldm_runtime", 376), ("ldm_export.cli", 491)])
def test_an_import_is_small(name: str, most: int) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT.format(name)], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert not LATER & set(loaded)
    assert len(loaded) <= most, f"{name} loads {len(loaded)} modules"
