"""Text to image from a bundle: tokenizer, text encoder, DDIM loop with guidance, decoder. No torch, no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.tensorrt import TensorRtBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BackendError
from ldm_runtime.images import to_pil
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.request import Geometry, Plan, Request
from ldm_runtime.schedule import Schedule
from ldm_runtime.signature import check_signature
from ldm_runtime.tokenizer import Tokenizer

F32 = NDArray[np.float32]
BACKENDS = ("onnxruntime", "tensorrt")


@dataclass(frozen=True, eq=False)
class Step:
    """One finished denoising step: its index from 0, how many there are, its timestep, and the latents after it."""

    index: int
    total: int
    timestep: int
    latents: F32


@dataclass(frozen=True, eq=False)
class Generation:
    """What a call gives: PIL images in the order of the prompts, those of one prompt side by side, and the latents."""

    images: list[Image.Image]
    latents: F32


class LatentDiffusionPipeline:
    """A latent diffusion model ready to run; use ``from_bundle``.

    One pipeline serves one thread at a time.
    """

    def __init__(self, backends: dict[str, Backend], tokenizer: Tokenizer, scheduler: DDIM):
        missing = [name for name in COMPONENTS if name not in backends]
        if missing:
            raise BackendError(f"pipeline: no backend for {', '.join(missing)}; give one for each component")
        self.backends, self.tokenizer, self.scheduler = backends, tokenizer, scheduler
        self.geometry = Geometry.of(backends["decoder"].inputs[0], backends["decoder"].outputs[0])

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | Bundle,
        *,
        precision: str | None = None,
        backend: str = "onnxruntime",
        device: str = "auto",
        threads: int | None = None,
    ) -> LatentDiffusionPipeline:
        """Load a bundle; every file it uses is checked against the manifest first.

        Args:
            path: the bundle's folder.
            precision: which graphs: "fp32", "fp16" or "bf16"; None for what the bundle was built for.
            backend: "onnxruntime", or "tensorrt" for the bundle's engines, on a GPU.
            device: of onnxruntime: "auto", "cpu" or "cuda".
            threads: of onnxruntime: CPU threads of one operator; None for all cores this process may use.

        Raises:
            ManifestError: the bundle is damaged or made for another version.
            BackendError: the engine is not installed or cannot load the graphs.
        """
        bundle = path if isinstance(path, Bundle) else Bundle.open(path)
        manifest = bundle.manifest
        check_signature(manifest.components)
        scheduler = DDIM.from_config(manifest.scheduler)
        precision = precision or bundle.precision
        if backend not in BACKENDS:
            raise BackendError(f"backend: got {backend!r:.40}, expected one of {', '.join(BACKENDS)}")
        backends: dict[str, Backend] = {
            name: TensorRtBackend(bundle, name, precision)
            if backend == "tensorrt"
            else OnnxRuntimeBackend(bundle.graph(name, precision), manifest.components[name].spec, device, threads)
            for name in COMPONENTS
        }
        tokens = backends["text_encoder"].inputs[0].shape[1]
        tokenizer = Tokenizer.from_file(bundle.file(manifest.tokenizer), int(tokens))  # type: ignore[arg-type]
        return cls(backends, tokenizer, scheduler)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        images_per_prompt: int = 1,
        latents: F32 | None = None,
        progress: Callable[[Step], None] = lambda step: None,
    ) -> Generation:
        """Generate images; the arguments are those of ``Request``, and ``progress`` is called after each step.

        Raises:
            SpecError: a value cannot be used; the message names it.
            BackendError: the engine failed.
        """
        request = Request(
            prompts,
            negative_prompt=negative_prompt,
            seed=seed,
            eta=eta,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            images_per_prompt=images_per_prompt,
            latents=latents,
        )
        last = None
        for last in self.steps(request):
            progress(last)
        assert last is not None
        return Generation(self.decode(last.latents), last.latents)

    def steps(self, request: Request) -> Iterator[Step]:
        """The denoising loop, a step at a time: the caller owns progress and may stop at any of them.

        The request is checked before the iterator is returned; errors as in ``__call__``.
        """
        plan = request.plan(self.geometry)
        return self._denoise(plan, self.scheduler.schedule(request.num_inference_steps, request.eta))

    def _denoise(self, plan: Plan, schedule: Schedule) -> Iterator[Step]:
        context = self._context(plan)
        noise = plan.noise()
        latents = next(noise) if plan.latents is None else plan.latents
        guidance, total = np.float32(plan.guidance_scale), len(schedule.timesteps)
        for index, timestep in enumerate(schedule.timesteps):
            sample = np.concatenate([latents, latents]) if plan.guided else latents
            feed = {"sample": sample, "timestep": np.full(len(sample), timestep, np.int64), "context": context}
            predicted = self.backends["unet"].run(feed)["noise_pred"]
            if plan.guided:
                unguided, prompted = np.split(predicted, 2)
                predicted = unguided + guidance * (prompted - unguided)
            latents = schedule.step(latents, predicted, index, next(noise) if schedule.needs_noise else None)
            yield Step(index, total, int(timestep), latents)

    def _context(self, plan: Plan) -> F32:
        """Hidden states of the rows of one UNet call: with guidance the negative prompts' first. [rows, T, D]."""
        rows = [*plan.negative_rows, *plan.rows] if plan.guided else list(plan.rows)
        texts = list(dict.fromkeys(rows))
        most = self.geometry.images  # with guidance there may be one text more than images
        parts = [self.tokenizer(texts[start : start + most]) for start in range(0, len(texts), most)]
        encoded = np.concatenate([self.backends["text_encoder"].run({"input_ids": ids})["context"] for ids in parts])
        context: F32 = encoded[[texts.index(row) for row in rows]]
        return context

    def decode(self, latents: F32) -> list[Image.Image]:
        """Latents float32 [B, C, h, w] → B PIL images of 8h × 8w pixels.

        Raises:
            SpecError: the latents do not fit the decoder.
        """
        return to_pil(self.backends["decoder"].run({"latents": latents})["image"])

    def close(self) -> None:
        """Free the engines."""
        for backend in self.backends.values():
            backend.close()

    def __enter__(self) -> LatentDiffusionPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
