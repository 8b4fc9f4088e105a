"""Requests of the images API: checks the JSON or form fields, and converts them to a pipeline request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS
from ldm_runtime.http.api_error import FIELD_NAMES, ApiError
from ldm_runtime.http.image_format import FORMATS, ImageFormat
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.images import QUALITY
from ldm_runtime.number_checks import shown
from ldm_runtime.request import Request

__all__ = ["PROMPTS", "ImageRequest", "parse"]

OPTIONS = (
    "seed",
    "steps",
    "guidance",
    "eta",
    "guidance_every",
    "cache_every",
    "full_steps",
    "budget",
    "guidance_interval",
    "guidance_rescale",
    "clip_skip",
    "prompt_chunks",
    "prompt_weights",
    "scheduler",
    "strength",
    "padding_mask_crop",
    "mask_blur",
    "labels",
    "segmentation",
    "tokens",
    "layout",
    *MICRO_FIELDS,
    "loras",
)
"""Fields that OpenAI's API does not have; they become fields of ``Request``."""
WITHOUT_EFFECT = ("user", "quality", "style", "moderation", "input_fidelity")
"""Fields of OpenAI's API that are ignored, because they have no meaning for these models."""
PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
"""Fields with texts for the model."""
DELIVERY = (
    "model",
    *PROMPTS,
    "n",
    "size",
    "response_format",
    "output_format",
    "output_compression",
    "background",
    "stream",
    "partial_images",
    "progress",
)
MAX_PARTIAL = 3
"""Maximum number of partial images of a stream, as in OpenAI's API."""


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """A checked request.

    Attributes:
        request: The request for the pipeline.
        format: Format of the images.
        as_url: True answers with URLs, False with base64.
        stream: True sends server-sent events while the images are generated.
        partial_images: Number of previews in a stream.
        progress: True also sends an event for each step.
    """

    request: Request
    format: ImageFormat = field(default_factory=ImageFormat)
    as_url: bool = False
    stream: bool = False
    partial_images: int = 0
    progress: bool = False


def parse(fields: Mapping[str, Any], model: ServedModel, options: ServerOptions) -> ImageRequest:
    """Check the fields of a request. The pipeline checks the values of its own options later.

    Args:
        fields: Fields of the API; "image" and "mask" are PIL images.
        model: The model that the request names.
        options: Limits.

    Raises:
        ApiError: A field is unknown, has the wrong type, or exceeds a limit.
    """
    known = {*OPTIONS, *WITHOUT_EFFECT, *DELIVERY, "image", "mask"}
    if unknown := sorted(set(fields) - known):
        raise _invalid(
            unknown[0][:60], "is unknown; see docs/guides/http.md for the fields of this API", "unknown_parameter"
        )
    number = _whole(fields, "n", 1, 1, options.max_images)
    taken = [name for name in (*OPTIONS, "image", "mask") if fields.get(name) is not None]
    request: dict[str, Any] = {FIELD_NAMES.get(name, name): fields[name] for name in taken}
    request |= _prompts(fields, model, options)
    request["images_per_prompt" if model.kinds else "count"] = number
    request |= _size(fields)
    if fields.get("background") not in (None, "auto", "opaque"):
        raise _invalid("background", "expected auto or opaque; these models draw no transparency")
    stream = _flag(fields, "stream")
    response_format = _choice(fields, "response_format", ("b64_json", "url"))
    if stream and response_format == "url":
        raise _invalid("response_format", "got url with stream, expected b64_json")
    return ImageRequest(
        Request(**request),
        ImageFormat(
            _choice(fields, "output_format", FORMATS),
            _whole(fields, "output_compression", QUALITY, 0, 100),
        ),
        response_format == "url",
        stream,
        _whole(fields, "partial_images", 0, 0, MAX_PARTIAL),
        _flag(fields, "progress"),
    )


def _prompts(fields: Mapping[str, Any], model: ServedModel, options: ServerOptions) -> dict[str, Any]:
    texts = {name: _text(fields, name, options.max_prompt_characters) for name in PROMPTS}
    if "text" in model.kinds:
        if not texts["prompt"].strip() and "prompt" not in fields:
            raise _invalid("prompt", "got none, expected a text; this model draws what a prompt describes")
        asked = {FIELD_NAMES.get(name, name): texts[name] for name in PROMPTS if fields.get(name) is not None}
        return {**asked, "prompts": [texts["prompt"]]}
    if given := [name for name, text in texts.items() if text]:
        takes = f"takes {', '.join(sorted(model.fields))}" if model.fields else "draws without conditioning"
        raise _invalid(given[0], f"got a text, but {model.name} {takes}; send an empty one")
    return {}


def _size(fields: Mapping[str, Any]) -> dict[str, int]:
    size = fields.get("size")
    if size in (None, "auto"):
        return {}
    width, cross, height = size.partition("x") if isinstance(size, str) and len(size) <= 20 else ("", "", "")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise _invalid("size", f"got {shown(size)}, expected auto or WIDTHxHEIGHT in pixels, e.g. 256x256")
    return {"width": int(width), "height": int(height)}


def _text(fields: Mapping[str, Any], name: str, most: int) -> str:
    text = fields.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _invalid(name, f"got {shown(text)}, expected a text")
    if len(text) > most:
        raise _invalid(name, f"got {len(text)} characters, expected at most {most}")
    return text


def _whole(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _invalid(name, f"got {shown(value)}, expected a whole number from {least} to {most}")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise _invalid(name, f"got {shown(value)}, expected true or false")
    return bool(value)


def _choice(fields: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = fields.get(name)
    if value is None:
        return choices[0]
    if value not in choices:
        raise _invalid(name, f"got {shown(value)}, expected one of {', '.join(choices)}")
    return str(value)


def _invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {message}", code=code, param=param)
