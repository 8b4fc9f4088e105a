"""The scripts that measure on a GPU: what they say where there is none, what they prepare, and the loop on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CUDA_VARIANT, weights_file
from ldm_runtime.errors import BackendError

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    try:
        Cuda()
    except BackendError:
        done = run("run", tmp_path, "--json", tmp_path / "gpu.json")
        assert done.returncode == 1 and not done.stdout and not (tmp_path / "gpu.json").exists()
        assert done.stderr.startswith("gpu.py: error: no CUDA GPU can be used (") and done.stderr.count("\n") == 1
    else:
        pytest.skip("there is a GPU")


def test_random_weights_replace_those_that_were_left_behind(
    cuda_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from gpu_bundle import copy_without_weights, fill_with_random_weights

    copy_without_weights(cuda_bundle, tmp_path / "copy")
    graph = f"unet/fp16.{CUDA_VARIANT}.onnx"
    assert not (tmp_path / "copy" / weights_file(graph)).exists()
    fill_with_random_weights(tmp_path / "copy")
    filled = Bundle.open(tmp_path / "copy")
    filled.verified_graph("unet", "fp16", CUDA_VARIANT)
    kernel = next(
        value
        for value in onnx.load(tmp_path / "copy" / graph).graph.initializer
        if value.name.endswith("conv_in.weight/nhwc/float16")
    )
    assert 0.05 < onnx.numpy_helper.to_array(kernel).std() < 0.5


def test_the_loop_is_compared_and_timed(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--precisions", "fp32", "--images", "1", "--steps", "11", "--rounds", "1", "--device", "cpu")
    script = Path(__file__).parents[2] / "benchmarks/gpu_loop.py"
    command = [sys.executable, str(script), str(tiny_bundle), *options, "--json", str(tmp_path / "loop.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "loop.json").read_text())
    assert figures["latents_difference"] < 1e-4 and figures["unet_mode"] == "CPU"
    assert all(figures[name] > 0 for name in ("loop_ms", "image_ms", "unet_free_ms", "unet_plain_ms"))
    assert figures["loop_ms"] < figures["image_ms"]
