"""The pages on serving: every example is run against a real server, and every name they tell is one that exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_export.cli import main
from ldm_runtime.triton.tensors import input_fields, output_fields
from tests.support.dockerfile import ROOT, stages
from tests.support.numpy_model import description
from tests.support.triton_server import TritonServer

PAGE, EXAMPLES = ((ROOT / "docs" / "guides" / name).read_text() for name in ("triton.md", "triton-requests.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", EXAMPLES, re.MULTILINE | re.DOTALL)
PROMPT = "a large red circle in the center on a white background"


def test_every_example_of_the_page_works(triton_server: TritonServer, shapes_bundle: Path, tmp_path: Path) -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"} and len(BLOCKS) > 8
    ports = {"8000": triton_server.http, "8001": triton_server.grpc, "8002": triton_server.metrics}
    for language, block in BLOCKS:
        for port, address in ports.items():
            block = block.replace(f"localhost:{port}", address)
        assert "localhost" not in block
        command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "timeout": 300}
        done = subprocess.run([*command, block], capture_output=True, text=True, **settings)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    options = ["--seed", "42", "--steps", "20", "--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
    assert main(["generate", str(shapes_bundle), PROMPT, *options, "-o", str(tmp_path / "here.png")]) == 0
    expected = np.asarray(Image.open(tmp_path / "here.png")).astype(int)
    for name in ("circle.png", "steps.png", "curl.png", "python.png"):
        first_image = np.asarray(Image.open(tmp_path / name)).astype(int)
        assert np.abs(first_image - expected).max() <= 1, name
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "steps-10.png")), expected)
    assert {f"grid-{index}.png" for index in range(4)} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "events.txt").read_text().count('"STEP":') == 5


def test_every_name_is_one_that_the_server_has() -> None:
    output = set(re.findall(r"`(\w+)`", PAGE))
    for model in (description(), description(text=False)):
        fields = (*input_fields(model, stream=True), *output_fields(model, stream=True))
        assert {field.name for field in fields} <= output
    files = re.findall(r"docker/[\w./-]*[\w/]", PAGE)
    assert files and all((ROOT / file).exists() for file in files)


def test_the_versions_are_those_of_the_image() -> None:
    image = stages()["serve"].image.partition("@")[0]
    assert image in PAGE and f"| {image.split(':')[1].removesuffix('-py3')} |" in PAGE
    extras = re.findall(r"EXTRA=([\w-]+)", PAGE)
    parsed = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"\n{extra} = [" in parsed for extra in extras)
