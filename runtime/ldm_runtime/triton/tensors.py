"""Tensors and request parameters of the models `ldm` and `ldm_stream`: names, data types and dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS
from ldm_runtime.conditioning.safety_checker import SafetyChecker
from ldm_runtime.errors import SpecError
from ldm_runtime.model import DECODER, ModelDescription

__all__ = [
    "CANCEL",
    "CHECK",
    "FLAGGED",
    "ID",
    "KIND_FIELDS",
    "TensorField",
    "Tensors",
    "input_fields",
    "output_fields",
]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorField:
    """One tensor of a model's config: name, Triton data type, dimensions (-1: any size), and whether it is optional."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


IMAGES_PER_PROMPT = TensorField("IMAGES_PER_PROMPT", "TYPE_INT32")
GUIDANCE = TensorField("GUIDANCE", "TYPE_FP32")
KIND_FIELDS: Mapping[str, tuple[TensorField, ...]] = {
    "text": (
        TensorField("PROMPT", "TYPE_STRING", (-1,), optional=False),
        TensorField("NEGATIVE_PROMPT", "TYPE_STRING", (-1,)),
        IMAGES_PER_PROMPT,
        TensorField("CLIP_SKIP", "TYPE_INT32"),
        TensorField("PROMPT_CHUNKS", "TYPE_INT32"),
        TensorField("PROMPT_WEIGHTS", "TYPE_BOOL"),
    ),
    "label": (
        TensorField("LABEL", "TYPE_INT32", (-1,), optional=False),
        IMAGES_PER_PROMPT,
    ),
    "image": (
        TensorField("INPUT_IMAGE", "TYPE_UINT8", (-1, -1, -1, 3), optional=False),
        IMAGES_PER_PROMPT,
    ),
    "masked_image": (
        TensorField("INPUT_IMAGE", "TYPE_UINT8", (-1, -1, -1, 3), optional=False),
        TensorField("MASK", "TYPE_UINT8", (-1, -1, -1, 1), optional=False),
        IMAGES_PER_PROMPT,
    ),
    "start_image": (
        TensorField("INPUT_IMAGE", "TYPE_UINT8", (-1, -1, -1, 3)),
        TensorField("MASK", "TYPE_UINT8", (-1, -1, -1, 1)),
        TensorField("STRENGTH", "TYPE_FP32"),
        TensorField("PADDING_MASK_CROP", "TYPE_INT32"),
        TensorField("MASK_BLUR", "TYPE_FP32"),
    ),
    "segmentation": (
        TensorField("SEGMENTATION", "TYPE_INT32", (-1, -1, -1), optional=False),
        IMAGES_PER_PROMPT,
    ),
    "layout": (
        TensorField("TOKENS", "TYPE_INT32", (-1, -1)),
        TensorField("LAYOUT", "TYPE_STRING", (-1,)),
        IMAGES_PER_PROMPT,
    ),
    "second_text": (
        TensorField("PROMPT_2", "TYPE_STRING", (-1,)),
        TensorField("NEGATIVE_PROMPT_2", "TYPE_STRING", (-1,)),
    ),
    "micro_conditioning": tuple(TensorField(name, "TYPE_INT32", (2,)) for name in map(str.upper, MICRO_FIELDS)),
    "guidance_scale": (GUIDANCE,),
    SafetyChecker.kind: (),
}
"""Kind of conditioning -> its input tensors. LAYOUT is JSON: a list of [category, [x, y, width, height]]."""
COUNT = TensorField("COUNT", "TYPE_INT32")
GUIDANCE_FIELDS = (
    GUIDANCE,
    TensorField("GUIDANCE_EVERY", "TYPE_INT32"),
    TensorField("GUIDANCE_INTERVAL", "TYPE_FP32", (2,)),
    TensorField("GUIDANCE_RESCALE", "TYPE_FP32"),
)
COMMON_FIELDS = (
    TensorField("SEED", "TYPE_INT64", (-1,)),
    TensorField("STEPS", "TYPE_INT32"),
    TensorField("AUTO_STEPS", "TYPE_BOOL"),
    TensorField("BUDGET", "TYPE_FP32"),
    TensorField("CACHE_EVERY", "TYPE_INT32"),
    TensorField("FULL_STEPS", "TYPE_INT32"),
    TensorField("SCHEDULER", "TYPE_STRING"),
    TensorField("LORAS", "TYPE_STRING"),
    TensorField("ETA", "TYPE_FP32"),
    TensorField("HEIGHT", "TYPE_INT32"),
    TensorField("WIDTH", "TYPE_INT32"),
    TensorField("PRIORITY", "TYPE_INT32"),
    TensorField("TIMEOUT", "TYPE_FP32"),
)
"""LORAS is JSON: an object with the weights of adapters by name."""
PREVIEW_EVERY = TensorField("PREVIEW_EVERY", "TYPE_INT32")
FLAGGED = TensorField("FLAGGED", "TYPE_BOOL", (-1,))
"""Output of models with a safety checker: for each image, whether it was flagged and is black."""

CHECK, ID, CANCEL = "check", "ldm_id", "ldm_cancel"
"""Request parameters. ``check`` asks whether images can be generated now. `ldm` forwards a request to `ldm_stream` with
an ``ldm_id``, and cancels it with another request that has this id as ``ldm_cancel``."""


def input_fields(model: ModelDescription, stream: bool = False) -> tuple[TensorField, ...]:
    """Inputs of `ldm` or, with ``stream``, of `ldm_stream`: those of the model's conditioning, then the common ones.

    Raises:
        SpecError: The model has a kind of conditioning that has no tensors.
    """
    kinds = [entry.kind for entry in model.conditioning]
    if unknown := [kind for kind in kinds if kind not in KIND_FIELDS]:
        raise SpecError(f"triton: conditioning {unknown[0]!r:.40} has no tensors, expected {', '.join(KIND_FIELDS)}")
    of_kinds = [field for kind in kinds for field in KIND_FIELDS[kind]] or [COUNT]
    guidance = GUIDANCE_FIELDS if model.guidance else ()
    return (*of_kinds, *guidance, *COMMON_FIELDS, *((PREVIEW_EVERY,) if stream else ()))


def output_fields(model: ModelDescription, stream: bool = False) -> tuple[TensorField, ...]:
    """Outputs of `ldm` or, with ``stream``, of `ldm_stream`. IMAGE has as many channels as the decoder's image."""
    channels = model.components[DECODER].outputs[0].bounds("opt")[1]
    progress = (
        TensorField("STEP", "TYPE_INT32"),
        TensorField("TOTAL", "TYPE_INT32"),
        TensorField("FINAL", "TYPE_BOOL"),
    )
    return (
        TensorField("IMAGE", "TYPE_UINT8", (-1, -1, -1, channels)),
        TensorField("PNG", "TYPE_STRING", (-1,)),
        TensorField("PNG_BASE64", "TYPE_STRING", (-1,)),
        TensorField("SEED_USED", "TYPE_INT64", (-1,)),
        *([FLAGGED] if any(entry.kind == SafetyChecker.kind for entry in model.conditioning) else []),
        *(progress if stream else ()),
    )
