"""The runtime's tests that need NumPy alone are collected and pass where torch and the engines are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    """With few examples of each property; all are tried where torch is installed."""
    done = run_pytest("--hypothesis-profile", "few", *(f"tests/runtime/{name}.py" for name in MODULES))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_the_packages_are_hidden(tmp_path: Path) -> None:
    packages = ("torch", "onnxruntime", "ldm_export")
    tests = [f"def test_{package}():\n    import {package}\n" for package in packages]
    (tmp_path / "test_it.py").write_text("\n".join(tests))
    done = run_pytest("--rootdir", ROOT, "-c", ROOT / "pyproject.toml", tmp_path / "test_it.py")
    assert done.returncode == 1 and " passed" not in done.stdout
    for package in packages:
        assert f"No module named '{package}' (hidden by the test)" in done.stdout, done.stdout
