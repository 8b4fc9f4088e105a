"""Requests of the models `ldm` and `ldm_stream`: input tensors and parameters are read into a ``Request``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS
from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.request import AUTO, Request

__all__ = ["Submission", "parse_parameters", "parse_request"]

NUMBERS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "count": ("COUNT", int),
    "eta": ("ETA", float),
    "guidance_scale": ("GUIDANCE", float),
    "num_inference_steps": ("STEPS", int),
    "strength": ("STRENGTH", float),
    "padding_mask_crop": ("PADDING_MASK_CROP", int),
    "mask_blur": ("MASK_BLUR", float),
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
