"""``ldm-export client``: request images from a Triton server; needs neither a bundle nor an engine."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_export.screen import Screen
from ldm_export.serving.address import PROTOCOLS, Address, parse_url
from ldm_export.serving.client import Arrays, Connection
from ldm_export.verbs.image_options import (
    add_request,
    grid_columns,
    opened_images,
    read_layouts,
    write_images,
)
from ldm_export.verbs.lora_option import lora_inputs
from ldm_export.verbs.options import real_number, whole_number
from ldm_export.verbs.prompt_options import prompt_inputs
from ldm_export.verbs.xl_options import xl_inputs
from ldm_runtime.atomic_files import destination
from ldm_runtime.errors import ServerError, SpecError
from ldm_runtime.request import AUTO

__all__ = ["add_arguments", "run"]

MODEL, STREAM = "ldm", "ldm_stream"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_request(verb)
    server = verb.add_argument_group("server")
    server.add_argument("--url", default="localhost", help="[http|https|grpc|grpcs://]host[:port] (default localhost)")
    server.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), help="protocol for a URL without a scheme (default http)"
    )
    server.add_argument("--model", help=f"name of the model on the server (default {MODEL}, with --stream {STREAM})")
    server.add_argument(
        "--stream", action="store_true", help="report each step when the server finishes it (gRPC only)"
    )
    server.add_argument(
        "--preview-every",
        type=whole_number,
        default=0,
        metavar="N",
        help="with --stream, write a preview every N steps: out-9.png, …",
    )
    server.add_argument(
        "--priority", type=whole_number, help="priority from 0 (most urgent) to 4 (default: the server's)"
    )
    server.add_argument(
        "--timeout",
        type=real_number,
        default=300.0,
        metavar="SECONDS",
        help="time after which the request is cancelled (default 300)",
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command."""
    from ldm_runtime.request import fresh_seed

    destination(args.output)
    address = parse_url(args.url, args.protocol or ("grpc" if args.stream and "://" not in args.url else None))
    if args.stream and address.protocol != "grpc":
        raise SpecError(f"url: {address} cannot stream; use gRPC and its port, usually {PROTOCOLS['grpc']}")
    if args.preview_every and not args.stream:
        raise SpecError("--preview-every: got no --stream, which delivers the previews; add it")
    seed = fresh_seed() if args.seed is None else args.seed
    with screen.bar("connecting"):
        connection = Connection(address, args.model or (STREAM if args.stream else MODEL), args.timeout)
    with connection:
        inputs = _inputs(args, seed)
        answer = _stream(connection, inputs, args, screen) if args.stream else _infer(connection, inputs, screen)
    images = _images(answer["IMAGE"], args, address)
    image_files = write_images(args.output, images, grid_columns(args.images_per_prompt), args.each)
    image_files.show(screen, {"seed": seed}, f"seed {seed}", args.json)


def _inputs(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the inputs of the model by name. The server has defaults for missing options."""
    inputs = {
        "PROMPT": args.prompts or None,
        "LABEL": args.label,
        "INPUT_IMAGE": _pixels(args.image),
        "MASK": _pixels(args.mask, "L"),
        "STRENGTH": args.strength,
        "PADDING_MASK_CROP": args.padding_mask_crop,
        "MASK_BLUR": args.mask_blur,
        "SEGMENTATION": _classes(args.segmentation),
        "LAYOUT": _layouts(args.layout),
        "COUNT": args.count,
        "SEED": seed,
        "STEPS": None if args.steps == AUTO else args.steps,
        "AUTO_STEPS": True if args.steps == AUTO else None,
        "BUDGET": args.budget,
        "ETA": args.eta,
        "GUIDANCE": args.guidance,
        "GUIDANCE_EVERY": args.guidance_every,
        "GUIDANCE_INTERVAL": args.guidance_interval,
        "GUIDANCE_RESCALE": args.guidance_rescale,
        "CACHE_EVERY": args.cache_every,
        "FULL_STEPS": args.full_steps,
        "SCHEDULER": args.scheduler,
        "HEIGHT": args.height,
        "WIDTH": args.width,
        "IMAGES_PER_PROMPT": args.images_per_prompt if args.images_per_prompt != 1 else None,
        "PRIORITY": args.priority,
        "TIMEOUT": args.timeout,
        "PREVIEW_EVERY": args.preview_every or None,
        **prompt_inputs(args),
        **xl_inputs(args),
        **lora_inputs(args),
    }
    return {name: value for name, value in inputs.items() if value is not None}


def _pixels(files: list[Path] | None, mode: str = "RGB") -> NDArray[np.uint8] | None:
    """Read files as uint8 [N, H, W, channels]."""
    from ldm_runtime.input_images import rgb_image

    images = opened_images(files)
    if images is None:
        return None
    arrays = np.stack([np.asarray(rgb_image(picture).convert(mode)) for picture in images])
    return arrays[..., None] if arrays.ndim == 3 else arrays


def _classes(files: list[Path] | None) -> NDArray[np.int64] | None:
    """Read files as int64 [N, H, W]."""
    from ldm_runtime.conditioning.segmentation import class_array

    found = opened_images(files)
    return None if found is None else class_array(found)


def _layouts(files: list[Path] | None) -> list[str] | None:
    found = read_layouts(files)
    return None if found is None else [json.dumps(layout) for layout in found]


def _infer(connection: Connection, inputs: dict[str, Any], screen: Screen) -> Arrays:
    with screen.bar("waiting for the server"):
        return connection.infer(inputs, ["IMAGE"])


def _stream(connection: Connection, inputs: dict[str, Any], args: argparse.Namespace, screen: Screen) -> Arrays:
    """Return the last response. Earlier ones report finished steps, and some of them contain a preview."""
    answer: Arrays = {}
    with screen.bar("denoising") as bar, closing(connection.stream(inputs, ["STEP", "TOTAL", "IMAGE"])) as answers:
        for answer in answers:
            if not {"STEP", "TOTAL"} <= answer.keys():
                continue
            step, total = (_number(answer[name], name, connection.address) for name in ("STEP", "TOTAL"))
            bar.to(step, total)
            if "IMAGE" in answer and step < total:
                preview = args.output.with_name(f"{args.output.stem}-{step}{args.output.suffix}")
                images = _images(answer.pop("IMAGE"), args, connection.address)
                replaced = write_images(preview, images, grid_columns(args.images_per_prompt)).replaced
                screen.note(f"{preview}: preview of step {step} of {total}{', overwritten' if replaced else ''}")
    if "IMAGE" not in answer:
        raise ServerError(f"{connection.address}: the stream ended without an image; look into the server's log")
    return answer


def _number(array: NDArray[Any], name: str, address: Address) -> int:
    if array.size != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} {list(array.shape)}"
        raise ServerError(f"{address}: {name} is {got}, expected one whole number; check --model")
    return int(array.ravel()[0])


def _images(array: NDArray[Any], args: argparse.Namespace, address: Address) -> list[Image.Image]:
    from ldm_runtime.images import pil_image

    each = len(args.prompts) or len(args.label or args.layout or ())
    images = len(args.image or args.segmentation or ()) or args.count or 1
    count = each * args.images_per_prompt if each else images
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[0] != count or not array.size:
        got = f"{array.dtype} {list(array.shape)}"
        raise ServerError(f"{address}: IMAGE is {got}, expected uint8 [{count}, height, width, 3]; check --model")
    if array.shape[3] not in (1, 3, 4):
        raise ServerError(f"{address}: IMAGE has {array.shape[3]} channels, expected 1, 3 or 4; check --model")
    return [pil_image(image) for image in array]
