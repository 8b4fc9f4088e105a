"""Description of a model: family, component specs, conditioning, guidance, latents, scheduler and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_runtime.errors import ManifestError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

__all__ = [
    "DECODER",
    "DENOISERS",
    "SAFETY_CHECKER",
    "SHALLOW_UNET",
    "UNET",
    "ConditioningSpec",
    "Defaults",
    "Latents",
    "ModelDescription",
    "check_model",
]

UNET, DECODER = "unet", "decoder"
"""The two components that every model has: the denoiser, and the decoder of latents. Other names are free."""
SHALLOW_UNET = "shallow_unet"
"""Optional component with the UNet's shallow layers, which run at steps that reuse deep features."""
SAFETY_CHECKER = "safety_checker"
"""Optional component that scores decoded images."""
DENOISERS = (UNET, SHALLOW_UNET)
"""Components that predict noise; each step runs one of them."""
SAMPLE, TIMESTEP, NOISE_PRED, LATENTS, IMAGE = "sample", "timestep", "noise_pred", "latents", "image"
"""Tensors with a fixed meaning: input and output of the UNet, the timestep, input and output of the decoder."""
DEEP_FEATURES = "deep_features"
"""Second output of the UNet in a bundle with a shallow UNet, which takes it as an input: results of the deep layers."""


@dataclass(frozen=True)
class ConditioningSpec:
    """One kind of conditioning and what it needs.

    Attributes:
        kind: Name of a module of ``ldm_runtime.conditioning``, e.g. "text".
        component: The component that encodes it, e.g. "text_encoder"; "" if there is none.
        files: Role of a file -> its path in the bundle, e.g. {"tokenizer": "tokenizer.json"}.
        inputs: Names of the tensors it provides to other components, e.g. ("context",).
        settings: Numbers that the kind of conditioning needs, e.g. {"classes": 1000} for labels.
    """

    kind: str
    component: str
    files: Mapping[str, str]
    inputs: tuple[str, ...]
    settings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Latents:
    """Channels of the latents, and pixels per latent along each side (the autoencoder's downsampling factor)."""

    channels: int
    factor: int


@dataclass(frozen=True)
class Defaults:
    """Sampling options used where a request leaves them out.

    Attributes:
        num_inference_steps: Denoising steps.
        eta: DDIM's eta.
        guidance_scale: Guidance scale; 1 turns guidance off.
        full_share: With feature caching, share of the UNet calls at the start that compute the whole UNet.
    """

    num_inference_steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
    full_share: float = 0.1


@dataclass(frozen=True)
class ModelDescription:
    """Everything that the runtime needs to sample from a model, except its files.

    Attributes:
        family: Name of the pipeline family, e.g. "text_to_image".
        components: Spec of every component by name; ``UNET`` and ``DECODER`` are always present.
        conditioning: What conditions the UNet; empty for an unconditional model.
        guidance: Branches of classifier-free guidance in the order of their rows, e.g. ("unconditional",
            "conditional"); empty for a model without guidance.
        latents: Channels and factor.
        scheduler: diffusers' scheduler options, with the class name under "class".
        defaults: Sampling options of the model.
        guidance_above_one: True if only guidance scales above 1 turn guidance on, as in StableDiffusionPipeline. False
            if all scales except 1 do, as in LDMTextToImagePipeline.
    """

    family: str
    components: Mapping[str, ComponentSpec]
    conditioning: tuple[ConditioningSpec, ...]
    guidance: tuple[str, ...]
    latents: Latents
    scheduler: Mapping[str, Any]
    defaults: Defaults = field(default_factory=Defaults)
    guidance_above_one: bool = False

    def once_per(self, runs: str) -> tuple[ComponentSpec, ...]:
        """Components that derive UNet inputs and run once per ``runs`` ("request" or "schedule"), in their order.

        Components that encode conditioning are not included, because their conditioner runs them.
        """
        encoders = {entry.component for entry in self.conditioning}
        return tuple(spec for name, spec in self.components.items() if spec.runs == runs and name not in encoders)


