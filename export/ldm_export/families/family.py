"""A pipeline family: everything that is particular to one kind of latent diffusion model, as data and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint.diffusers_parts import takes_mask
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import CheckpointLayout
from ldm_export.graph.component_split import SplitRule
from ldm_export.requests import RequestFields
from ldm_runtime.model import ModelDescription

__all__ = ["BundleFile", "Family", "TracedComponent"]


@dataclass(frozen=True)
class TracedComponent:
    """A graph that is traced from one module.

    Attributes:
        module: Name of the module in the checkpoint's layout.
        wrap: Wraps the loaded module so that it takes and returns the tensors of the component's spec.
        splits: What is split off the traced graph, as components of their own.
    """

    module: str
    wrap: Callable[[nn.Module], nn.Module]
    splits: tuple[SplitRule, ...] = ()


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle that is no graph, for example a tokenizer.

    Attributes:
        path: In the bundle.
        source: Name of the checkpoint's file or folder that it is made from; a checkpoint without it has no such file.
        write: Writes it to a path. Raises CheckpointError if the checkpoint's files cannot be used.
    """

    path: str
    source: str
    write: Callable[[Checkpoint, Path], None]


@dataclass(frozen=True)
class Family:
    """A family of pipelines. A new family is one module with one ``Family``, listed in ``families.FAMILIES``.

    Attributes:
        name: Name in the manifest.
        pipelines: Class names in model_index.json: today's first, then those of earlier releases. Empty
            if diffusers has no such pipeline; checkpoints are then those of CompVis.
        layout: Of its checkpoints.
        components: What is traced, by component, in the order in which the components run; a checkpoint may lack the
            optional parts of its layout, and its model then these components.
        files: Files of the bundle that are no graphs, by the name of their build stage.
        describe: The model of a checkpoint, with the specs of ``components`` before anything is split off.
        quantize: Components that int8 quantizes; the budget is spent in this order.
        requests: One request without a seed for each of the prompts; None gives the family's default requests. Raises
            SpecError for prompts if the family's models take none.
        reference: diffusers' own pipeline of a checkpoint, or the modules that replace one; float32 on the CPU.
        reference_image: Runs it for one request with every option filled in, height and width in pixels of
            our image among them, noise from the generator.
        precise: Components that stay in fp32 in every precision.
        fractional_timesteps: Export the UNet with float32 timesteps whatever the checkpoint's scheduler is, so that
            requests can select any other.
    """

    name: str
    pipelines: tuple[str, ...]
    layout: CheckpointLayout
    components: Mapping[str, TracedComponent]
    files: Mapping[str, BundleFile]
    describe: Callable[[Checkpoint], ModelDescription]
    quantize: tuple[str, ...]
    requests: Callable[[Sequence[str] | None], tuple[RequestFields, ...]]
    reference: Callable[[Checkpoint], Any]
    reference_image: Callable[[Any, RequestFields, torch.Generator], Image.Image]
    precise: tuple[str, ...] = ()
    fractional_timesteps: bool = False

    def pipeline_of(self, checkpoint: Checkpoint) -> str:
        """Class name in the model_index.json of a checkpoint: the inpainting pipeline if its UNet takes a mask."""
        unet = checkpoint.components["unet"].config
        inpaints = [name for name in self.pipelines if "Inpaint" in name]
        return inpaints[0] if inpaints and takes_mask(unet) else self.pipelines[0]
