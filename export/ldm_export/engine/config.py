"""Configuration of a builder: GPUs, optimization profiles, memory and kernel timings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine.builder_package import known_capabilities
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.engine_facts import Profile
from ldm_runtime.errors import BackendError, BuildError

__all__ = ["add_profiles", "choose_capabilities", "limit_memory", "load_timings", "save_timings"]

WORKSPACE = 0.9
"""Share of the GPU's free memory that the builder may use to try kernels, and the engine as scratch memory."""
MAX_TIMINGS = 256 * 2**20
"""Maximum size of a timing cache in bytes."""


def choose_capabilities(package: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    """Set the GPUs to build for. None means the GPU of this machine."""
    if capabilities:
        known = known_capabilities(package)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(known[capability], index)


def limit_memory(package: ModuleType, config: Any) -> int | None:
    """Limit the workspace to a share of the GPU's free memory; return it in bytes, or None if there is no GPU."""
    try:
        free, _ = Cuda().call("cudaMemGetInfo")
    except BackendError:
        return None
    config.set_memory_pool_limit(package.MemoryPoolType.WORKSPACE, int(free * WORKSPACE))
    return int(free * WORKSPACE)


def add_profiles(builder: Any, config: Any, shapes: Sequence[Profile]) -> Profile | None:
    """Add an optimization profile for each entry; return the first one that the builder refuses, or None."""
    for bounds in shapes:
        one = builder.create_optimization_profile()
        for name, (low, best, high) in bounds.items():
            one.set_shape(name, low, best, high)
        if config.add_optimization_profile(one) < 0:
            return bounds
    return None


def load_timings(config: Any, file: Path) -> Any:
    """Load the timing cache of earlier builds. The builder ignores timings of another GPU or version.

    Returns:
        The timing cache, which is empty if the file does not exist yet.

    Raises:
        BuildError: The file cannot be read or is too large, or the builder has no timing cache.
    """
    try:
        content = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise BuildError(f"{file}: cannot be read ({error.strerror}); choose another --timing-cache") from None
    if len(content) > MAX_TIMINGS:
        raise BuildError(f"{file}: got {len(content)} bytes, expected at most {MAX_TIMINGS}; choose another")
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise BuildError("the builder takes no timing cache; leave --timing-cache out")
    return cache


def save_timings(cache: Any, file: Path) -> None:
    """Write the timing cache for the next build.

    Raises:
        BuildError: The file cannot be written.
    """
    try:
        write_whole(file, bytes(cache.serialize()))
    except OSError as error:
        raise BuildError(f"{file}: cannot be written ({error.strerror}); choose another --timing-cache") from None
