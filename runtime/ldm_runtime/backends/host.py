"""The host: usable CPU cores (affinity capped by the cgroup CPU quota), and imports of optional engine packages."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType

from ldm_runtime.errors import BackendError, interrupted

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """At least 1: the cores of the process's affinity, or fewer where a container's CPU quota is smaller.

    A container started with ``--cpus 2`` sees all cores of its machine; a thread for each would wait for the others.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time per period, of control groups version 2 or 1; infinity where there is no limit."""
    try:
        if (both := cgroup / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # no such files, or "max"
        return math.inf


def import_engine(module: str, install: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its name, as imported.
        install: what to type where it is missing, e.g. ``pip install "ldm-export[onnxruntime]"``.

    Raises:
        BackendError: not installed, or its libraries cannot be loaded on this machine.
        KeyboardInterrupt: came while it was loaded; compiled modules turn one into an ``ImportError``.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if interrupted(error):
            raise KeyboardInterrupt from None
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or " "):
            raise BackendError(f"{module} is not installed; `{install}`") from None
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BackendError(f"{module} cannot be loaded: {reason:.300}; install it again: `{install}`") from None
