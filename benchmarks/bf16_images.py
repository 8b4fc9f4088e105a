"""Measures how bf16 arithmetic changes the images of the demo model.

bf16 is OpenVINO's default if the CPU supports it. The script generates images of held-out prompts, and measures their
PSNR against those of ONNX Runtime in fp32 and the share that shows what the prompt says.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ldm_export_demo.grader import grade
from ldm_export_demo.grammar import held_out_prompts, parse
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.images import psnr

OPTIONS = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    prompts = held_out_prompts(args.images // 2, args.images // 2)
    generated = {precision: images_of(args.bundle, *precision, prompts) for precision in BOTH}
    exact, rounded = (generated[which] for which in BOTH)
    psnrs = [psnr(one.astype(float), other, 255.0) for one, other in zip(exact, rounded, strict=True)]
    decibels = np.array([math.inf if value is None else value for value in psnrs])
    facts = {
        "tools": {name: version(name) for name in ("openvino", "onnxruntime")},
        **OPTIONS,
        "images": len(prompts),
        "psnr": {"median": float(np.median(decibels)), "least": float(decibels.min())},
        "correct": {
            arithmetic: float(np.mean([grade(one, parse(p)).correct for one, p in zip(images, prompts, strict=True)]))
            for (_, arithmetic), images in generated.items()
        },
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


BOTH = (("onnxruntime", "fp32"), ("openvino", "bf16"))


def images_of(bundle: Path, backend: str, precision: str, prompts: list[str]) -> list[np.ndarray]:
    """Return one image per prompt, uint8 [64, 64, 3], with seeds 0, 1, …"""
    with LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision=precision) as pipeline:
        images = [pipeline(prompt, seed=seed, **OPTIONS).images[0] for seed, prompt in enumerate(prompts)]
    return [np.asarray(image) for image in images]


if __name__ == "__main__":
    main()
