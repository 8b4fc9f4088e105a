"""Generates one image in a new process and prints the seconds of each phase as JSON.

``first_image.py --phases`` runs this script several times.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

STARTED, BUNDLE, BACKEND, IMAGE = float(sys.argv[1]), *sys.argv[2:5]
marks = [("process", STARTED)]


def mark(phase: str) -> None:
    """Note the end of a phase."""
    marks.append((phase, time.time()))


mark("interpreter")
import numpy  # noqa: E402, F401

mark("import numpy")
import ldm_export.cli  # noqa: E402, F401
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request  # noqa: E402

mark("import ldm-export")
__import__(BACKEND)
mark("import engine")
bundle = Bundle.open(BUNDLE)
pipeline = LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend=BACKEND, keep_loaded=False)
mark("check files, read tokenizer")
for name, backend in pipeline.backends.items():
    if name != "shallow_unet":
        backend.load()  # type: ignore[attr-defined]
mark("load graphs")
request = Request("a large red circle in the center on a white background", seed=1)
plan = pipeline.plan(request)
pipeline.condition(plan, pipeline.begin(plan))
mark("encode the prompts")
*_, step = pipeline.steps(request)
mark("50 steps")
image = pipeline.generation(step.latents, request).images[0]
mark("decode")
image.save(IMAGE)
mark("write the file")
print(json.dumps({phase: now - before for (_, before), (phase, now) in pairwise(marks)}))
