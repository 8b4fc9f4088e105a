"""A shared library with the functions of NVIDIA's driver that the runtime calls, compiled from C."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["compile_driver"]

SOURCE = """
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return ordinal < COUNT ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int kind, int device) {
    if (device != 7) return 101;
    *value = kind == 75 ? MAJOR : kind == 76 ? MINOR : -1;
    return ATTRIBUTE;
}
int cuGetErrorName(int error, const char **name) { *name = error == 804 ? "CUDA_ERROR_X" : 0; return 0; }
"""


def compile_driver(
    folder: Path, capability: str = "9.0", *, version: int = 13000, count: int = 1, init: int = 0, attribute: int = 0
) -> Path:
    """Write ``libcuda.so.1`` into a folder and return its path.

    Args:
        folder: An existing folder; with it in ``LD_LIBRARY_PATH`` a new process loads this driver.
        capability: Compute capability of its GPUs.
        version: CUDA version as the driver numbers it: 1000 × major + 10 × minor.
        count: Number of GPUs.
        init, attribute: What ``cuInit`` and ``cuDeviceGetAttribute`` return; 0 for success.
    """
    major, minor = capability.split(".")
    values = {"INIT": init, "VERSION": version, "COUNT": count, "MAJOR": major, "MINOR": minor, "ATTRIBUTE": attribute}
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    defines = [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run(["cc", "-shared", "-fPIC", *defines, "-o", library, source], check=True)
    return library
