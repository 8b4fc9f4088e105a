"""The NVIDIA driver: whether it has a GPU that CUDA can use, which one, and which CUDA version it supports."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

from ldm_runtime.errors import BackendError
from ldm_runtime.once import once

__all__ = ["LIBRARY", "Gpu", "check_driver", "installed_gpu", "no_gpu", "query_driver"]

LIBRARY = "libcuda.so.1"
"""The driver's library, which every CUDA program on Linux loads."""
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA can use; every engine runs on this one.

    Attributes:
        capability: Compute capability, e.g. "8.9".
        cuda: (major, minor) of the newest CUDA version that the driver supports, e.g. (13, 0).
    """

    capability: str
    cuda: tuple[int, int]


def no_gpu(reason: str) -> BackendError:
    """Return the error for an engine that needs a GPU on a machine without one."""
    return BackendError(
        f"no CUDA GPU can be used ({reason}); engines need one. Without, run the graphs: --backend onnxruntime"
    )


@once
def installed_gpu() -> Gpu | str:
    """Return the GPU of this machine, or a phrase that says why there is none. The result is cached for the process.

    This initialises CUDA in the process, so a process that uses CUDA must not be forked afterwards; start a new one.
    """
    try:
        return query_driver()
    except BackendError as error:
        return str(error)


def check_driver(gpu: Gpu, package: str, needed: str) -> None:
    """Check that the driver supports the CUDA version of a package. A driver for CUDA 13.0 supports every 13.x.

    Args:
        gpu: The GPU as the driver describes it.
        package: Name of the package, for the message.
        needed: CUDA version that the package was built with, e.g. "13.0" or "13"; "" if unknown.

    Raises:
        BackendError: The driver is too old.
    """
    major = re.match(r"\d+", needed)
    if major and gpu.cuda[0] < int(major[0]):
        supported = ".".join(map(str, gpu.cuda))
        raise BackendError(
            f"the NVIDIA driver supports CUDA {supported}, {package} needs {needed}; update the driver, or install "
            f"{package} for CUDA {gpu.cuda[0]}"
        )


def query_driver(library: str = LIBRARY) -> Gpu:
    """Query the driver for its first GPU. Device files are not enough: they exist without a GPU or a usable driver.

    Args:
        library: Name or path of the driver's library.

    Raises:
        BackendError: There is no driver, the file is not a driver, or the driver has no GPU that can be used.
    """
    try:
        driver = ctypes.CDLL(library)
        status = driver.cuInit(0)
        if status == _NO_DEVICE:
            raise BackendError("the NVIDIA driver finds no GPU")
        if status:
            raise BackendError(f"the NVIDIA driver cannot start: CUDA error {status} ({_name(driver, status)})")
        version = _number(driver, "cuDriverGetVersion")
        if not _number(driver, "cuDeviceGetCount"):
            raise BackendError("the NVIDIA driver finds no GPU")
        device = _number(driver, "cuDeviceGet", 0)
        numbers = [_number(driver, "cuDeviceGetAttribute", kind, device) for kind in (_MAJOR, _MINOR)]
    except (OSError, AttributeError) as error:  # the library is missing, or lacks a function
        raise BackendError(f"no NVIDIA driver is installed ({error})") from None
    return Gpu(f"{numbers[0]}.{numbers[1]}", (version // 1000, version % 1000 // 10))


def _number(driver: ctypes.CDLL, function: str, *arguments: int) -> int:
    """Call a function that writes one number to its first argument."""
    number = ctypes.c_int()
    if status := getattr(driver, function)(ctypes.byref(number), *map(ctypes.c_int, arguments)):
        raise BackendError(f"{function}: CUDA error {status} ({_name(driver, status)})")
    return number.value


def _name(driver: ctypes.CDLL, status: int) -> str:
    """Return the driver's name of an error, e.g. "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"."""
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"unknown").decode(errors="replace")
