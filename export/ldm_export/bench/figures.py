"""Statistics of repeated timings: median, spread and ratios of alternating runs; and a description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Timing", "machine", "speedup", "versions"]

TOOLS = ("ldm-export", "numpy", "onnxruntime", "openvino", "tensorrt-rtx")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over several runs: median, quartiles, minimum and maximum."""

    median: float
    low: float
    high: float
    least: float
    most: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Compute the statistics of at least one run."""
        low, median, high = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return cls(median, low, high, min(seconds), max(seconds), tuple(seconds))

    @property
    def spread(self) -> float:
        """The distance between the quartiles, divided by the median."""
        return (self.high - self.low) / self.median

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able description."""
        return {**asdict(self), "runs": list(self.runs), "spread": self.spread}


def speedup(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return the speed relative to a reference: the median over rounds of the ratio of both times in a round."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))


def machine() -> dict[str, Any]:
    """Return the processor's name, its relevant vector and matrix extensions, usable cores and memory in bytes."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
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
    """Return the versions of those packages that are installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
