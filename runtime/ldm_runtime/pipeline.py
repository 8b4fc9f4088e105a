"""Text to image from a bundle: tokenizer, text encoder, DDIM loop with guidance, decoder. No torch, no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.backends.devices import device_loop
from ldm_runtime.backends.factory import backend_factory
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.selection import Choice, choose
from ldm_runtime.bundle import Bundle
from ldm_runtime.conditioning.text import TextConditioner
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.ddim import DDIM
from ldm_runtime.denoiser import UNet
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError
from ldm_runtime.generation import Generation, Step
from ldm_runtime.guidance import WHOLE, Branches, branches
from ldm_runtime.images import check_latents, to_pil
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.request import Geometry, Plan, Request
from ldm_runtime.schedule import Schedule
from ldm_runtime.signature import check_signature

F32 = NDArray[np.float32]


class LatentDiffusionPipeline:
    """A latent diffusion model ready to run; use ``from_bundle``.

    One pipeline serves one thread at a time. ``choice`` says what runs it, where ``from_bundle`` decided that. Affine
    steps run in ``loop`` where there is one, on a GPU, else in NumPy.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        tokenizer: Tokenizer,
        scheduler: DDIM,
        *,
        keep_loaded: bool = True,
        choice: Choice | None = None,
        loop: DeviceLoop | None = None,
    ):
        missing = [name for name in COMPONENTS if name not in backends]
        if missing:
            raise BackendError(f"pipeline: no backend for {', '.join(missing)}; give one for each component")
        self.backends, self.tokenizer, self.scheduler, self.choice = backends, tokenizer, scheduler, choice
        self.loop = loop
        self.geometry = Geometry.of(backends["decoder"].inputs[0], backends["decoder"].outputs[0])
        self.unet = UNet(backends["unet"])
        self._keep_loaded = keep_loaded
        self.texts = TextConditioner(tokenizer, backends["text_encoder"])

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | Bundle,
        *,
        precision: str | None = None,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        cache: str | Path | None = None,
        keep_loaded: bool = True,
    ) -> LatentDiffusionPipeline:
        """Check a bundle's files against the manifest, and make ready to load its components when they are used.

        Args:
            path: the bundle's folder.
            precision: "fp32", "fp16", "bf16" or "int8"; None for what the bundle was built for, and on OpenVINO for
                bf16 arithmetic where the CPU has it. "fp32" is exact: the same seed gives the same picture.
            backend: "onnxruntime", "openvino", "tensorrt" for the bundle's engines, or "auto" for the fastest here.
            device: of onnxruntime: "auto", "cpu" or "cuda".
            threads: CPU threads of one operator; None for all cores this process may use.
            cache: folder where OpenVINO keeps what it compiled, so that the next process starts sooner.
            keep_loaded: False frees each component after its use, for one generation in little memory.

        Raises:
            ManifestError: the bundle is damaged or made for another version.
            BackendError: the engine is not installed, or the machine lacks what was asked for.
        """
        bundle = path if isinstance(path, Bundle) else Bundle.open(path)
        manifest = bundle.manifest
        check_signature(manifest.components)
        scheduler = DDIM.from_config(manifest.scheduler)
        choice = choose(bundle, backend, precision, device, once=not keep_loaded)
        backends = {
            name: LazyBackend(
                manifest.components[name].spec,
                backend_factory(bundle, name, choice, threads, None if cache is None else Path(cache)),
            )
            for name in COMPONENTS
        }
        if choice.backend == "tensorrt":
            for part in backends.values():
                part.load()  # engines of another GPU or version are refused here
        tokens = manifest.components["text_encoder"].spec.inputs[0].shape[1]
        tokenizer = Tokenizer.from_file(bundle.file(manifest.tokenizer), int(tokens))  # type: ignore[arg-type]
        loop = device_loop(bundle, choice, backends["unet"].load)
        return cls(backends, tokenizer, scheduler, keep_loaded=keep_loaded, choice=choice, loop=loop)

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
        guidance_interval: tuple[float, float] = WHOLE,
        guidance_every: int = 1,
        progress: Callable[[Step], None] = lambda step: None,
    ) -> Generation:
        """Generate images; arguments as in ``Request`` and ``steps``, and ``progress`` is called after each step.

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
        for last in self.steps(request, guidance_interval, guidance_every):
            progress(last)
        assert last is not None
        return Generation(self.decode(last.latents), last.latents)

    def steps(
        self, request: Request, guidance_interval: tuple[float, float] = WHOLE, guidance_every: int = 1
    ) -> Iterator[Step]:
        """The denoising loop, a step at a time: the caller owns progress and may stop at any of them.

        The request is checked before the iterator is returned; errors as in ``__call__``.

        Args:
            guidance_interval, guidance_every: as of ``guidance.branches``; steps that do not compute the unguided
                branch are half the work, and give another picture.
        """
        plan = request.plan(self.geometry)
        schedule = self.scheduler.schedule(request.num_inference_steps, request.eta)
        return self._denoise(plan, schedule, branches(guidance_interval, guidance_every, len(schedule.timesteps)))

    def _denoise(self, plan: Plan, schedule: Schedule, computed: Sequence[Branches]) -> Iterator[Step]:
        conditioning = self.unet.encode(self.context(plan))
        if self.loop is not None and schedule.affine and set(computed) <= {Branches.BOTH}:
            on_device = self.loop.steps(plan, schedule, conditioning)
            for index, (timestep, read) in enumerate(zip(schedule.timesteps, on_device, strict=True)):
                yield Step(index, len(schedule.timesteps), int(timestep), read)
            return
        prompted_alone = {name: array[-plan.shape[0] :] for name, array in conditioning.items()}
        noise = plan.noise()
        latents = next(noise) if plan.latents is None else plan.latents
        guidance, total = np.float32(plan.guidance_scale), len(schedule.timesteps)
        direction = np.zeros_like(latents)
        for index, (timestep, branch) in enumerate(zip(schedule.timesteps, computed, strict=True)):
            both = plan.guided and branch is Branches.BOTH
            sample = np.concatenate([latents, latents]) if both else latents
            shared = conditioning if both else prompted_alone
            predicted = self.unet(sample, np.full(len(sample), timestep, np.int64), shared)
            if both:
                unguided, prompted = np.split(predicted, 2)
                direction = prompted - unguided
                predicted = unguided + guidance * direction
            elif plan.guided and branch is Branches.HELD:
                predicted = predicted + np.float32(plan.guidance_scale - 1) * direction
            latents = schedule.step(latents, predicted, index, next(noise) if schedule.needs_noise else None)
            yield Step(index, total, int(timestep), partial(_itself, latents))

    def context(self, plan: Plan) -> F32:
        """Hidden states of the rows of one UNet call: with guidance the negative prompts' first. [rows, T, D]."""
        rows = [*plan.negative_rows, *plan.rows] if plan.guided else list(plan.rows)
        states = self.texts.encode(list(dict.fromkeys(rows)))
        if not self._keep_loaded:
            self.backends["text_encoder"].close()
        return np.concatenate([states[row] for row in rows])

    def decode(self, latents: F32) -> list[Image.Image]:
        """Latents float32 [B, C, h, w] → B PIL images of 8h × 8w pixels.

        Raises:
            SpecError: the latents do not fit the decoder, or are NaN or far too large.
        """
        check_latents(latents)
        if not self._keep_loaded:
            self._close_unet()
        image = self.backends["decoder"].run({"latents": latents})["image"]
        if not self._keep_loaded:
            self.backends["decoder"].close()
        return to_pil(image)

    def close(self) -> None:
        """Free the engines."""
        self._close_unet()
        for backend in self.backends.values():
            backend.close()

    def _close_unet(self) -> None:
        if self.loop is not None:
            self.loop.close()
        self.backends["unet"].close()

    def __enter__(self) -> LatentDiffusionPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _itself(latents: F32) -> F32:
    return latents
