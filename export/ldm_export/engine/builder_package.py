"""The two packages that build engines, ``tensorrt_rtx`` and ``tensorrt``, which have the same interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

from ldm_export.engine.request import EngineRequest
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine_advice import rtx_refusal
from ldm_runtime.backends.engine_match import PACKAGES
from ldm_runtime.backends.host import import_engine
from ldm_runtime.errors import BackendError, BuildError
from ldm_runtime.installation import install_command

__all__ = ["check_capabilities", "check_request", "engine_capabilities", "known_capabilities", "open_package"]

_CAPABILITY = re.compile(r"\d{1,2}\.\d")


def open_package(target: str) -> ModuleType:
    """Import the package of a target.

    Raises:
        BuildError: The target is unknown, or its package is not installed or cannot be loaded.
    """
    if target not in PACKAGES:
        raise BuildError(f"target: got {target!r:.40}, expected one of {', '.join(PACKAGES)}")
    try:
        return import_engine(PACKAGES[target], target)
    except BackendError as error:
        raise BuildError(str(error)) from None


def known_capabilities(package: ModuleType) -> dict[str, object]:
    """Compute capability, e.g. "8.9" -> the package's name for it; empty if it only builds for this machine's GPU."""
    kinds = getattr(package, "ComputeCapability", None)
    names = [name for name in dir(kinds) if name.startswith("SM") and name[2:].isdigit()] if kinds else []
    capabilities = {f"{name[2:-1]}.{name[-1]}": getattr(kinds, name) for name in names}
    return dict(sorted(capabilities.items(), key=lambda item: float(item[0])))


def engine_capabilities(request: EngineRequest) -> tuple[str, ...]:
    """Return the GPUs that an engine of a request runs on: the requested ones, or this machine's GPU.

    Raises:
        BuildError: The request names no GPU, and this machine has none.
    """
    if request.compute_capabilities:
        return request.compute_capabilities
    try:
        return (Cuda().capability(),)
    except BackendError as error:
        reason = str(error).partition(";")[0]
        raise BuildError(
            f"{request.target}: builds for the GPU at hand, but {reason}; build on a machine with one, or with "
            "--target tensorrt-rtx"
        ) from None


def check_capabilities(package: ModuleType, capabilities: Sequence[str], precision: str | None) -> None:
    """Check compute capabilities before the build: the builder would refuse unsupported ones only after minutes.

    Args:
        package: The builder's package.
        capabilities: E.g. ("8.6", "8.9").
        precision: Precision of the graph. None means a graph without matrix operations, which every GPU runs in fp32.

    Raises:
        BuildError: No capability is given where one is needed, one is unknown, or one has no fp32 matrix product.
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
    for capability in capabilities:
        if capability not in known:
            advice = _elsewhere(capability) if _CAPABILITY.fullmatch(capability) else ""
            raise BuildError(
                f"compute capability: got {capability!r:.20}, expected some of {', '.join(known)} "
                f"({package.__name__} {package.__version__}){advice}"
            )
        if refusal := rtx_refusal(capability, precision):
            raise BuildError(f"compute capability: {refusal}; use --precision fp16")


def check_request(package: ModuleType, request: EngineRequest, precision: str | None) -> None:
    """Check a request before the build: the builder would refuse an unsupported one only after minutes.

    Args:
        package: The builder's package.
        request: The request for engines.
        precision: See ``check_capabilities``.

    Raises:
        BuildError: As ``check_capabilities``; also for refittable engines without a GPU, which the builder needs to
            compile a part of them, and for a timing cache or version-compatible engines if the package does not support
            them.
    """
    check_capabilities(package, request.compute_capabilities, precision)
    if request.refittable:
        try:
            Cuda()
        except BackendError as error:
            raise BuildError(
                f"refittable: {package.__name__} needs a GPU to build engines whose weights can be exchanged "
                f"({str(error).partition(';')[0]}); leave --refittable out, or build on a machine with one"
            ) from None
    if request.version_compatible and known_capabilities(package):
        raise BuildError(
            f"version-compatible: engines of {package.__name__} run with the version that built them only; leave "
            "--version-compatible out, it is for --target tensorrt"
        )
    if request.timings is not None and known_capabilities(package):
        raise BuildError(
            f"timing cache: {package.__name__} times no kernels while it builds; leave --timing-cache out, it is for "
            "--target tensorrt"
        )


def _elsewhere(capability: str) -> str:
    """Advice for a GPU that TensorRT for RTX does not support."""
    return (
        f"; for a GPU of {capability} build with --target onnxruntime-cuda, which `{install_command('gpu')}` runs, "
        "or on such a GPU with --target tensorrt"
    )
