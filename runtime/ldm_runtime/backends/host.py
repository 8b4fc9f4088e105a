"""The host: usable CPU cores, and optional engine packages with their error messages."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType

from ldm_runtime.errors import BackendError, interrupted
from ldm_runtime.installation import install_command
from ldm_runtime.telemetry import hidden_reporter, quieten_engine

__all__ = ["first_line", "import_engine", "is_installed", "usable_cores"]

CGROUP = Path("/sys/fs/cgroup")
_ENGINE_NOISE = ("Exception from", "Check '")
"""Beginnings of lines that name a place in an engine's C++ code."""


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Return the number of usable CPU cores: the process affinity, capped by the CPU quota of the control group.

    A container started with ``--cpus 2`` sees all cores of its machine, but threads beyond two would only wait.

    Args:
        cgroup: Folder where the control group file system is mounted.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """CPU time per period in cores, from control groups version 2 or 1; infinity if there is no limit."""
    try:
        if (version2 := cgroup / "cpu.max").is_file():
            quota, period = version2.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # the files are missing, or the quota is "max"
        return math.inf


def is_installed(module: str) -> bool:
    """True if a top-level module can be imported. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec
        return True


def import_engine(module: str, extra: str) -> ModuleType:
    """Import an optional package. It sends no reports to its vendor, see ``telemetry``.

    Args:
        module: Name of the module.
        extra: Extra of ldm-export that installs it, e.g. "onnxruntime".

    Raises:
        BackendError: The package is not installed, or its libraries cannot be loaded on this machine.
        KeyboardInterrupt: The user interrupted the import. Compiled modules turn an interrupt into an ``ImportError``.
    """
    try:
        with hidden_reporter():
            imported = importlib.import_module(module)
        quieten_engine(imported)
        return imported
    except (ImportError, OSError, RuntimeError) as error:
        if interrupted(error):
            raise KeyboardInterrupt from None
        install = f"`{install_command(extra)}`"
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or " "):
            raise BackendError(f"{module} is not installed; {install}") from None
        raise BackendError(f"{module} cannot be loaded: {first_line(error)}; install it again: {install}") from None


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error that says what is wrong, at most ``most`` characters of it.

    Empty lines and lines that name a place in the engine's C++ code are skipped.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    messages = [line for line in lines if line and not line.startswith(_ENGINE_NOISE)]
    return (messages or [line for line in lines if line] or [type(error).__name__])[0][:most]
