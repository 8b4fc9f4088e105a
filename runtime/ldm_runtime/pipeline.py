"""The pipeline: generates images from a bundle by conditioning, a denoising loop with guidance, and the decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.backends.factory import open_model
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import QUALITY_REPORT
from ldm_runtime.conditioning import SafetyChecker, StartImageConditioner, open_conditioner
from ldm_runtime.decoding import Decoding
from ldm_runtime.denoiser import Denoiser, Tensors
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError
from ldm_runtime.generation import Generation, Step
from ldm_runtime.geometry import Geometry
from ldm_runtime.host_loop import host_steps
from ldm_runtime.images import check_latents, to_pil
from ldm_runtime.loras.selection import no_selection
from ldm_runtime.loras.sets import LoraSets
from ldm_runtime.loras.sets import lora_selections as checked_selections
from ldm_runtime.model import DECODER, DENOISERS, SAFETY_CHECKER, ModelDescription
from ldm_runtime.option_names import check_names
from ldm_runtime.pipeline_options import NO_EXTRAS, BundleOptions, PipelineExtras, with_defaults
from ldm_runtime.plan import Plan
from ldm_runtime.planner import Planner
from ldm_runtime.replaceable_loop import ReplaceableLoop
from ldm_runtime.request import Request, RequestOptions
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.start import Start
from ldm_runtime.verified_file import VerifiedFile

__all__ = ["LatentDiffusionPipeline"]

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]


class LatentDiffusionPipeline:
    """A latent diffusion model that is ready to generate images. Create it with ``from_bundle``.

    Threads may share a pipeline: each component runs for one thread at a time, and results are those of separate calls.
    A device loop runs one request at a time; if another request starts meanwhile, the first one raises
    ``BackendError``. To serve many callers, use ``batching.scheduler.BatchScheduler``.

    Args:
        model: Description of the model, as in the manifest.
        backends: Backend of each component; they are closed with the pipeline.
        files: Returns the path of a file that a conditioning names, e.g. "tokenizer.json".
        keep_loaded: True by default. False frees each component after its use, for one generation in little memory.
        safety_checker: False does not run the model's safety checker.
        extras: The selected engine, and more that ``from_bundle`` takes from a bundle.

    Examples:
        >>> pipe = LatentDiffusionPipeline.from_bundle("bundle")
        >>> pipe("a red circle", seed=42, num_inference_steps=20).images[0].save("circle.png")
    """

    def __init__(
        self,
        model: ModelDescription,
        backends: Mapping[str, Backend],
        files: Callable[[str], Path],
        *,
        keep_loaded: bool = True,
        safety_checker: bool = True,
        extras: PipelineExtras = NO_EXTRAS,
    ):
        encoders = [entry.component for entry in model.conditioning if entry.component]
        derived = [spec.name for runs in ("request", "schedule") for spec in model.once_per(runs)]
        if missing := [name for name in (*encoders, *derived, "unet", DECODER) if name not in backends]:
            raise BackendError(f"pipeline: no backend for {', '.join(missing)}; give one for each component")
        self.model, self.backends, self.choice = model, dict(backends), extras.choice
        self._loop = ReplaceableLoop(extras.loop)
        self.geometry = Geometry.of(model)
        self.scheduler = scheduler_from_config(model.scheduler)
        opened = [open_conditioner(entry, backends, files) for entry in model.conditioning]
        self.conditioners = tuple(one for one in opened if not isinstance(one, SafetyChecker))
        checkers = [one for one in opened if isinstance(one, SafetyChecker)]
        checker = checkers[0] if checkers and safety_checker else None
        self._decoding = Decoding(self.backends, self.conditioners, checker, keep_loaded)
        self.denoiser = Denoiser(model, backends)
        self.record, self._loras = extras.record, extras.loras
        select = no_selection if extras.loras is None else extras.loras.check
        self._planner = Planner(model, self.geometry, self.scheduler, self.conditioners, extras.record, select)
        self._keep_loaded = keep_loaded

    @classmethod
    def from_bundle(cls, path: str | Path | Bundle, **options: Unpack[BundleOptions]) -> LatentDiffusionPipeline:
        """Check a bundle's files against the manifest and prepare its components, which are loaded on first use.

        Args:
            path: The bundle's folder.
            precision: "fp32", "fp16", "bf16" or "int8". None (default) takes the precision that the bundle was built
                for, and on OpenVINO bf16 arithmetic if the CPU has it. With "fp32", a seed gives the image of
                diffusers, up to rounding.
            backend: "onnxruntime", "openvino", "tensorrt" for the bundle's engines, or an object with the interface of
                ``backends.engine.Engine``. "auto" (default) takes the fastest engine here, and the next one if that
                does not load or does not run; ``choice.reason`` and a warning say why.
            device: For onnxruntime: "auto" (default), "cpu" or "cuda".
            threads: CPU threads of one operator; None (default) for all cores this process may use.
            cache: Folder where OpenVINO keeps compiled graphs, so that the next process starts sooner.
            keep_loaded: True by default. False frees each component after its use, for one generation in little memory.
            safety_checker: True by default. False returns images that the bundle's safety checker would flag; a warning
                says so.
            lora_selections: Selections of LoRA adapters (``Request.loras``) whose components stay loaded, 1 to 64,
                2 by default. Each takes the memory of the components that it changes.

        Raises:
            SpecError: An option is unknown, or ``threads`` or ``lora_selections`` is out of range.
            ManifestError: The bundle is damaged or made for another version.
            BackendError: The engine is not installed, or the machine lacks what was asked for.
        """
        chosen = with_defaults(options)
        kept = checked_selections(chosen["lora_selections"])
        keep_loaded, cache = chosen["keep_loaded"], chosen["cache"]
        bundle = path if isinstance(path, Bundle) else Bundle.open(path)
        opened = open_model(
            bundle,
            chosen["backend"],
            precision=chosen["precision"],
            device=chosen["device"],
            threads=chosen["threads"],
            cache=None if cache is None else Path(cache),
            once=not keep_loaded,
        )
        verified: list[VerifiedFile] = []

        def file(name: str) -> Path:
            verified.append(bundle.verified(name))
            return verified[-1].path

        def adapted(changed: Mapping[str, Backend]) -> LatentDiffusionPipeline:
            backends = {**opened.backends, **changed}
            extras = PipelineExtras(opened.choice)
            return cls(bundle.manifest.model, backends, bundle.file, keep_loaded=keep_loaded, extras=extras)

        pipeline = cls(
            bundle.manifest.model,
            opened.backends,
            file,
            keep_loaded=keep_loaded,
            safety_checker=chosen["safety_checker"],
            extras=PipelineExtras(
                opened.choice,
                opened.loop,
                bundle.quality() if QUALITY_REPORT in bundle.manifest.files else None,
                LoraSets(bundle, opened, adapted, kept),
            ),
        )
        if not chosen["safety_checker"] and SAFETY_CHECKER in bundle.manifest.components:
            log.warning("safety checker: it is off; images are not checked, keep them from the public unfiltered")
        for one in verified:  # the conditioners have read them by now
            one.check()
        pipeline._loop.opened, opened.on_change = opened, pipeline._follow
        return pipeline

    def __repr__(self) -> str:
        """Family, components and engine."""
        chosen = "" if self.choice is None else f", {self.choice.backend} {self.choice.graph} on {self.choice.device}"
        return f"<LatentDiffusionPipeline {self.model.family}: {', '.join(self.model.components)}{chosen}>"

    @property
    def precision(self) -> str | None:
        """The precision that runs, as ``from_bundle`` takes it; None if the caller has opened the backends."""
        return None if self.choice is None else self.choice.precision

    @property
    def loop(self) -> DeviceLoop | None:
        """The denoising loop on a device; None if it runs in NumPy."""
        return self._loop.current

    @loop.setter
    def loop(self, loop: DeviceLoop | None) -> None:
        self._loop.current = loop

    def _follow(self) -> None:
        """Adopt the new choice and loop after the engine was replaced. The old loop is freed with the denoiser."""
        opened = self._loop.opened
        assert opened is not None
        self._loop.replace(opened.loop)
        self.choice = opened.choice
        if self._loras is not None:
            self._loras.clear()  # they run on the engine before

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        on_progress: Callable[[Step], None] = lambda step: None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """Generate images.

        Args:
            prompts: See ``Request``.
            on_progress: Called after each step.
            options: Other fields of ``Request``.

        Raises:
            SpecError: A value cannot be used; the message names it.
            BackendError: The engine failed.
        """
        last = None
        check_names(options)
        plan = self.plan(Request(prompts, **options))
        for last in self._denoise(plan):
            on_progress(last)
        assert last is not None
        return self.generation(last.latents, plan.request)

    def generation(self, latents: F32, request: Request) -> Generation:
        """Decode latents float32 [B, C, h, w] of a request, and check and complete the images.

        Errors are those of ``decode`` and ``finish``.
        """
        images, flagged = self.finish(request, self.decode_array(latents))
        return Generation(images, latents, flagged)

    def plan(self, request: Request) -> Plan:
        """Check a request against the model and compute everything that its denoising loop needs.

        Raises:
            SpecError: Names the field, what was given and what is expected.
        """
        return self._planner.plan(request, self.precision)

    def example(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Fields of a small valid request for one image, with the fields that the model's conditioning needs.

        Args:
            given: Names of fields that the request already has. A kind of conditioning that reads one of them adds no
                fields.
        """
        kinds = [one for one in self.conditioners if not (one.fields - {"images_per_prompt"}) & set(given)]
        return {name: value for one in kinds for name, value in one.example().items()}

    def steps(self, request: Request) -> Iterator[Step]:
        """Run the denoising loop one step at a time. The caller may stop at any step.

        The request is checked before the iterator is returned; errors as in ``__call__``.
        """
        return self._denoise(self.plan(request))

    def with_loras(self, plan: Plan) -> LatentDiffusionPipeline:
        """The pipeline that denoises a plan: with the plan's LoRA adapters, or this one if the plan has none.

        It shares the components that the adapters do not change. It is freed when other adapters are selected, or with
        this pipeline; closing it is not needed.

        Raises:
            LdmError: An adapter or a graph was damaged or replaced.
        """
        return self if self._loras is None or not plan.loras else self._loras.get(plan.loras)

    @property
    def most_loras(self) -> int:
        """Selections of adapters, beside none, whose components stay loaded at the same time."""
        return 0 if self._loras is None else self._loras.most

    def _denoise(self, plan: Plan) -> Iterator[Step]:
        timesteps = plan.trajectory.timesteps
        steps = self.with_loras(plan)._loop_steps(plan)
        for index, (timestep, read) in enumerate(zip(timesteps, steps, strict=True)):
            yield Step(index, len(timesteps), timestep.item(), read)

    def _loop_steps(self, plan: Plan) -> Iterator[Callable[[], F32]]:
        """Steps of the device loop if there is one that supports the plan, otherwise of the loop in NumPy.

        If the device loop cannot start on this machine, ``OpenModel`` replaces the engine.
        """
        start = self.begin(plan)
        encoded = self.encode(plan, start)
        while (loop := self.loop) is not None and loop.takes(plan):
            reads = loop.steps(plan, encoded, self.denoiser, start)
            try:
                first = next(reads)
            except BackendError as error:
                self.loop_failed(loop, error)
                start = self.begin(plan)  # the loop has drawn some of the noise
            else:
                self.loop_started(loop)
                return chain([first], reads)
        return host_steps(plan, encoded, self.denoiser, start)

    def loop_started(self, loop: DeviceLoop) -> None:
        """Record that a loop runs on this machine, so that a later failure does not replace the engine."""
        self._loop.started(loop)

    def loop_failed(self, loop: DeviceLoop, error: BackendError) -> None:
        """Replace the engine of a loop that failed before its first step, and update ``loop`` and ``choice``.

        Raises:
            BackendError: ``error``, if the loop has run before or no other engine may run the model.
        """
        self._loop.failed(loop, error)

    def begin(self, plan: Plan) -> Start:
        """Draw a plan's initial latents; if it starts from an image, encode the image.

        Raises:
            BackendError: The engine failed.
        """
        noise = plan.noise()
        if plan.start_image is None:
            return Start(plan.start(noise)[0], noise)
        (conditioner,) = (one for one in self.conditioners if isinstance(one, StartImageConditioner))
        return conditioner.begin(plan, plan.start_image, noise)

    def condition(self, plan: Plan, start: Start) -> Tensors:
        """Compute the UNet's conditioning inputs for all rows of a plan: [rows, …], one branch after the other."""
        return self.denoiser.condition(self.encode(plan, start))

    def encode(self, plan: Plan, start: Start) -> Tensors:
        """Run the conditioners for all rows of a plan; arrays [rows, …], one branch after the other."""
        parts = [
            {
                name: rows if len(rows) == plan.images else np.repeat(rows, plan.images, axis=0)
                for one in self.conditioners
                for name, rows in one.rows(plan.request, branch).items()
            }
            | dict(start.conditioning)
            for branch in plan.branches
        ]
        if not self._keep_loaded:
            for conditioner in self.conditioners:
                conditioner.close()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def decode(self, latents: F32) -> list[Image.Image]:
        """Decode latents float32 [B, C, h, w] to B PIL images, without ``finish``.

        Raises:
            SpecError: The decoder does not take the latents, or they are NaN or far too large.
            BackendError: The engine failed.
        """
        return to_pil(self.decode_array(latents))

    def decode_array(self, latents: F32) -> F32:
        """Decode latents float32 [B, C, h, w] to images float32 [B, channels, H, W] in [0, 1]; errors as ``decode``.

        The images are neither checked nor completed; ``generation`` returns those of a request. On a GPU, as many
        images are decoded together as fit into its free memory.
        """
        check_latents(latents)
        if not self._keep_loaded:
            self._close_denoiser()
        return self._decoding.decode(latents)

    def decodes_together(self, latents: F32) -> bool:
        """True if decoding many images in one call saves time, as on a GPU. Also False if the decoder does not load."""
        return self._decoding.decodes_together(latents)

    def finish(self, request: Request, images: F32) -> tuple[F32, tuple[bool, ...] | None]:
        """Complete decoded images float32 [B, channels, H, W], e.g. with the original outside the mask.

        Images that the safety checker flags become black before that.

        Returns:
            The images, and for each whether it was flagged; None without a safety checker.

        Raises:
            SpecError: An image for the safety checker contains NaN or infinite values.
            BackendError: The engine failed.
        """
        return self._decoding.finish(request, images)

    def load(self) -> None:
        """Load every component now instead of on first use, so that the bundle may be replaced while this one runs.

        With a device loop, the UNet for the NumPy loop is not loaded, because it would take the device's memory twice.
        A safety checker that is switched off is not loaded either.

        Raises:
            LdmError: A component does not load, or the bundle has already been replaced.
        """
        unused = {*(DENOISERS if self.loop is not None else ()), *(() if self._decoding.checks else (SAFETY_CHECKER,))}
        for name, backend in self.backends.items():
            if isinstance(backend, LazyBackend) and name not in unused:
                backend.load()

    def close(self) -> None:
        """Free the engines."""
        self._close_denoiser()
        for backend in self.backends.values():
            backend.close()

    def _close_denoiser(self) -> None:
        self._loop.close()
        self.denoiser.close()
        if self._loras is not None:
            self._loras.clear()

    def __enter__(self) -> LatentDiffusionPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
