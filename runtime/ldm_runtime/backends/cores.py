"""How many CPU threads are worth having: the cores this process may use, and no more than its container pays for."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
