"""A pipeline family: everything that is specific to one kind of latent diffusion model, as data and functions."""

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
    """A component whose graph is traced from one module.

    Attributes:
        module: Name of the module in the checkpoint's layout.
        wrap: Wraps the loaded module, so that it takes and returns the tensors of the component's spec.
        splits: Rules for parts of the traced graph that become separate components.
    """

    module: str
    wrap: Callable[[nn.Module], nn.Module]
    splits: tuple[SplitRule, ...] = ()


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle that is not a graph, for example a tokenizer.

    Attributes:
        path: Path in the bundle.
        source: Name of the checkpoint's file or folder from which it is made. The bundle of a checkpoint without it
            does not have the file.
        write: Writes the file to a path. Raises CheckpointError if the checkpoint's files cannot be used.
    """

    path: str
    source: str
    write: Callable[[Checkpoint, Path], None]


@dataclass(frozen=True)
class Family:
    """A family of pipelines. A new family is one module with one ``Family``, listed in ``families.FAMILIES``.

    Attributes:
        name: Name in the manifest.
        pipelines: Class names in model_index.json: the current one first, then those of earlier releases. Empty if
            diffusers has no such pipeline; checkpoints are then those of CompVis.
        layout: Layout of its checkpoints.
        components: Component -> what is traced for it, in the order in which components run. If an optional part of the
            layout is missing in a checkpoint, the model does not have its components.
        files: Name of a build stage -> file of the bundle that is not a graph.
        describe: Returns the model of a checkpoint, with the specs of ``components`` before parts are split off.
        quantize: Components that are quantized to int8; the error budget is spent in this order.
        requests: Returns a request without a seed for each prompt, or the family's default requests for None. Raises
            SpecError for prompts if the family's models take none.
        reference: Opens diffusers' pipeline of a checkpoint, or modules in place of a pipeline; float32 on the CPU.
        reference_image: Runs the reference for one request with every option filled in, including height and width of
            our image in pixels, with noise from the generator.
        precise: Components that stay in fp32 in every precision.
        fractional_timesteps: True exports the UNet with float32 timesteps whatever the checkpoint's scheduler is, so
            that requests can select any scheduler.
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
        """Class name for the model_index.json of a checkpoint: the inpainting pipeline if its UNet takes a mask."""
        unet = checkpoint.components["unet"].config
        inpaints = [name for name in self.pipelines if "Inpaint" in name]
        return inpaints[0] if inpaints and takes_mask(unet) else self.pipelines[0]
