"""Measures a bundle against the checkpoint it came from: each component against torch, pictures against diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, LDMTextToImagePipeline
from numpy.typing import NDArray
from PIL import Image
from transformers import BertTokenizerFast

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.placeholder_vocabulary import tokenizer_folder
from ldm_export.graph.components import MODULES
from ldm_export.quality.measures import TOLERANCES, ComponentResult, Tolerance, compared, real_feeds
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.images import psnr
from ldm_runtime.pipeline import LatentDiffusionPipeline

ETA, GUIDANCE, MAX_PROMPTS = 0.3, 6.0, 1000


@dataclass(frozen=True, eq=False)
class PictureResult:
    """One picture, ours and diffusers': largest difference of a pixel in 1/255, PSNR dB (None where equal)."""

    prompt: str
    seed: int
    max_pixel: int
    psnr: float | None
    ours: Image.Image
    theirs: Image.Image


@dataclass(frozen=True, eq=False)
class Verification:
    """All that was measured, and what of it is beyond the tolerance."""

    bundle: str
    precision: str
    steps: int
    tolerance: Tolerance
    components: tuple[ComponentResult, ...]
    pictures: tuple[PictureResult, ...]

    @property
    def failures(self) -> list[str]:
        """One line for each figure beyond the tolerance."""
        allowed, pixel = self.tolerance.component, self.tolerance.pixel
        lines = [
            f"{c.name}: max error {c.max_error:.2e}, allowed {allowed:.2e}"
            for c in self.components
            if not c.max_error <= allowed
        ]
        lines += [
            f"picture {p.prompt!r}: pixels differ by up to {p.max_pixel}/255, allowed {pixel}/255"
            for p in self.pictures
            if p.max_pixel > pixel
        ]
        return lines + [
            f"picture {p.prompt!r}: PSNR {p.psnr:.1f} dB, expected at least {self.tolerance.psnr:g} dB"
            for p in self.pictures
            if p.psnr is not None and not p.psnr >= self.tolerance.psnr
        ]

    def facts(self) -> dict[str, Any]:
        """The figures as JSON-able values."""
        return {
            "components": {
                c.name: {"max_error": c.max_error, "cosine": c.cosine, "psnr": c.psnr} for c in self.components
            },
            "pictures": [
                {"prompt": p.prompt, "seed": p.seed, "max_pixel": p.max_pixel, "psnr": p.psnr} for p in self.pictures
            ],
            "settings": {
                "precision": self.precision,
                "steps": self.steps,
                "eta": ETA,
                "guidance_scale": GUIDANCE,
            },
            "tolerance": asdict(self.tolerance),
            "within_tolerance": not self.failures,
        }


def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    steps: int = 50,
    precision: str = "fp32",
    tolerance: Tolerance = TOLERANCES["fp32"],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Verification:
    """Run bundle and checkpoint on the same prompts and seeds (0, 1, …) and compare.

    Raises:
        SpecError: no prompts, too many, or another number the pipeline does not take.
        ManifestError, CheckpointError, BackendError: either side cannot be loaded.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise SpecError(f"prompts: got {len(prompts)}, expected 1..{MAX_PROMPTS}")
    total = 3 + len(prompts)
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime") as ours:
        feeds = real_feeds(ours, prompts)
        components = []
        for done, (name, feed) in enumerate(feeds.items()):
            progress(name, done, total)
            components.append(_component(ours, checkpoint, name, feed))
        theirs = reference_pipeline(checkpoint)
        pictures = []
        for seed, prompt in enumerate(prompts):
            progress("pictures", 3 + seed, total)
            pictures.append(_picture(ours, theirs, prompt, seed, steps))
        progress("pictures", total, total)
    return Verification(bundle.folder.name, precision, steps, tolerance, tuple(components), tuple(pictures))


def reference_pipeline(checkpoint: Checkpoint) -> LDMTextToImagePipeline:
    """diffusers' own pipeline of the checkpoint, float32 on the CPU."""
    with TemporaryDirectory() as room:
        tokenizer = BertTokenizerFast.from_pretrained(str(tokenizer_folder(checkpoint, Path(room))))
    pipeline = LDMTextToImagePipeline(
        vqvae=load_module(checkpoint, "autoencoder"),
        bert=load_module(checkpoint, "text_encoder"),
        tokenizer=tokenizer,
        unet=load_module(checkpoint, "unet"),
        scheduler=DDIMScheduler.from_config(dict(checkpoint.scheduler_config)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _component(
    ours: LatentDiffusionPipeline, checkpoint: Checkpoint, name: str, feed: dict[str, NDArray[Any]]
) -> ComponentResult:
    module = MODULES[name](load_module(checkpoint, name)).eval()
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feed.values())).numpy()
    (got,) = ours.backends[name].run(feed).values()
    return compared(name, got, expected)


def _picture(
    ours: LatentDiffusionPipeline, theirs: LDMTextToImagePipeline, prompt: str, seed: int, steps: int
) -> PictureResult:
    mine = ours(prompt, seed=seed, eta=ETA, guidance_scale=GUIDANCE, num_inference_steps=steps).images[0]
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(seed)  # the global generator: the noise of the steps continues its stream
        reference = theirs(
            [prompt], generator=generator, eta=ETA, guidance_scale=GUIDANCE, num_inference_steps=steps
        ).images[0]
    pair = [np.asarray(image, np.float64) for image in (mine, reference)]
    worst = int(np.abs(pair[0] - pair[1]).max())
    return PictureResult(prompt, seed, worst, psnr(*pair, peak=255.0), mine, reference)
