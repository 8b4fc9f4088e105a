"""Options for opening a bundle as a pipeline, and what the pipeline keeps of it beside the components."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from ldm_runtime.backends.engine import Choice, Engine
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import SpecError
from ldm_runtime.loras.sets import DEFAULT_SELECTIONS, LoraSets
from ldm_runtime.quality import QualityRecord

__all__ = ["NO_EXTRAS", "BundleOptions", "PipelineExtras", "with_defaults"]


class BundleOptions(TypedDict, total=False):
    """Keyword arguments of ``LatentDiffusionPipeline.from_bundle``, which describes them."""

    precision: str | None
    backend: str | Engine
    device: str
    threads: int | None
    cache: str | Path | None
    keep_loaded: bool
    safety_checker: bool
    lora_selections: int


DEFAULTS: BundleOptions = {
    "precision": None,
    "backend": "auto",
    "device": "auto",
    "threads": None,
    "cache": None,
    "keep_loaded": True,
    "safety_checker": True,
    "lora_selections": DEFAULT_SELECTIONS,
}


def with_defaults(options: BundleOptions) -> BundleOptions:
    """Return the options with all defaults.

    Raises:
        SpecError: One is unknown; the message names the closest option.
    """
    for name in options:
        if name not in DEFAULTS:
            close = get_close_matches(name, DEFAULTS, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(DEFAULTS)}"
            raise SpecError(f"{name[:60]}: is not an option of from_bundle; {hint}")
    return {**DEFAULTS, **options}


@dataclass(frozen=True)
class PipelineExtras:
    """What a pipeline has of a bundle beside its components. A pipeline that was not opened from one has none.

    Attributes:
        choice: The selected engine.
        loop: The denoising loop on a device; None runs it in NumPy.
        record: The measured settings, for ``Request.budget``.
        loras: The adapters that requests can select.
    """

    choice: Choice | None = None
    loop: DeviceLoop | None = None
    record: QualityRecord | None = None
    loras: LoraSets[Any] | None = None


NO_EXTRAS = PipelineExtras()
