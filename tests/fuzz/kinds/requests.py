"""Requests: from Python with any value in any field, and from Triton's tensors; accepted ones generate an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ldm_runtime import Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.triton.request_tensors import parse_parameters, parse_request
from tests.fuzz.mutation import FLOATS, NUMBERS, TEXTS, changed_bytes, odd_value
from tests.fuzz.outcome import Attempt
from tests.support.numpy_model import numpy_pipeline

__all__ = ["prepare"]

FIELDS: dict[str, Callable[[Random], Any]] = {
    "prompts": lambda random: random.choice(("a red circle", ["a", "b"], [""], "x" * 60_000, b"a", ["a"] * 40)),
    "negative_prompt": lambda random: random.choice(("", "a", ["a", "b"], ["a"], "\ud800")),
    "count": lambda random: random.choice((1, 2, 33)),
    "seed": lambda random: random.choice((0, 5, [1], [1, 2], 2**64 - 1, np.int64(3), np.uint8(3), np.array([4]))),
    "eta": lambda random: random.choice((0.0, 0.3, 1, np.float32(0.5), 2.0)),
    "guidance_scale": lambda random: random.choice((1.0, 6, np.float16(3), -2.0, 1e30)),
    "num_inference_steps": lambda random: random.choice((1, 3, np.int32(4), 999, 1001, "auto")),
    "height": lambda random: random.choice((8, 12, np.int64(16), 13, 2**20)),
    "width": lambda random: random.choice((8, 12, 16.0, 13)),
    "images_per_prompt": lambda random: random.choice((1, 2, 17)),
    "latents": lambda random: np.zeros(random.choice(((1, 4, 6, 6), (1, 4, 6), (0, 4, 6, 6))), random.choice("fdi")),
    "labels": lambda random: random.choice((0, [1, 2])),
    "image": lambda random: random.choice((Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8))),
    "mask": lambda random: random.choice((Image.new("L", (8, 8)), np.zeros((8, 8), bool))),
    "guidance_interval": lambda random: random.choice(((0, 1), (0.2, 0.4), [0.5, 0.5], (1, 0), (0,))),
    "guidance_every": lambda random: random.choice((1, 2, 5)),
    "cache_every": lambda random: random.choice((1, 2, np.int32(5))),
    "full_steps": lambda random: random.choice((0, 2, [0, 2], np.array([1]), [5, 0], None)),
    "budget": lambda random: random.choice((35, 20.5, np.float32(40), None)),
}
SUBMISSIONS: dict[str, Callable[[Random], Any]] = {
    "priority": lambda random: random.choice((0, 2, 4, 5)),
    "timeout": lambda random: random.choice((60, 5.0, None)),
    "preview_every": lambda random: random.choice((0, 1, 3)),
}
EXTREME = (10**5000, -(10**5000), 10**400, object(), float, np.array(["a"], object), np.zeros((3, 0)), np.nan, 1j)
TENSORS = ("COUNT", "ETA", "GUIDANCE", "STEPS", "HEIGHT", "WIDTH", "NEGATIVE_PROMPT", "SEED", "INPUT_IMAGE", "MASK")
TENSORS += (
    "LABEL",
    "IMAGES_PER_PROMPT",
    "GUIDANCE_EVERY",
    "GUIDANCE_INTERVAL",
    "CACHE_EVERY",
    "FULL_STEPS",
    "BUDGET",
    "AUTO_STEPS",
    "PROMPT",
    "PRIORITY",
    "TIMEOUT",
)
DTYPES = (np.int32, np.int64, np.float32, np.uint8, np.bool_)


def prepare(folder: Path) -> Attempt:
    """Open a model in NumPy, with and without texts; an input is a request of Python, of a scheduler, or of Triton."""
    folder.mkdir(parents=True, exist_ok=True)
    pipelines = [numpy_pipeline(folder, text=text) for text in (True, False)]
    schedulers = [BatchScheduler(pipeline, Limits(max_rows=8)) for pipeline in pipelines]

    def attempt(random: Random) -> None:
        which, kind = random.randrange(2), random.randrange(4)
        if kind == 0:
            pipelines[which](**_options(random, which == 0))
            return
        if kind == 1:
            parse_parameters(_parameters(random))
        submitted: dict[str, Any] = {
            name: value(random) for name, value in SUBMISSIONS.items() if random.random() < 0.3
        }
        if kind == 3:
            submission = parse_request(_tensors(random))
            request, submitted = submission.request, {"priority": submission.priority, "timeout": submission.timeout}
        else:
            request = Request(**_options(random, which == 0))
            if random.random() < 0.3:
                submitted[random.choice(list(SUBMISSIONS))] = _odd(random)
        schedulers[which].submit(request, **submitted).result(60)

    return attempt


def _odd(random: Random) -> Any:
    return random.choice(EXTREME) if random.random() < 0.3 else odd_value(random)


def _options(random: Random, text: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"prompts": "a"} if text else {}
    options["num_inference_steps"] = 2
    for name in random.sample(list(FIELDS), random.randint(0, 3)):
        options[name] = _odd(random) if random.random() < 0.5 else FIELDS[name](random)
    return options


def _parameters(random: Random) -> str:
    return random.choice(
        ("", "{}", '{"check": true}', "[1]", changed_bytes(random, b'{"check": true, "x": [1, 2]}').decode("latin-1"))
    )


def _tensors(random: Random) -> dict[str, Any]:
    tensors: dict[str, Any] = {"STEPS": np.array([2], np.int32), "PROMPT": np.array([b"a"], object)}
    for name in random.sample(TENSORS, random.randint(0, 4)):
        shape = random.choice(((1,), (1,), (1,), (2,), (0,), (1, 1), (1, 4, 4, 3), ()))
        if random.random() < 0.3:
            size = int(np.prod(shape))
            texts = [random.choice(TEXTS).encode("utf-8", "surrogatepass") for _ in range(size)]
            tensors[name] = np.array(texts, object).reshape(shape)
        else:
            number = random.choice(NUMBERS + FLOATS)
            with np.errstate(all="ignore"):
                tensors[name] = np.full(shape, np.array(float(number)).astype(random.choice(DTYPES)))
    return tensors
