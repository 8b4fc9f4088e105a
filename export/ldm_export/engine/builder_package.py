"""The two packages that build engines, ``tensorrt_rtx`` and ``tensorrt``: one programming interface, other targets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from ldm_export.engine.request import EngineRequest
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.errors import BackendError, BuildError

PACKAGES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Target → module."""
HALF_ONLY = ("7.5",)
"""Compute capabilities for which TensorRT for RTX has no fp32 matrix product."""


def open_package(target: str) -> ModuleType:
    """Import the package of a target.

    Raises:
        BuildError: unknown target, not installed, or its libraries cannot be loaded.
    """
    if target not in PACKAGES:
        raise BuildError(f"target: got {target!r:.40}, expected one of {', '.join(PACKAGES)}")
    try:
        return importlib.import_module(PACKAGES[target])
    except ModuleNotFoundError:
        raise BuildError(f'{PACKAGES[target]} is not installed; `pip install "ldm-export[{target}]"`') from None
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(
            f"{PACKAGES[target]}: its libraries cannot be loaded ({reason:.200}); install them, or build "
            "with --target tensorrt-rtx"
        ) from None


def known_capabilities(package: ModuleType) -> dict[str, object]:
    """Compute capability, e.g. "8.9" → the package's name for it; empty where engines are for the GPU at hand only."""
    kinds = getattr(package, "ComputeCapability", None)
    names = [name for name in dir(kinds) if name.startswith("SM") and name[2:].isdigit()] if kinds else []
    found = {f"{name[2:-1]}.{name[-1]}": getattr(kinds, name) for name in names}
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def check_capabilities(package: ModuleType, capabilities: Sequence[str], precision: str) -> None:
    """Refuse compute capabilities that the builder does not know, or would refuse after minutes.

    Raises:
        BuildError: no capability where one is needed, an unknown one, or fp32 for one that has half precision only.
    """
    known = known_capabilities(package)
    if not known:
        if capabilities:
            raise BuildError(
                f"{package.__name__} builds for the GPU at hand only; leave --compute-capability out, or build with "
                "--target tensorrt-rtx"
            )
        return
    if not capabilities:
        raise BuildError(f"compute capability: got none, expected some of {', '.join(known)}")
    for given in capabilities:
        if given not in known:
            raise BuildError(
                f"compute capability: got {given!r:.20}, expected some of {', '.join(known)} "
                f"({package.__name__} {package.__version__})"
            )
        if given in HALF_ONLY and precision in ("fp32", "int8"):  # what is not int8 is fp32
            raise BuildError(f"compute capability {given} has no fp32 matrix product here; use --precision fp16")


def check_request(package: ModuleType, request: EngineRequest, precision: str, matrix: bool = True) -> None:
    """Refuse, before anything is built, what the builder would refuse after minutes.

    Args:
        matrix: False for a graph without matrix work, which every GPU takes in fp32.

    Raises:
        BuildError: as ``check_capabilities``; refittable engines where no GPU is there, on which the builder compiles a
            part of them; a file of timings where nothing is timed.
    """
    check_capabilities(package, request.compute_capabilities, precision if matrix else "fp16")
    if request.refittable:
        try:
            Cuda()
        except BackendError as error:
            raise BuildError(
                f"refittable: {package.__name__} needs a GPU to build engines whose weights can be exchanged "
                f"({str(error).partition(';')[0]}); leave --refittable out, or build on a machine with one"
            ) from None
    if request.timings is not None and known_capabilities(package):
        raise BuildError(
            f"timing cache: {package.__name__} times no kernels while it builds; leave --timing-cache out, it is for "
            "--target tensorrt"
        )
