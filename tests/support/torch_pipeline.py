"""The runtime's pipeline over a checkpoint's torch modules: everything but the trace, without its time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.families import family_named, open_checkpoint
from ldm_export.families.description import described
from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.specs import ComponentSpec

__all__ = ["torch_pipeline", "torch_pipelines"]


class TorchBackend(SpecBackend):
    """Runs the module that a component is traced from."""

    def __init__(self, spec: ComponentSpec, module: nn.Module):
        self._spec, self._module = spec, module.eval()

    def run(self, feed: Feed) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.array(feed[tensor.name])) for tensor in self._spec.inputs]
            result = self._module(*tensors)
            results = result if isinstance(result, tuple) else (result,)
            return {tensor.name: one.numpy() for tensor, one in zip(self._spec.outputs, results, strict=True)}

    def close(self) -> None:
        """Keep the module."""


def torch_pipeline(checkpoint: Checkpoint, folder: Path) -> LatentDiffusionPipeline:
    """A pipeline of the modules that a build would trace; files of the conditioning are written to ``folder``."""
    family = family_named(checkpoint.family)
    model = described(family, checkpoint)
    folder.mkdir()
    for file in family.files.values():
        if file.source in checkpoint.files:
            file.write(checkpoint, folder / file.path)
    backends = {
        name: TorchBackend(model.components[name], traced.wrap(load_module(checkpoint, traced.module)))
        for name, traced in family.components.items()
        if name in model.components
    }
    return LatentDiffusionPipeline(model, backends, lambda name: folder / name)


def torch_pipelines(checkpoints: Mapping[int, Path], folder: Path) -> dict[int, LatentDiffusionPipeline]:
    """The pipelines of several checkpoints, by the same keys."""
    return {
        key: torch_pipeline(open_checkpoint(checkpoint), folder / str(key)) for key, checkpoint in checkpoints.items()
    }
