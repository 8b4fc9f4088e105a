"""The safety checker of Stable Diffusion checkpoints: CLIP's image encoder and the embeddings of concepts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from torch import nn
from transformers import CLIPConfig

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.json_files import read_json
from ldm_export.checkpoint.layout import FileFolder, Part, WeightNames
from ldm_export.graph.model_specs import IMAGES
from ldm_runtime.conditioning.safety_checker import CONCEPT_SCORES, PIXELS, SHORTEST_EDGE, SPECIAL_SCORES, SafetyChecker
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import SAFETY_CHECKER, ConditioningSpec
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = [
    "FEATURE_EXTRACTOR",
    "FEATURE_EXTRACTOR_FILES",
    "SAFETY_PART",
    "SafetyScores",
    "checker_conditioning",
    "checker_spec",
    "without_safety_checker",
]

log = logging.getLogger(__name__)

FEATURE_EXTRACTOR = "feature_extractor"
_CONFIG = "preprocessor_config.json"
FEATURE_EXTRACTOR_FILES = FileFolder((FEATURE_EXTRACTOR,), (_CONFIG,))
"""Folder with the config that says how images are resized and normalized for the checker."""
BICUBIC = 3
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of each channel, in all published CLIP models."""
CONCEPTS, SPECIAL = 17, 3


@dataclass(frozen=True)
class SafetyConfig:
    """The options of transformers' CLIPConfig that the checker's scores depend on, with its defaults."""

    projection_dim: int = 512
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


def _flat(config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    vision = config.get("vision_config")
    inner = dict(vision) if isinstance(vision, dict) else {}
    inner.pop("projection_dim", None)  # of CLIP's own head
    return inner | ({"projection_dim": config["projection_dim"]} if "projection_dim" in config else {})


def _construct(config: Mapping[str, Any]) -> nn.Module:
    vision = {key: value for key, value in config.items() if key != "projection_dim"}
    module: nn.Module = StableDiffusionSafetyChecker(
        CLIPConfig(projection_dim=config["projection_dim"], vision_config=vision)
    )
    return module


SAFETY_PART = Part(
    folders=(SAFETY_CHECKER,),
    classes={"StableDiffusionSafetyChecker": SafetyConfig},
    current_config=_flat,
    weights=WeightNames(((r"^vision_model\.vision_model\.", "vision_model."),)),  # the prefix of transformers before 5
    construct=_construct,
)
"""The part with the checker's weights."""


class SafetyScores(nn.Module):
    """Scores of images: pixels float32 [B, 3, S, S] from 0 to 255 -> special and other concepts, float32 [B, concepts].

    A score is the cosine of the angle between the embeddings of image and concept, minus the concept's threshold.
    """

    def __init__(self, checker: nn.Module):
        super().__init__()
        self.checker: Any = checker
        self.mean, self.deviation = (nn.Buffer(torch.tensor(one)[:, None, None]) for one in (MEAN, DEVIATION))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the outputs of the class's docstring."""
        checker = self.checker
        images = (pixels / 255 - self.mean) / self.deviation
        embedded = checker.visual_projection(checker.vision_model(images)[1])
        return (
            _cosine(embedded, checker.special_care_embeds) - checker.special_care_embeds_weights,
            _cosine(embedded, checker.concept_embeds) - checker.concept_embeds_weights,
        )


def _cosine(images: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    similarities: torch.Tensor = cosine_distance(images, concepts)  # type: ignore[no-untyped-call]
    return similarities


def checker_spec(config: Mapping[str, Any]) -> ComponentSpec:
    """Spec of the component, from the full config of the part."""
    side = config["image_size"]
    scores = ((SPECIAL_SCORES, SPECIAL), (CONCEPT_SCORES, CONCEPTS))
    return ComponentSpec(
        SAFETY_CHECKER,
        (TensorSpec(PIXELS, "float32", (IMAGES, 3, side, side)),),
        tuple(TensorSpec(name, "float32", (IMAGES, count)) for name, count in scores),
        "image",
    )


def checker_conditioning(checkpoint: Checkpoint) -> ConditioningSpec:
    """Return the manifest's conditioning entry for the checker.

    Raises:
        CheckpointError: The feature extractor is missing, or it preprocesses images differently from CLIP's.
    """
    if FEATURE_EXTRACTOR not in checkpoint.files:
        raise CheckpointError(
            f"{checkpoint.folder} has a {SAFETY_CHECKER} but no {FEATURE_EXTRACTOR}; download it whole, or leave the "
            "checker out with --no-safety-checker"
        )
    edge = _edge(checkpoint.files[FEATURE_EXTRACTOR] / _CONFIG, checkpoint.components[SAFETY_CHECKER].config)
    return ConditioningSpec(SafetyChecker.kind, SAFETY_CHECKER, {}, (), {SHORTEST_EDGE: edge})


def _edge(file: Path, config: Mapping[str, Any]) -> int:
    """Length to which the shorter side of an image is resized."""
    given = read_json(file, FEATURE_EXTRACTOR)
    size, crop, side = given.get("size", 224), given.get("crop_size", 224), config["image_size"]
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    crops = [crop.get("height"), crop.get("width")] if isinstance(crop, dict) else [crop, crop]
    steps = [given.get(name, True) for name in ("do_resize", "do_center_crop", "do_normalize", "do_rescale")]
    usual = (
        steps == [True] * len(steps)
        and given.get("resample", BICUBIC) == BICUBIC
        and crops == [side, side]
        and list(given.get("image_mean", MEAN)) == list(MEAN)
        and list(given.get("image_std", DEVIATION)) == list(DEVIATION)
    )
    if not usual or type(edge) is not int or not side <= edge <= 2**12:
        raise CheckpointError(
            f"{FEATURE_EXTRACTOR}: {file}: expected CLIP's preparation of images (bicubic, cropped to {side}, its mean "
            "and deviation); leave the checker out with --no-safety-checker"
        )
    return edge


def without_safety_checker(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without its safety checker. A warning is logged if it has one."""
    if SAFETY_CHECKER in checkpoint.components:
        log.warning("%s: %s: left out, so that no image is checked", checkpoint.folder, SAFETY_CHECKER)
    kept = {name: one for name, one in checkpoint.components.items() if name != SAFETY_CHECKER}
    return replace(checkpoint, components=kept)
