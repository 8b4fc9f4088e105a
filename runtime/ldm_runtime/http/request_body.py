"""Reads request bodies within limits: JSON objects, and forms with images."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request

from ldm_runtime.errors import LdmError
from ldm_runtime.http.api_error import ApiError, api_error
from ldm_runtime.http.image_request import PROMPTS
from ldm_runtime.input_images import open_image, rgb_image

__all__ = ["form_fields", "json_fields"]

MAX_FIELDS, MAX_FILES = 50, 20
"""Maximum number of fields and of files in a form."""
TEXTS = frozenset({*PROMPTS, "model", "size", "response_format", "output_format", "background", "user"})
"""Form fields that are texts; the values of other fields are parsed as JSON."""


async def json_fields(request: Request) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ApiError: The body is not a JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "content-type: expected application/json", code="invalid_content_type")
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "body: cannot be read as JSON; send one JSON object", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "body: expected one JSON object", code="invalid_json")
    return fields


async def form_fields(request: Request) -> dict[str, Any]:
    """Read a form: texts, numbers, and the files "image" (or "image[]", several) and "mask" as PIL images.

    As in OpenAI's API, transparent pixels of a mask mark what is repainted. In a mask without transparency, white does.

    Raises:
        ApiError: The body is not a form, or a file is not an image.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "content-type: expected multipart/form-data", code="invalid_content_type")
    fields: dict[str, Any] = {}
    images: list[Image.Image] = []
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    data = await value.read()
                    if name in ("image", "image[]"):
                        images.append(await run_in_threadpool(_image, data, "image"))
                    elif name == "mask":
                        fields["mask"] = await run_in_threadpool(_mask, data)
                    else:
                        raise ApiError(400, f"{name[:60]}: got a file, expected image or mask", param=name[:60])
                else:
                    fields[name] = value if name in TEXTS else _value(value)
    except LdmError as error:
        raise api_error(error) from None
    if images:
        fields["image"] = images
    return fields


def _image(data: bytes, name: str) -> Image.Image:
    return rgb_image(open_image(io.BytesIO(data), name))


def _mask(data: bytes) -> Image.Image:
    image = open_image(io.BytesIO(data), "mask")
    opacity = image.convert("RGBA").getchannel("A")
    if any(opacity.histogram()[:255]):
        return opacity.point(lambda alpha: 255 if alpha < 128 else 0)
    return image.convert("L")


def _value(text: str) -> Any:
    """Parse the text of a form field as JSON, e.g. a number; return other text unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
