"""Translates requests of AUTOMATIC1111's API to the images API, so that the same checks and limits apply to both.

Fields are those of ``/sdapi/v1/txt2img`` and ``/sdapi/v1/img2img`` in version 1.10 of https://github.com/AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.number_checks import shown
from ldm_runtime.request import fresh_seed
from ldm_runtime.schedulers import (
    DDIM,
    LCM,
    LMS,
    PNDM,
    TCD,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    Heun,
    UniPC,
)

__all__ = ["AUTOMATIC", "CHECKED", "SAMPLERS", "image_fields", "invalid", "renamed"]

AUTOMATIC = "Automatic"
"""Sampler name that selects the model's own scheduler."""
SAMPLERS: Mapping[str, str] = {
    "DDIM": DDIM.CLASS,
    "PLMS": PNDM.CLASS,
    "DPM++ 2M": DPMSolverMultistep.CLASS,
    "UniPC": UniPC.CLASS,
    "Euler": Euler.CLASS,
    "Euler a": EulerAncestral.CLASS,
    "LMS": LMS.CLASS,
    "Heun": Heun.CLASS,
    "LCM": LCM.CLASS,
    "TCD": TCD.CLASS,
}
"""Sampler name in the API -> scheduler class. The options of the scheduler are those of the model."""
CHECKED = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "cfg_scale",
    "eta",
    "width",
    "height",
    "batch_size",
    "n_iter",
    "sampler_name",
    "sampler_index",
    "scheduler",
)
"""Fields whose values are checked, so that a response can repeat them."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "restore_faces": (False,),
    "tiling": (False,),
    "subseed_strength": (0,),
    "styles": ([],),
    "script_name": ("",),
    "refiner_checkpoint": ("",),
}
"""Unsupported field -> values besides null that have no effect and are accepted."""
_NAMES = {
    "guidance": "cfg_scale",
    "scheduler": "sampler_name",
    "n": "batch_size times n_iter",
    "image": "init_images",
    "strength": "denoising_strength",
}
"""Field of the images API -> field of this API, for error messages."""


def image_fields(fields: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """Translate the fields of txt2img and img2img; ``image_request.parse`` and the pipeline check the values later.

    Missing fields take the model's defaults. Image number i has the seed ``seed`` + i and its own noise stream, so that
    the seeds in ``all_seeds`` of the response reproduce each image. Fields that have no meaning here are ignored.

    Raises:
        ApiError: A field asks for something that is not supported, or has the wrong type.
    """
    for name, neutral in UNSUPPORTED.items():
        if (value := fields.get(name)) is not None and value not in neutral:
            raise invalid(name, f"got {shown(value)}, but this is not supported; leave it out")
    scripts = fields.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict) or any(_in_use(script) for script in scripts.values()):
        raise invalid("alwayson_scripts", "got scripts, but there are none; leave them out")
    if str(fields.get("scheduler") or AUTOMATIC).lower() != AUTOMATIC.lower():
        raise invalid("scheduler", f"got {shown(fields['scheduler'])}, expected {AUTOMATIC}, the spacing of the model")
    images = _count(fields, "batch_size") * _count(fields, "n_iter")
    translated: dict[str, Any] = {
        "prompt": fields.get("prompt", ""),
        "negative_prompt": fields.get("negative_prompt"),
        "n": images,
        "steps": fields.get("steps"),
        "guidance": fields.get("cfg_scale"),
        "eta": fields.get("eta"),
        "scheduler": _scheduler(fields),
        "seed": _seeds(fields, images),
        "size": _size(fields, model),
    }
    return {name: value for name, value in translated.items() if value is not None}


@contextmanager
def renamed() -> Iterator[None]:
    """Context manager that renames the field in errors of its block to the name in this API."""
    try:
        yield
    except ApiError as error:
        name = _NAMES.get(error.param or "", error.param)
        message = str(error).replace(f"{error.param}: ", f"{name}: ", 1)
        raise ApiError(error.status, message, kind=error.kind, code=error.code, param=name) from None


def invalid(param: str, message: str) -> ApiError:
    """Return the error for a field."""
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)


def _in_use(script: Any) -> bool:
    """Return False for a script without arguments, or whose only argument turns it off; clients send such scripts."""
    arguments = script.get("args") if isinstance(script, dict) else script
    return bool(arguments) and arguments != [False]


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise invalid(name, f"got {shown(value)}, expected a whole number from 1")
    return value


def _scheduler(fields: Mapping[str, Any]) -> str | None:
    """The class of the sampler; ``sampler_index`` is the older name of the field."""
    name = fields.get("sampler_name") or fields.get("sampler_index") or AUTOMATIC
    if not isinstance(name, str) or name not in (AUTOMATIC, *SAMPLERS):
        known = ", ".join((AUTOMATIC, *SAMPLERS))
        raise invalid("sampler_name", f"got {shown(name)}, expected one of {known}")
    return SAMPLERS.get(name)


def _seeds(fields: Mapping[str, Any], images: int) -> list[int]:
    seed = fields.get("seed")
    if seed is None or seed == -1:
        seed = fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise invalid("seed", f"got {shown(seed)}, expected a whole number, or -1 for a new one")
    return [seed + index for index in range(images)]


def _size(fields: Mapping[str, Any], model: ServedModel) -> str | None:
    width, height = fields.get("width"), fields.get("height")
    if width is None and height is None:
        return None
    geometry = model.pipeline.geometry
    sides = (
        geometry.width.opt * geometry.factor if width is None else width,
        geometry.height.opt * geometry.factor if height is None else height,
    )
    return "x".join(map(str, sides))