def check_model(model: ModelDescription) -> None:
    """Check that the components fit together: every UNet input has a source, and latents have one shape.

    Raises:
        ManifestError: They do not; the message names the component, its spec and what is expected.
    """
    missing = [name for name in (UNET, DECODER) if name not in model.components]
    if missing:
        raise ManifestError(f"components: {', '.join(missing)} missing, expected {UNET} and {DECODER}; rebuild it")
    unet, decoder = model.components[UNET], model.components[DECODER]
    for spec, side, tensors, names in (
        (unet, "inputs", unet.inputs[:1], (SAMPLE,)),
        (unet, "outputs", unet.outputs, (NOISE_PRED, DEEP_FEATURES)[: 1 + (SHALLOW_UNET in model.components)]),
        (decoder, "inputs", decoder.inputs, (LATENTS,)),
        (decoder, "outputs", decoder.outputs, (IMAGE,)),
    ):
        got = tuple((tensor.name, tensor.dtype, len(tensor.shape)) for tensor in tensors)
        if got != tuple((name, "float32", 4) for name in names):
            raise ManifestError(f"{spec.name}: {side}: got {got}, expected {', '.join(names)} as float32 of 4 axes")
    _check_sources(model)
    _check_shallow(model)
    channels = {model.latents.channels, decoder.inputs[0].shape[1], unet.outputs[0].shape[1]}
    if len(channels) != 1:
        raise ManifestError(f"latents: got channels {sorted(map(str, channels))}, expected one number; rebuild it")
    for axis in (2, 3):
        for which in ("min", "opt", "max"):
            _check_factor(decoder.inputs[0], decoder.outputs[0], axis, which, model.latents.factor)


def _check_sources(model: ModelDescription) -> None:
    """Check that each component's inputs come from the sampler, a conditioning, or a component before it."""
    known = {SAMPLE, TIMESTEP} | {name for entry in model.conditioning for name in entry.inputs}
    for entry in model.conditioning:
        if entry.component and entry.component not in model.components:
            raise ManifestError(f"conditioning: {entry.kind}: component {entry.component!r:.60} is missing; rebuild it")
    denoisers = [model.components[name] for name in DENOISERS if name in model.components]
    for spec in (*model.once_per("request"), *model.once_per("schedule"), *denoisers):
        if unknown := [tensor.name for tensor in spec.inputs if tensor.name not in known]:
            raise ManifestError(f"{spec.name}: input {unknown[0]!r:.60} comes from nowhere; rebuild the bundle")
        known |= {tensor.name for tensor in spec.outputs}


def _check_shallow(model: ModelDescription) -> None:
    """Check that the shallow UNet takes what the UNet takes and returns, and predicts the same noise."""
    shallow, unet = model.components.get(SHALLOW_UNET), model.components[UNET]
    if shallow is None:
        return
    if shallow.outputs != unet.outputs[:1] or unet.outputs[1] not in shallow.inputs or shallow.runs != unet.runs:
        raise ManifestError(
            f"{SHALLOW_UNET}: got {', '.join(map(str, (*shallow.inputs, *shallow.outputs)))}, expected "
            f"{unet.outputs[1]} among the inputs and {unet.outputs[0]} as the output; rebuild the bundle"
        )
    if foreign := [tensor for tensor in shallow.inputs if tensor not in (*unet.inputs, unet.outputs[1])]:
        raise ManifestError(f"{SHALLOW_UNET}: input {foreign[0]} is none of the UNet's; rebuild the bundle")


def _check_factor(latents: TensorSpec, image: TensorSpec, side: int, which: str, factor: int) -> None:
    if isinstance(latents.shape[side], Axis) != isinstance(image.shape[side], Axis) or (
        latents.bounds(which)[side] * factor != image.bounds(which)[side]
    ):
        raise ManifestError(f"decoder: {latents} gives {image}, expected {factor} pixels per latent; rebuild it")
