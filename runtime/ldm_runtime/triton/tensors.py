"""Tensors of the models `ldm` and `ldm_stream`, and their conversion to requests and from results."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.job import JobResult, Progress
from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS
from ldm_runtime.conditioning.safety_checker import SafetyChecker
from ldm_runtime.errors import SpecError
from ldm_runtime.images import pil_image, to_png
from ldm_runtime.model import DECODER, ModelDescription
from ldm_runtime.number_checks import shown
from ldm_runtime.request import AUTO, Request

__all__ = [
    "CANCEL",
    "CHECK",
    "ID",
    "Submission",
    "TensorField",
    "Tensors",
    "image_tensors",
    "input_fields",
    "output_fields",
    "parse_parameters",
    "parse_request",
    "progress_tensors",
    "response_tensors",
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


NUMBERS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "count": ("COUNT", int),
    "eta": ("ETA", float),
    "guidance_scale": ("GUIDANCE", float),
    "num_inference_steps": ("STEPS", int),
    "strength": ("STRENGTH", float),
    "padding_mask_crop": ("PADDING_MASK_CROP", int),
    "height": ("HEIGHT", int),
    "width": ("WIDTH", int),
    "images_per_prompt": ("IMAGES_PER_PROMPT", int),
    "clip_skip": ("CLIP_SKIP", int),
    "prompt_chunks": ("PROMPT_CHUNKS", int),
    "prompt_weights": ("PROMPT_WEIGHTS", bool),
    "guidance_rescale": ("GUIDANCE_RESCALE", float),
    "guidance_every": ("GUIDANCE_EVERY", int),
    "cache_every": ("CACHE_EVERY", int),
    "full_steps": ("FULL_STEPS", int),
    "budget": ("BUDGET", float),
}
"""Field of ``Request`` with one number -> its tensor."""
TEXTS: Mapping[str, str] = {
    "prompts": "PROMPT",
    "negative_prompt": "NEGATIVE_PROMPT",
    "prompts_2": "PROMPT_2",
    "negative_prompt_2": "NEGATIVE_PROMPT_2",
}
"""Field of ``Request`` with texts -> its tensor."""
ARRAYS: Mapping[str, str] = {"image": "INPUT_IMAGE", "mask": "MASK", "segmentation": "SEGMENTATION", "tokens": "TOKENS"}
"""Field of ``Request`` whose value is an array -> its tensor."""


@dataclass(frozen=True, eq=False)
class Submission:
    """A request, and further arguments of ``BatchScheduler.submit`` that were sent with it."""

    request: Request
    priority: int
    timeout: float | None
    preview_every: int


def parse_request(tensors: Mapping[str, NDArray[Any]]) -> Submission:
    """Read a request from its tensors. Missing options take the model's defaults.

    Raises:
        SpecError: A tensor has the wrong number of values, or a text is not UTF-8. The pipeline checks the values
            later.
    """
    options: dict[str, Any] = {}
    for field, (name, kind) in NUMBERS.items():
        if name in tensors:
            options[field] = _one(tensors, name, kind)
    if _one(tensors, "AUTO_STEPS", bool):
        if "STEPS" in tensors:
            raise SpecError("AUTO_STEPS: got true and STEPS too; leave one of them out")
        options["num_inference_steps"] = AUTO
    for field, name in TEXTS.items():
        if name in tensors:
            options[field] = _texts(tensors, name)
    if "SEED" in tensors:
        seeds = [_number("SEED", seed, int) for seed in tensors["SEED"].ravel()]
        options["seed"] = seeds[0] if len(seeds) == 1 else seeds
    for field, name in ARRAYS.items():
        if name in tensors:
            options[field] = tensors[name]
    if "LAYOUT" in tensors:
        options["layout"] = [_layout(number, text) for number, text in enumerate(_texts(tensors, "LAYOUT"))]
    if "LORAS" in tensors:
        _values(tensors, "LORAS", 1)
        options["loras"] = _loras(_texts(tensors, "LORAS")[0])
    if "LABEL" in tensors:
        options["labels"] = [_number("LABEL", label, int) for label in tensors["LABEL"].ravel()]
    if "SCHEDULER" in tensors:
        _values(tensors, "SCHEDULER", 1)
        options["scheduler"] = _texts(tensors, "SCHEDULER")[0]
    if "GUIDANCE_INTERVAL" in tensors:
        start, end = (_number("GUIDANCE_INTERVAL", value, float) for value in _values(tensors, "GUIDANCE_INTERVAL", 2))
        options["guidance_interval"] = (start, end)
    for field in MICRO_FIELDS:
        if (name := field.upper()) in tensors:
            options[field] = tuple(_number(name, value, int) for value in _values(tensors, name, 2))
    request = Request(**options)
    priority, preview_every = _one(tensors, "PRIORITY", int), _one(tensors, "PREVIEW_EVERY", int)
    return Submission(request, 2 if priority is None else priority, _one(tensors, "TIMEOUT", float), preview_every or 0)


def _values(tensors: Mapping[str, NDArray[Any]], name: str, count: int) -> list[Any]:
    values = list(tensors[name].ravel())
    if len(values) != count:
        raise SpecError(f"{name}: got {len(values)} values, expected {count}")
    return values


def _one(tensors: Mapping[str, NDArray[Any]], name: str, kind: Callable[[Any], Any]) -> Any:
    return _number(name, _values(tensors, name, 1)[0], kind) if name in tensors else None


def _number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (ValueError, TypeError, OverflowError):
        raise SpecError(f"{name}: got {shown(value)}, expected a number; check the tensor's data type") from None


def _texts(tensors: Mapping[str, NDArray[Any]], name: str) -> list[str]:
    texts = []
    for number, value in enumerate(tensors[name].ravel()):
        try:
            texts.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise SpecError(f"{name} {number}: is not UTF-8 (byte {error.start}); encode the text as UTF-8") from None
    return texts


def _layout(number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SpecError(f"LAYOUT {number}: is not JSON; send [[category, [x, y, width, height]], ...]") from None


def _loras(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SpecError(f'LORAS: got {shown(text)}, expected a JSON object, e.g. {{"style": 0.7}}') from None


def response_tensors(result: JobResult, steps: int, requested: set[str]) -> Tensors:
    """Requested outputs of the last response of a request with ``steps`` steps. FINAL is true."""
    tensors: Tensors = {"SEED_USED": np.array(result.seeds, np.int64)} if "SEED_USED" in requested else {}
    if FLAGGED.name in requested and result.flagged is not None:
        tensors[FLAGGED.name] = np.array(result.flagged, bool)
    final = {"FINAL": np.array([True])} if "FINAL" in requested else {}
    return tensors | progress_tensors(Progress(steps - 1, steps, result.images), requested) | final


def progress_tensors(progress: Progress, requested: set[str]) -> Tensors:
    """Requested outputs of a response before the last: finished steps, number of steps, and a preview if there is one.

    FINAL is false: an image in this response is a preview.
    """
    numbers = {"STEP": progress.index + 1, "TOTAL": progress.total}
    tensors: Tensors = {name: np.array([number], np.int32) for name, number in numbers.items() if name in requested}
    tensors |= {"FINAL": np.array([False])} if "FINAL" in requested else {}
    return tensors if progress.preview is None else tensors | image_tensors(progress.preview, requested)


def image_tensors(images: NDArray[np.uint8], requested: set[str]) -> Tensors:
    """Those of IMAGE, PNG and PNG_BASE64 that are requested, from uint8 [images, H, W, channels].

    A request that names no outputs gets all of them except PNG, because JSON cannot represent its bytes.
    """
    tensors: Tensors = {"IMAGE": images} if "IMAGE" in requested else {}
    encodings = requested & {"PNG", "PNG_BASE64"}
    if encodings and not {"IMAGE", "PNG", "PNG_BASE64", "SEED_USED"} <= requested:
        files = [to_png(pil_image(image)) for image in images]
        encoded = {"PNG": files, "PNG_BASE64": [base64.b64encode(file) for file in files]}
        tensors |= {name: np.array(encoded[name], object) for name in encodings}
    return tensors


def parse_parameters(text: str) -> dict[str, Any]:
    """Parse the parameters of a request, which Triton passes as a JSON object.

    Raises:
        SpecError: The text is not a JSON object.
    """
    try:
        parameters = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise SpecError(f"parameters: got {shown(text)}, expected a JSON object ({error})") from None
    return parameters if isinstance(parameters, dict) else {}
