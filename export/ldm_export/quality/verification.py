"""Compares a bundle with its checkpoint: each component with torch, and images with diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm_export.bundle.stages import OnProgress
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.families import Family, family_named
from ldm_export.families.description import described
from ldm_export.quality.measures import TOLERANCES, ComponentResult, Tolerance, compared
from ldm_export.quality.real_feeds import RealFeeds, real_feeds, with_start_images
from ldm_export.requests import RequestFields, label
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, CheckpointError, SpecError
from ldm_runtime.images import psnr
from ldm_runtime.model import SAMPLE, TIMESTEP, UNET, Defaults
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["ImageResult", "Verification", "verify"]

MAX_REQUESTS = 1000
_DEFAULTS = ("num_inference_steps", "eta", "guidance_scale")
_SHARED = ("seed", *_DEFAULTS)


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Comparison of one image of the bundle with that of the reference pipeline.

    Attributes:
        request: The request with every option filled in.
        max_pixel: Largest difference of a pixel in 1/255.
        psnr: In dB; None if the two are equal.
        ours, theirs: Images of the bundle and of the reference pipeline.
    """

    request: RequestFields
    max_pixel: int
    psnr: float | None
    ours: Image.Image
    theirs: Image.Image

    @property
    def fields(self) -> RequestFields:
        """Fields of the request without the seed, images, and options that are the same for all requests."""
        return {
            name: value
            for name, value in self.request.items()
            if name not in _SHARED and not isinstance(value, np.ndarray)
        }

    @property
    def label(self) -> str:
        """The request as a short text."""
        return label({name: value for name, value in self.request.items() if name not in _SHARED})


