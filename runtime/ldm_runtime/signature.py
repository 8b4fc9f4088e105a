"""What the pipeline takes for granted of a bundle's components, checked before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import Component
from ldm_runtime.specs import Axis, TensorSpec

_Side = tuple[tuple[str, str, int], ...]  # name, dtype and rank of each tensor
_EXPECTED: dict[str, tuple[_Side, _Side]] = {
    "text_encoder": ((("input_ids", "int64", 2),), (("context", "float32", 3),)),
    "unet": (
        (("sample", "float32", 4), ("timestep", "int64", 1), ("context", "float32", 3)),
        (("noise_pred", "float32", 4),),
    ),
    "decoder": ((("latents", "float32", 4),), (("image", "float32", 4),)),
}


def check_signature(components: Mapping[str, Component]) -> None:
    """Check names, dtypes and ranks, and that tokens, channels and pixels per latent are numbers that agree.

    Raises:
        ManifestError: names the component, what its spec says and what is expected.
    """
    for name, sides in _EXPECTED.items():
        spec = components[name].spec
        for side, tensors, expected in zip(("inputs", "outputs"), (spec.inputs, spec.outputs), sides, strict=True):
            got = tuple((tensor.name, tensor.dtype, len(tensor.shape)) for tensor in tensors)
            if got != expected:
                raise ManifestError(f"{name}: {side} are {got}, expected {expected}; rebuild the bundle")
    tokens = components["text_encoder"].spec.inputs[0].shape[1]
    latents, image = components["decoder"].spec.inputs[0], components["decoder"].spec.outputs[0]
    channels = {latents.shape[1], components["unet"].spec.inputs[0].shape[1]}
    if isinstance(tokens, Axis) or len(channels) != 1 or any(isinstance(number, Axis) for number in channels):
        raise ManifestError(f"got {tokens} tokens and {channels} latent channels, expected fixed numbers that agree")
    if len({_factor(latents, image, side) for side in (2, 3)}) != 1:
        raise ManifestError(f"decoder: {latents} gives {image}, expected one whole number of pixels per latent")


def _factor(latents: TensorSpec, image: TensorSpec, side: int) -> int | None:
    sizes = [(latents.bounds(which)[side], image.bounds(which)[side]) for which in ("min", "opt", "max")]
    factors = {pixels // latent if pixels % latent == 0 else None for latent, pixels in sizes}
    factor = factors.pop()
    if factors or not factor:
        raise ManifestError(f"decoder: {latents} gives {image}, expected one whole number of pixels per latent")
    return factor
