"""Advice in the errors of engines that do not run on this machine: commands that build engines for its GPU."""

from __future__ import annotations

from collections.abc import Sequence

from ldm_runtime.backends.driver import Gpu
from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.errors import BackendError
from ldm_runtime.installation import install_command

__all__ = ["HALF_ONLY", "RTX_CAPABILITIES", "build_command", "other_gpu", "rebuild_command", "rtx_refusal"]

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities for which TensorRT for RTX builds engines. Hopper (9.0) is not among them."""
HALF_ONLY = ("7.5",)
"""Compute capabilities for which TensorRT for RTX has no fp32 matrix product."""
_HALF = ("fp16", "bf16")


def rtx_refusal(capability: str, precision: str | None) -> str | None:
    """Return why TensorRT for RTX builds no engines for a GPU, in a few words; None if it does.

    Args:
        capability: E.g. "9.0".
        precision: Precision of the graph. None means a graph without matrix products, which every GPU runs.
    """
    if capability not in RTX_CAPABILITIES:
        return f"TensorRT for RTX does not support {capability}"
    if capability in HALF_ONLY and precision not in (None, *_HALF):  # an int8 graph leaves other work in fp32
        return f"TensorRT for RTX has no fp32 matrix product for {capability}"
    return None


def build_command(precision: str, gpu: Gpu | str) -> str:
    """Return the command that builds engines for a GPU; without a GPU, with a placeholder for its capability."""
    capability = "…" if isinstance(gpu, str) else gpu.capability
    if isinstance(gpu, str) or rtx_refusal(capability, precision) is None:
        target = f"tensorrt-rtx --compute-capability {capability}"
    else:
        target = "tensorrt"
    return f"`ldm-export build --precision {precision} --target {target}`"


def rebuild_command(engine: EngineFacts) -> str:
    """Return the command that rebuilds an engine for its GPUs. TensorRT always builds for the GPU of the machine."""
    capabilities = "" if engine.package == "tensorrt" else ",".join(engine.compute_capabilities)
    option = f" --compute-capability {capabilities}" if capabilities else ""
    option += " --version-compatible" if engine.version_compatible else ""
    where = " on this machine" if engine.package == "tensorrt" else ""
    return f"rebuild{where} with `ldm-export build --precision {engine.precision} --target {engine.package}{option}`"


def other_gpu(component: str, engines: Sequence[EngineFacts], gpu: Gpu) -> BackendError:
    """Return the error for engines that were built for other GPUs than the one of this machine.

    Args:
        component: Name of the component.
        engines: Its engines, at least one.
        gpu: The GPU of this machine.
    """
    known = list(dict.fromkeys(one for engine in engines for one in engine.compute_capabilities))
    what = (
        f"{component}: its engines are for compute capability {', '.join(known) or 'none (not recorded)'}, this GPU "
        f"has {gpu.capability}"
    )
    precision = engines[0].precision
    if engines[0].package == "tensorrt-rtx" and (refusal := rtx_refusal(gpu.capability, precision)):
        here = build_command(precision, gpu)
        graphs = f"--backend onnxruntime with `{install_command('gpu')}`"
        return BackendError(f"{what}; {refusal}: use {graphs}, or build plans of TensorRT on this machine with {here}")
    if engines[0].package == "tensorrt-rtx":
        return BackendError(f"{what}; rebuild with {build_command(precision, gpu)}")
    return BackendError(f"{what}; {rebuild_command(engines[0])}")
