"""``ldm-export doctor`` says what a machine has and what is missing; without a verb the command prints its help."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from ldm_export.bench.figures import machine
from ldm_export.cli import VERBS, main, verb_name
from ldm_runtime.installation import install_command
from tests.support.small_bundle import write_small_bundle

THIN = Path(__file__).parents[2] / ".venv-thin/bin/ldm-export"


def test_everything_is_installed_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small_bundle(tmp_path / "bundle")
    assert main(["doctor", str(tmp_path / "bundle"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"] == machine()
    parts = {part["extra"]: part for part in facts["parts"]}
    assert all(parts[extra]["complete"] for extra in ("onnxruntime", "openvino", "export", "serve", "client"))
    assert parts["export"]["versions"]["torch"] == version("torch")
    assert parts["gpu"] | {"versions": {}} == {
        "purpose": "ONNX Runtime on NVIDIA GPUs",
        "extra": "gpu",
        "complete": False,
        "versions": {},
        "install": install_command("gpu"),
    }
    assert facts["bundle"]["backend"] in ("openvino", "onnxruntime") and facts["bundle"]["reason"]


def test_an_inference_server_is_told_how_to_install_the_rest() -> None:
    done = subprocess.run([THIN, "doctor"], capture_output=True, text=True, timeout=60, env={"COLUMNS": "160"})
    assert done.returncode == 0 and done.stderr == ""
    for line in (r'not installed: pip install "\S+\.whl\[export\]"', r"\.whl\[openvino\]", r"onnxruntime 1\."):
        assert re.search(line, done.stdout)


def test_without_a_verb_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "ldm-export serve bundle" in out
    for verb in VERBS:
        assert re.search(rf"^    {verb_name(verb)}\b", out, re.MULTILINE)
