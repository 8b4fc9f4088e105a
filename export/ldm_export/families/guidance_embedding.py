"""Models whose UNet embeds the guidance scale, e.g. latent consistency models: one branch and an additional input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm_export.graph.model_specs import conditioned, rows
from ldm_runtime.model import UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.specs import Axis, TensorSpec

__all__ = ["TIMESTEP_COND", "embedded_guidance", "with_guidance_embedding"]

TIMESTEP_COND = "timestep_cond"
DEFAULTS = Defaults(num_inference_steps=4, eta=0.0, guidance_scale=8.5)
"""Sampling options of diffusers' LatentConsistencyModelPipeline."""


def embedded_guidance(unet: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Argument ``further`` of ``text_problems`` for a UNet with or without an embedded guidance scale."""
    return {"time_cond_proj_dim": (unet["time_cond_proj_dim"],)}


def with_guidance_embedding(
    model: ModelDescription, unet: Mapping[str, Any], defaults: Defaults | None
) -> ModelDescription:
    """If the UNet embeds the guidance scale, add the input ``TIMESTEP_COND`` to a model and remove guidance branches.

    Args:
        model: The model, with specs of a UNet that does not embed the guidance scale.
        unet: Full config of the UNet.
        defaults: Sampling options of the checkpoint; None for ``DEFAULTS``.
    """
    channels = unet["time_cond_proj_dim"]
    if channels is None:
        return model
    spec = model.components[UNET]
    inputs = (*map(_one_branch, spec.inputs), conditioned(TIMESTEP_COND, 0, (channels,)))
    taken = replace(spec, inputs=inputs, outputs=tuple(map(_one_branch, spec.outputs)))
    entry = ConditioningSpec("guidance_scale", "", {}, (TIMESTEP_COND,), {"channels": channels})
    return replace(
        model,
        components={name: taken if name == UNET else one for name, one in model.components.items()},
        conditioning=(*model.conditioning, entry),
        guidance=(),
        defaults=defaults or DEFAULTS,
    )


def _one_branch(tensor: TensorSpec) -> TensorSpec:
    """Return the tensor with the rows of one branch only."""
    one = rows(0)
    return replace(
        tensor, shape=tuple(one if isinstance(dim, Axis) and dim.name == one.name else dim for dim in tensor.shape)
    )