@dataclass(frozen=True, eq=False)
class Verification:
    """All measurements of a verification, and their tolerance."""

    bundle: str
    precision: str
    defaults: Defaults
    tolerance: Tolerance
    components: tuple[ComponentResult, ...]
    images: tuple[ImageResult, ...]

    @property
    def failures(self) -> list[str]:
        """One line for each figure that exceeds the tolerance."""
        allowed, pixel = self.tolerance.component, self.tolerance.pixel
        lines = [
            f"{c.name}: max error {c.max_error:.2e}, allowed {allowed:.2e}"
            for c in self.components
            if not c.max_error <= allowed
        ]
        lines += [
            f"image {p.label!r}: pixels differ by up to {p.max_pixel}/255, allowed {pixel}/255"
            for p in self.images
            if p.max_pixel > pixel
        ]
        return lines + [
            f"image {p.label!r}: PSNR {p.psnr:.1f} dB, expected at least {self.tolerance.psnr:g} dB"
            for p in self.images
            if p.psnr is not None and not p.psnr >= self.tolerance.psnr
        ]

    def facts(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "components": {
                c.name: {"max_error": c.max_error, "cosine": c.cosine, "psnr": c.psnr} for c in self.components
            },
            "images": [
                {"request": dict(p.fields), "seed": p.request["seed"], "max_pixel": p.max_pixel, "psnr": p.psnr}
                for p in self.images
            ],
            "settings": {"precision": self.precision, **{name: getattr(self.defaults, name) for name in _DEFAULTS}},
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
    """Run the bundle and the checkpoint on the same requests and seeds (0, 1, …) and compare the results.

    Args:
        bundle: The bundle to verify.
        checkpoint: The checkpoint that it was built from.
        requests: Requests for one image each; None takes the family's defaults.
        steps: Denoising steps of the images; None takes the model's default. eta and guidance scale are the model's.
        precision: Precision of the graphs.
        tolerance: Bounds of the differences.
        on_progress: Called with the name of a part, the number of finished measurements, and the number of all.

    Raises:
        SpecError: There are no requests or too many, or the model does not take a value.
        ManifestError, CheckpointError, BackendError: One of the two cannot be loaded, or their families differ.
    """
    family = family_named(bundle.manifest.family)
    if checkpoint.family != family.name:
        raise CheckpointError(
            f"{checkpoint.folder}: got a checkpoint of {checkpoint.family}, expected one of the bundle's family "
            f"{family.name}; give the checkpoint that it was built from"
        )
    for name, files, option in (
        ("loras", checkpoint.loras, "files and scales that it was built with (--lora)"),
        ("embeddings", checkpoint.embeddings, "files and tokens that it was built with (--embedding)"),
    ):
        built, given = bundle.manifest.request.get(name, []), [dict(file) for file in files]
        if built != given:
            raise CheckpointError(
                f"{bundle.folder}: was built with {_names(built, name)}, compared with {_names(given, name)}; give the "
                f"{option}"
            )
    requests = family.requests(None) if requests is None else requests
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise SpecError(f"requests: got {len(requests)}, expected 1..{MAX_REQUESTS}")
    defaults = bundle.manifest.defaults
    if steps is not None:
        defaults = replace(defaults, num_inference_steps=steps)
    with _open(bundle, precision) as ours:
        requests = with_start_images(ours, requests, defaults.num_inference_steps)
        names = [name for name in family.components if name in bundle.manifest.components]
        total = len(names) + len(requests)
        feeds = real_feeds(ours, bundle.file, requests)
        components: list[ComponentResult] = []
        for name in names:
            on_progress(name, len(components), total)
            components.append(_component(ours, checkpoint, family, name, feeds))
        theirs = family.reference(checkpoint)
        images: list[ImageResult] = []
        for seed, request in enumerate(requests):
            on_progress("images", len(components) + seed, total)
            options = {name: getattr(defaults, name) for name in _DEFAULTS}
            images.append(_image(ours, family, theirs, {**options, "seed": seed, **ours.example(request), **request}))
        on_progress("images", total, total)
    return Verification(bundle.folder.name, precision, defaults, tolerance, tuple(components), tuple(images))


def _open(bundle: Bundle, precision: str) -> LatentDiffusionPipeline:
    """Open a bundle on ONNX Runtime's CPU provider, which computes as the graphs state, or else on any engine that can.

    Raises:
        ManifestError, BackendError: The bundle is damaged, or no engine here runs it in that precision.
    """
    try:
        return LatentDiffusionPipeline.from_bundle(
            bundle, precision=precision, backend="onnxruntime", device="cpu", safety_checker=False
        )
    except BackendError:  # bf16
        return LatentDiffusionPipeline.from_bundle(bundle, precision=precision, safety_checker=False)


def _component(
    ours: LatentDiffusionPipeline, checkpoint: Checkpoint, family: Family, name: str, feeds: RealFeeds
) -> ComponentResult:
    """Compare a traced component with its torch module; the UNet includes the components split off from it."""
    spec, traced = described(family, checkpoint).components[name], family.components[name]
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


def _names(files: Any, kind: str) -> str:
    named = [f"{file['file']}:{file.get('token') or format(file['scale'], 'g')}" for file in files]
    return ", ".join(named) or ("no LoRA file" if kind == "loras" else "no embedding")


def _image(ours: LatentDiffusionPipeline, family: Family, theirs: Any, request: dict[str, Any]) -> ImageResult:
    mine = ours(**request).images[0]
    sized = {**request, "height": mine.height, "width": mine.width}
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(request["seed"])  # the global generator, which the steps also use
        reference = family.reference_image(theirs, sized, generator)
    if (mine.size, mine.mode) != (reference.size, reference.mode):
        raise CheckpointError(
            f"image: diffusers returns {reference.mode} {reference.size}, the bundle {mine.mode} {mine.size}; "
            "verify it against the checkpoint it was built from"
        )
    pair: list[NDArray[np.float64]] = [np.asarray(one, np.float64) for one in (mine, reference)]
    worst = int(np.abs(pair[0] - pair[1]).max())
    return ImageResult(request, worst, psnr(pair[0], pair[1], peak=255.0), mine, reference)
