"""Optional packages: absent, broken, and interrupted while they are loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_export import cli
from ldm_export.engine.builder_package import open_package
from ldm_export.verbs import inspect
from ldm_runtime.backends.engine_match import PACKAGES
from ldm_runtime.backends.host import first_line, import_engine, is_installed
from ldm_runtime.errors import BackendError
from ldm_runtime.installation import install_command

EXTRA = "engine"
CAUSES = {
    "caused": "raise ImportError('initialization failed') from KeyboardInterrupt()",  # as compiled modules do
    "in turn": "try: raise KeyboardInterrupt\nexcept BaseException: raise ImportError('initialization failed')",
    "itself": "raise KeyboardInterrupt",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "ldm_test_engine.py"
    sys.modules.pop("ldm_test_engine", None)


def test_a_package_is_loaded(package: Path) -> None:
    package.write_text("works = True")
    assert import_engine("ldm_test_engine", EXTRA).works


def test_what_is_installed_is_known_without_an_import(package: Path) -> None:
    package.write_text("raise SystemExit")
    assert is_installed("ldm_test_engine") and not is_installed("ldm_test_absent")
    assert "ldm_test_engine" not in sys.modules


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no memory\nat address 5", "no memory"),
        ("\nException from src/a.cpp:5:\nCheck 'x' failed at b.cpp:6:\n  wrong shape\n", "wrong shape"),
        ("Exception from src/a.cpp:5:", "Exception from src/a.cpp:5:"),
        ("", "RuntimeError"),
        ("x" * 400, "x" * 300),
    ],
)
def test_the_line_of_an_error_that_says_what_is_wrong(message: str, line: str) -> None:
    assert first_line(RuntimeError(message)) == line


def test_an_absent_package_says_what_to_install() -> None:
    command = re.escape(install_command("engine"))
    with pytest.raises(BackendError, match=f"^ldm_test_engine is not installed; `{command}`$"):
        import_engine("ldm_test_engine", EXTRA)


@pytest.mark.parametrize("failure", ["OSError('libcuda.so.1: no such file')", "ImportError('libcuda.so.1')"])
def test_a_broken_package_says_what_is_wrong(package: Path, failure: str) -> None:
    package.write_text(f"raise {failure}")
    with pytest.raises(BackendError, match=r"^ldm_test_engine cannot be loaded: libcuda.*; install it again: `pip"):
        import_engine("ldm_test_engine", EXTRA)


def test_a_package_without_what_it_needs_is_broken_not_absent(package: Path) -> None:
    package.write_text("import ldm_test_needed")
    with pytest.raises(BackendError, match="cannot be loaded: No module named 'ldm_test_needed'"):
        import_engine("ldm_test_engine", EXTRA)


@pytest.mark.parametrize("code", CAUSES.values(), ids=CAUSES)
def test_an_interrupt_while_loading_stays_one(package: Path, code: str) -> None:
    package.write_text(code)
    with pytest.raises(KeyboardInterrupt):
        import_engine("ldm_test_engine", EXTRA)


@pytest.mark.parametrize("code", CAUSES.values(), ids=CAUSES)
def test_an_interrupt_while_loading_ends_the_command_in_one_line(
    package: Path, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package.write_text(code)
    monkeypatch.setattr(inspect, "run", lambda *_: __import__("ldm_test_engine"))
    assert cli.main(["inspect", "bundle"]) == 130
    assert capsys.readouterr() == ("", "ldm-export: interrupted\n")
    monkeypatch.setitem(PACKAGES, "tensorrt", "ldm_test_engine")  # whose loader has words of its own
    monkeypatch.setattr(inspect, "run", lambda *_: open_package("tensorrt"))
    assert cli.main(["inspect", "bundle"]) == 130
    assert capsys.readouterr() == ("", "ldm-export: interrupted\n")
