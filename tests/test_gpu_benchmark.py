"""The script that times a GPU: what it says where there is none, and that it runs, tried out on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.errors import BackendError

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_without_a_gpu_it_says_so_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    try:
        Cuda()
    except BackendError:
        done = run(tiny_bundle, "--json", tmp_path / "gpu.json")
        assert done.returncode == 1 and not done.stdout and not (tmp_path / "gpu.json").exists()
        assert done.stderr.startswith("gpu.py: error: no CUDA GPU can be used (") and done.stderr.count("\n") == 1
    else:
        pytest.skip("there is a GPU")


def test_it_writes_seconds_and_what_it_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--precision", "fp32", "--steps", "2", "--rounds", "1", "--device", "cpu", "--checkpoint", "none")
    done = run(tiny_bundle, *options, "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert set(facts["seconds"]) == {"onnxruntime"} and "no fp32 engine" in facts["left_out"]["tensorrt"]
    step, image = (facts["seconds"]["onnxruntime"][what]["median"] for what in ("step", "image"))
    assert 0 < step < image
    assert facts["floor"] is None and "reading the weights once" not in done.stdout


def test_the_loop_is_compared_and_timed(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--precisions", "fp32", "--images", "1", "--steps", "11", "--rounds", "1", "--device", "cpu")
    script = Path(__file__).parents[1] / "benchmarks/gpu_loop.py"
    command = [sys.executable, str(script), str(tiny_bundle), *options, "--json", str(tmp_path / "loop.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "loop.json").read_text())
    assert figures["latents_difference"] < 1e-4 and figures["unet_mode"] == "CPU"
    assert all(figures[name] > 0 for name in ("loop_ms", "image_ms", "unet_free_ms", "unet_plain_ms"))
    assert figures["loop_ms"] < figures["image_ms"]
