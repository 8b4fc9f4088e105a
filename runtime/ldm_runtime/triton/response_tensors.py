"""Responses of the models `ldm` and `ldm_stream`: results and progress are written into output tensors."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.job import JobResult, Progress
from ldm_runtime.images import pil_image, to_png
from ldm_runtime.triton.tensors import FLAGGED, Tensors

__all__ = ["image_tensors", "progress_tensors", "response_tensors"]


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
