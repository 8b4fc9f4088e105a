"""The runtime's tests that need NumPy alone are collected and pass where torch and the engines are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = (
    "test_batch",
    "test_batch_scheduler",
    "test_batch_scheduler_health",
    "test_batch_scheduler_queue",
    "test_batch_scheduler_refusals",
    "test_engine_facts",
    "test_host",
    "test_manifest",
    "test_page_release",
    "test_quality",
    "test_response_files",
    "test_spec_json",
    "test_specs",
)


def run_pytest(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own in which torch, the engines and the exporter cannot be imported."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.import_blocker", "-p", "no:cacheprovider", "-q"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_modules_that_need_numpy_alone_pass() -> None:
    done = run_pytest(*(f"tests/runtime/{name}.py" for name in MODULES))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("package", ["torch", "onnxruntime", "ldm_export"])
def test_the_packages_are_hidden(package: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    import {package}\n")
    done = run_pytest("--rootdir", ROOT, "-c", ROOT / "pyproject.toml", tmp_path / "test_it.py")
    assert done.returncode == 1 and f"No module named '{package}' (hidden by the test)" in done.stdout, done.stdout
