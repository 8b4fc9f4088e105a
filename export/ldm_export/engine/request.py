"""What engines are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm_export.engine.profiles import Bounds


@dataclass(frozen=True)
class EngineRequest:
    """For which package, GPUs and shapes engines are built.

    Attributes:
        target: "tensorrt-rtx" or "tensorrt".
        compute_capabilities: e.g. ("8.6", "8.9"); empty for "tensorrt", which builds for the GPU at hand.
        bounds: (name, min:opt:max) of "batch" in images and of "height" and "width" in pixels.
        refittable: keep what is needed to exchange the weights later without a rebuild; needs a GPU to build.
        timings: a file of kernel timings, kept from build to build; "tensorrt" only.
    """

    target: str
    compute_capabilities: tuple[str, ...] = ()
    bounds: tuple[tuple[str, Bounds], ...] = ()
    refittable: bool = False
    timings: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Short, for file names: ``tensorrt-rtx-8.6-8.9``."""
        return "-".join((self.target, *self.compute_capabilities))
