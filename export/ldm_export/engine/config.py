"""What a builder is told beside the network: GPUs, shapes, memory, whether weights can be exchanged, known timings."""

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

WORKSPACE = 0.9
"""Share of the GPU's free memory that the builder may use for trying kernels and the engine for scratch."""
MAX_TIMINGS = 256 * 2**20
"""Most bytes of a file of timings."""


def choose_capabilities(package: ModuleType, config: Any, capabilities: Sequence[str]) -> None:
    """Name the GPUs to build for."""
    if capabilities:
        known = known_capabilities(package)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(known[capability], index)


def limit_memory(package: ModuleType, config: Any) -> int | None:
    """Limit the workspace to what is free on the GPU; returns the bytes, None where no GPU is there to measure."""
    try:
        free, _ = Cuda().call("cudaMemGetInfo")
    except BackendError:
        return None
    config.set_memory_pool_limit(package.MemoryPoolType.WORKSPACE, int(free * WORKSPACE))
    return int(free * WORKSPACE)


def add_profiles(builder: Any, config: Any, shapes: Sequence[Profile]) -> Profile | None:
    """One optimization profile for each; returns the first that the builder refuses."""
    for bounds in shapes:
        one = builder.create_optimization_profile()
        for name, (low, best, high) in bounds.items():
            one.set_shape(name, low, best, high)
        if config.add_optimization_profile(one) < 0:
            return bounds
    return None


def load_timings(config: Any, file: Path) -> Any:
    """Give the builder the timings of earlier builds, or none at first; those of another GPU or version are left out.

    Raises:
        BuildError: the file cannot be read, or is none.
    """
    try:
        known = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise BuildError(f"{file}: cannot be read ({error.strerror}); choose another --timing-cache") from None
    if len(known) > MAX_TIMINGS:
        raise BuildError(f"{file}: got {len(known)} bytes, expected at most {MAX_TIMINGS}; choose another")
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise BuildError("the builder takes no timing cache; leave --timing-cache out")
    return cache


def save_timings(cache: Any, file: Path) -> None:
    """Write the timings for the next build.

    Raises:
        BuildError: the disk refuses.
    """
    try:
        write_whole(file, bytes(cache.serialize()))
    except OSError as error:
        raise BuildError(f"{file}: cannot be written ({error.strerror}); choose another --timing-cache") from None
