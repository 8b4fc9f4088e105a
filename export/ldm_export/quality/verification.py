"""Measures a bundle against the checkpoint it came from: each component against torch, images against diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm_export.bundle.stages import OnProgress
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.families import Family, family_named
from ldm_export.quality.measures import TOLERANCES, ComponentResult, Tolerance, compared
from ldm_export.quality.real_feeds import RealFeeds, real_feeds
from ldm_export.requests import RequestFields, label
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import CheckpointError, SpecError
from ldm_runtime.images import psnr
from ldm_runtime.model import SAMPLE, TIMESTEP, UNET, Defaults
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["PictureResult", "Verification", "verify"]

MAX_REQUESTS = 1000
_SHARED = ("seed", "num_inference_steps", "eta", "guidance_scale")


@dataclass(frozen=True, eq=False)
class PictureResult:
    """One image, ours and diffusers'.

    Attributes:
        request: Its request with every option filled in.
        max_pixel: Largest difference of a pixel in 1/255.
        psnr: In dB; None where the two are equal.
        ours, theirs: The images.
    """

    request: RequestFields
    max_pixel: int
    psnr: float | None
    ours: Image.Image
    theirs: Image.Image

    @property
    def fields(self) -> RequestFields:
        """The request without the seed, the options that all images share, and images."""
        return {
            name: value
            for name, value in self.request.items()
            if name not in _SHARED and not isinstance(value, np.ndarray)
        }

    @property
    def label(self) -> str:
        """The request as a short text."""
        return label(self.fields)


@dataclass(frozen=True, eq=False)
class Verification:
    """All that was measured, and what of it is beyond the tolerance."""

    bundle: str
    precision: str
    defaults: Defaults
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
            f"picture {p.label!r}: pixels differ by up to {p.max_pixel}/255, allowed {pixel}/255"
            for p in self.pictures
            if p.max_pixel > pixel
        ]
        return lines + [
            f"picture {p.label!r}: PSNR {p.psnr:.1f} dB, expected at least {self.tolerance.psnr:g} dB"
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
                {"request": dict(p.fields), "seed": p.request["seed"], "max_pixel": p.max_pixel, "psnr": p.psnr}
                for p in self.pictures
            ],
            "settings": {"precision": self.precision, **asdict(self.defaults)},
            "tolerance": asdict(self.tolerance),
            "within_tolerance": not self.failures,
        }


def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    requests: Sequence[RequestFields] | None = None,
    steps: int | None = None,
    precision: str = "fp32",
    tolerance: Tolerance = TOLERANCES["fp32"],
    on_progress: OnProgress = lambda part, done, total: None,
) -> Verification:
    """Run bundle and checkpoint on the same requests and seeds (0, 1, …) and compare.

    Args:
        bundle: What is measured.
        checkpoint: What it was built from.
        requests: One image each; None takes the family's defaults.
        steps: Denoising steps of the images; None takes the model's default. eta and guidance scale are the model's.
        precision: Of the graphs.
        tolerance: What is accepted.
        on_progress: Called with what is measured, and how many measurements are done and in total.

    Raises:
        SpecError: No requests, too many, or a value the model does not take.
        ManifestError, CheckpointError, BackendError: Either side cannot be loaded, or they are of two families.
    """
    family = family_named(bundle.manifest.family)
    if checkpoint.family != family.name:
        raise CheckpointError(
            f"{checkpoint.folder}: got a checkpoint of {checkpoint.family}, expected one of the bundle's family "
            f"{family.name}; give the checkpoint that it was built from"
        )
    requests = family.requests(None) if requests is None else requests
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise SpecError(f"requests: got {len(requests)}, expected 1..{MAX_REQUESTS}")
    total = len(family.components) + len(requests)
    defaults = bundle.manifest.defaults
    if steps is not None:
        defaults = Defaults(steps, defaults.eta, defaults.guidance_scale)
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime", device="cpu") as ours:
        feeds = real_feeds(ours, bundle.file, requests)
        components: list[ComponentResult] = []
        for name in family.components:
            on_progress(name, len(components), total)
            components.append(_component(ours, checkpoint, family, name, feeds))
        theirs, example = family.reference(checkpoint), ours.example()
        pictures: list[PictureResult] = []
        for seed, request in enumerate(requests):
            on_progress("pictures", len(components) + seed, total)
            pictures.append(_picture(ours, family, theirs, {**asdict(defaults), "seed": seed, **example, **request}))
        on_progress("pictures", total, total)
    return Verification(bundle.folder.name, precision, defaults, tolerance, tuple(components), tuple(pictures))


def _component(
    ours: LatentDiffusionPipeline, checkpoint: Checkpoint, family: Family, name: str, feeds: RealFeeds
) -> ComponentResult:
    """A traced component against its torch module; the UNet together with what was split off it."""
    spec, traced = family.describe(checkpoint).components[name], family.components[name]
    module = traced.wrap(load_module(checkpoint, traced.module)).eval()
    with torch.inference_mode():
        result = module(*(torch.from_numpy(feeds.sources[tensor.name]) for tensor in spec.inputs))
    results = result if isinstance(result, tuple) else (result,)
    expected = {tensor.name: one.numpy() for tensor, one in zip(spec.outputs, results, strict=True)}
    if name != UNET:
        return compared(name, ours.backends[name].run(feeds.components[name]), expected)
    conditioning = ours.denoiser.condition(feeds.sources)
    schedule = ours.denoiser.embed(feeds.sources[TIMESTEP])
    predicted = ours.denoiser(feeds.sources[SAMPLE], schedule, conditioning)
    return compared(name, {spec.outputs[0].name: predicted}, expected)


def _picture(ours: LatentDiffusionPipeline, family: Family, theirs: Any, request: dict[str, Any]) -> PictureResult:
    mine = ours(**request).images[0]
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(request["seed"])  # the global generator: the noise of the steps continues it
        reference = family.reference_image(theirs, request, generator)
    pair: list[NDArray[np.float64]] = [np.asarray(image, np.float64) for image in (mine, reference)]
    worst = int(np.abs(pair[0] - pair[1]).max())
    return PictureResult(request, worst, psnr(pair[0], pair[1], peak=255.0), mine, reference)
