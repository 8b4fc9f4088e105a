"""The tensors of the models `ldm` and `ldm_stream`, and the request that they carry."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.batching.job import JobResult, Progress
from ldm_runtime.errors import SpecError
from ldm_runtime.images import to_png
from ldm_runtime.request import Request

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorField:
    """One tensor: its name, Triton data type, dimensions (-1: any size), and whether it may be left out."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


INPUTS = (
    TensorField("PROMPT", "TYPE_STRING", (-1,), optional=False),
    TensorField("NEGATIVE_PROMPT", "TYPE_STRING", (-1,)),
    TensorField("SEED", "TYPE_INT64", (-1,)),
    TensorField("STEPS", "TYPE_INT32"),
    TensorField("ETA", "TYPE_FP32"),
    TensorField("GUIDANCE", "TYPE_FP32"),
    TensorField("HEIGHT", "TYPE_INT32"),
    TensorField("WIDTH", "TYPE_INT32"),
    TensorField("IMAGES_PER_PROMPT", "TYPE_INT32"),
    TensorField("PRIORITY", "TYPE_INT32"),
    TensorField("TIMEOUT", "TYPE_FP32"),
)
STREAM_INPUTS = (*INPUTS, TensorField("PREVIEW_EVERY", "TYPE_INT32"))
OUTPUTS = (
    TensorField("IMAGE", "TYPE_UINT8", (-1, -1, -1, 3)),
    TensorField("PNG", "TYPE_STRING", (-1,)),
    TensorField("PNG_BASE64", "TYPE_STRING", (-1,)),
    TensorField("SEED_USED", "TYPE_INT64", (-1,)),
)
STREAM_OUTPUTS = (*OUTPUTS, TensorField("STEP", "TYPE_INT32"), TensorField("TOTAL", "TYPE_INT32"))

CHECK, ID, CANCEL = "check", "ldm_id", "ldm_cancel"
"""Request parameters. ``check``: answer at once whether a picture can be made. ``ldm`` passes requests on to
``ldm_stream`` with an ``ldm_id``, and cancels one by another request with that id as ``ldm_cancel``."""


@dataclass(frozen=True, eq=False)
class Submission:
    """A request as it came over the wire."""

    request: Request
    priority: int
    seconds: float | None
    preview_every: int


def asked(tensors: Mapping[str, NDArray[Any]]) -> Submission:
    """Read a request; what is left out has the defaults of ``ldm-export generate``.

    Raises:
        SpecError: a tensor has more than one number, or a prompt is no UTF-8. Values are checked later.
    """
    seeds = [int(seed) for seed in tensors["SEED"].ravel()] if "SEED" in tensors else None
    guidance, eta, seconds = (_one(tensors, name, float) for name in ("GUIDANCE", "ETA", "TIMEOUT"))
    steps, priority, every, images = (
        _one(tensors, name, int) for name in ("STEPS", "PRIORITY", "PREVIEW_EVERY", "IMAGES_PER_PROMPT")
    )
    request = Request(
        _texts(tensors, "PROMPT"),
        negative_prompt=_texts(tensors, "NEGATIVE_PROMPT") if "NEGATIVE_PROMPT" in tensors else "",
        seed=seeds[0] if seeds is not None and len(seeds) == 1 else seeds,
        eta=0.3 if eta is None else eta,
        guidance_scale=6.0 if guidance is None else guidance,
        num_inference_steps=50 if steps is None else steps,
        height=_one(tensors, "HEIGHT", int),
        width=_one(tensors, "WIDTH", int),
        images_per_prompt=1 if images is None else images,
    )
    return Submission(request, 2 if priority is None else priority, seconds, every or 0)


def _one(tensors: Mapping[str, NDArray[Any]], name: str, kind: Callable[[Any], Any]) -> Any:
    if name not in tensors:
        return None
    values = tensors[name].ravel()
    if len(values) != 1:
        raise SpecError(f"{name}: got {len(values)} values, expected one")
    return kind(values[0])


def _texts(tensors: Mapping[str, NDArray[Any]], name: str) -> list[str]:
    texts = []
    for number, value in enumerate(tensors[name].ravel()):
        try:
            texts.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise SpecError(f"{name} {number}: is no UTF-8 text (byte {error.start}); encode it as UTF-8") from None
    return texts


def answer(pictures: JobResult, steps: int, wanted: set[str]) -> Tensors:
    """The last answer: all that is wanted."""
    tensors: Tensors = {"SEED_USED": np.array(pictures.seeds, np.int64)} if "SEED_USED" in wanted else {}
    return tensors | told(Progress(steps - 1, steps, pictures.images), wanted)


def told(progress: Progress, wanted: set[str]) -> Tensors:
    """An answer before the last: steps done, of how many, and a preview where there is one."""
    numbers = {"STEP": progress.index + 1, "TOTAL": progress.total}
    tensors: Tensors = {name: np.array([number], np.int32) for name, number in numbers.items() if name in wanted}
    return tensors if progress.preview is None else tensors | shown(progress.preview, wanted)


def shown(images: NDArray[np.uint8], wanted: set[str]) -> Tensors:
    """IMAGE, PNG and PNG_BASE64 of uint8 [images, H, W, 3], where wanted.

    A caller who names no outputs gets no PNG: its bytes are no text, and would spoil an answer in JSON.
    """
    tensors: Tensors = {"IMAGE": images} if "IMAGE" in wanted else {}
    if (named := wanted & {"PNG", "PNG_BASE64"}) and not {wire.name for wire in OUTPUTS} <= wanted:
        files = [to_png(Image.fromarray(image)) for image in images]
        coded = {"PNG": files, "PNG_BASE64": [base64.b64encode(file) for file in files]}
        tensors |= {name: np.array(coded[name], object) for name in named}
    return tensors


def parameters(text: str) -> dict[str, Any]:
    """Triton's request parameters, which it gives as JSON."""
    found = json.loads(text or "{}")
    return found if isinstance(found, dict) else {}
