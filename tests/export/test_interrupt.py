"""Control-C: exit code 130 and one line, whenever it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

RUN = "import sys; from ldm_export.entry import main; print('begun', flush=True); sys.exit(main())"


def interrupted(delay: float, code: str = RUN, wait: bool = True) -> tuple[int, str]:
    """Exit code and standard error of a command that is interrupted ``delay`` seconds after it has begun."""
    command = [sys.executable, "-c", code, "inspect", "/nowhere"]
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # even below a shell's `&`
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    if wait:
        assert process.stdout.readline() == "begun\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("delay", [0.002, 0.03, 0.1, 0.2, 0.35])
def test_during_imports(delay: float) -> None:
    code, error = interrupted(delay)
    finished = code == 1 and error.startswith("ldm-export: error: /nowhere: no such folder") and error.count("\n") == 1
    assert finished or (code, error) == (130, "ldm-export: interrupted\n")


@pytest.mark.parametrize("where", ["a command", "a destructor"])
def test_later(where: str) -> None:
    bodies = {
        "a command": "import time\ndef run(_): print('begun', flush=True); time.sleep(60)",
        "a destructor": """
import time
class Slow:
    def __del__(self):
        print('begun', flush=True); time.sleep(60)
def run(_=None):
    Slow()
    time.sleep(60)""",
    }
    code = f"{bodies[where]}\nimport sys, ldm_export.cli\nldm_export.cli.main = lambda: run(None)\n"
    assert interrupted(0.05, code + RUN.replace("print('begun', flush=True); ", "")) == (
        130,
        "ldm-export: interrupted\n",
    )


def test_after_the_command_is_done_it_is_ignored() -> None:
    code = """
import atexit, sys, time, ldm_export.cli
def last(): print('begun', flush=True); time.sleep(0.5)
atexit.register(last)
ldm_export.cli.main = lambda: 0
"""
    assert interrupted(0.05, code + RUN.replace("print('begun', flush=True); ", "")) == (0, "")


def test_a_command_that_must_not_be_interrupted_is_not() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + RUN
    assert interrupted(0, code)[0] == 1


def test_the_installed_command_uses_it() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"ldm-export": "ldm_export.entry:main"}
