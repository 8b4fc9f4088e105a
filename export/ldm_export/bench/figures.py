"""What repeated timings say: median, spread, and ratios of runs made side by side; and on what machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TOOLS = ("ldm-export", "numpy", "onnxruntime", "openvino", "tensorrt-rtx")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over several runs: median, quartiles, least and most."""

    median: float
    low: float
    high: float
    least: float
    most: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From at least one run."""
        low, median, high = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return cls(median, low, high, min(seconds), max(seconds), tuple(seconds))

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "runs": list(self.runs), "spread": self.spread}


def speedup(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast as the reference: the median over the rounds, in each of which both ran."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))


def machine() -> dict[str, Any]:
    """The processor's name, its vector and matrix extensions that matter here, usable cores, and memory in bytes."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in told.splitlines())}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "extensions": [name for name in known if name in lines.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def versions(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """Those of ``names`` that are installed here, with their versions."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
