"""Loads the torch modules of a checkpoint one at a time: created on the meta device, checked, then filled.

Memory is allocated only after the sizes in the config and the tensors of the files have been compared. There is no
second copy of the weights: peak memory is the module in float32 plus its largest tensor.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm_export.checkpoint.folder import Checkpoint, Component
from ldm_export.checkpoint.json_files import shortened
from ldm_export.checkpoint.layout import ModuleSource, Part, WeightNames
from ldm_export.checkpoint.weights import DTYPES, FLOAT8, StoredTensor
from ldm_runtime.backends.host import first_line
from ldm_runtime.errors import CheckpointError, SpecError

__all__ = ["MAX_BYTES", "load_module", "parameter_shapes"]

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**30
"""Maximum size of a module in float32, in bytes; the UNet of ldm-text2im-large-256 has 3.5 GB."""


def load_module(checkpoint: Checkpoint, name: str) -> nn.Module:
    """Load the module ``name`` of the checkpoint's layout: float32 on the CPU, in eval mode and without gradients.

    As in diffusers, tensors that the module does not use are skipped with a warning.

    Raises:
        CheckpointError: The config does not describe a module, or a module above MAX_BYTES; tensors are missing, have a
            wrong shape or a dtype that is not in DTYPES, or are not finite; float8 tensors have scales; or the files
            cannot be read (``read_weights``).
        SpecError: The layout has no module of that name.
    """
    if name not in checkpoint.layout.modules:
        raise SpecError(f"module: got {name!r}, expected one of {', '.join(checkpoint.layout.modules)}")
    source = checkpoint.layout.modules[name]
    part, component = checkpoint.layout.parts[source.part], checkpoint.components[source.part]
    with torch.device("meta"):
        module = _constructed(part, component)
    size = sum(4 * tensor.numel() for tensor in module.state_dict().values())
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{name}: {component.folder / part.config_file} describes {size / 2**30:.0f} GiB of float32 weights, "
            f"expected at most {MAX_BYTES / 2**30:.0f}; correct the config"
        )
    if checkpoint.random_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(checkpoint.random_seed)
            module = _without(_constructed(part, component), source)
    else:
        _fill(_without(module, source), name, source, part, component)
    module = module.eval().requires_grad_(False)
    for changes in component.changes:
        for key, change in changes.items():
            parameter = module.get_parameter(key)
            parameter.data = change(parameter.data)
    return module


def parameter_shapes(checkpoint: Checkpoint, part: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a part's module; no weights are read.

    Raises:
        CheckpointError: The config does not describe a module.
    """
    with torch.device("meta"):
        module = _constructed(checkpoint.layout.parts[part], checkpoint.components[part])
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _constructed(part: Part, component: Component) -> nn.Module:
    try:
        return part.module(component.class_name, component.config)
    except Exception as error:  # diffusers and torch raise many classes for an invalid config
        file = component.folder / part.config_file
        message = f"{file} describes no {component.class_name}: {first_line(error, 100)}; correct the config"
        raise CheckpointError(f"{component.name}: {message}") from error


def _without(module: nn.Module, source: ModuleSource) -> nn.Module:
    for name, stand_in in source.left_out.items():
        if getattr(module, name, None) is not None:
            setattr(module, name, stand_in() if stand_in else None)
    return module


def _fill(module: nn.Module, name: str, source: ModuleSource, part: Part, component: Component) -> None:
    """Read the weights of a module on the meta device into it."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    weights = _with_current_names(component.weights(), expected, part.weights, component)
    unused = tuple(f"{left_out}." for left_out in source.left_out)
    weights = {
        key: stored
        for key, stored in weights.items()
        if key in expected or not (key.startswith(unused) or key.endswith(part.weights.ignored))
    }
    _check(weights, expected, name, part.weights, component)
    state = {key: weights[key].read().reshape(shape) for key, shape in expected.items()}
    module.load_state_dict(state, assign=True)
    if left := [key for key, buffer in module.named_buffers() if buffer.is_meta]:
        with _EmptyOnMeta():
            twin = _constructed(part, component)
        for key in left:
            owner, _, attribute = key.rpartition(".")
            setattr(module.get_submodule(owner), attribute, twin.get_buffer(key))


class _EmptyOnMeta(TorchFunctionMode):
    """Create parameters, which start as torch.empty, on the meta device, and buffers, which have values, in memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function is torch.empty else {}))


def _with_current_names(
    weights: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    names: WeightNames,
    component: Component,
) -> dict[str, StoredTensor]:
    """Rename weights with older names to the names that the module expects."""
    renamed = {key: stored for key, stored in weights.items() if key in expected}
    for key, stored in weights.items():
        new = key if key in expected else _current_name(key, names, component)
        if new not in expected:
            renamed[key] = stored
        elif new not in weights:  # otherwise a duplicate under the older name, which some files contain
            renamed[new] = stored
    return renamed


def _current_name(name: str, names: WeightNames, component: Component) -> str:
    if names.renumber is not None:
        name = names.renumber(name, component.config)
    for pattern, replacement in names.patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _check(
    weights: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    name: str,
    names: WeightNames,
    component: Component,
) -> None:
    """Warn of unused tensors, and raise a CheckpointError that names tensors that are missing or do not fit."""
    missing, unused = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    scales = [key for key in unused if "scale" in key] if any(one.dtype in FLOAT8 for one in weights.values()) else []
    misfits = []
    for key in sorted(expected.keys() & weights.keys()):
        stored, shape = weights[key], expected[key]
        flat = names.matrices_as_convolutions and stored.shape == (*shape, 1, 1)
        if stored.dtype not in DTYPES or not (flat or stored.shape == shape):
            misfits.append(f"{stored.name} (got {stored.dtype} {list(stored.shape)}, expected float {list(shape)})")
    problems = [
        f"{len(keys)} tensors {what}, e.g. {min(keys)}"
        for what, keys in (
            ("missing", missing),
            ("of another shape or dtype", misfits),
            ("of scales, which float8 values are not multiplied by here", scales),
        )
        if keys
    ]
    if problems:
        unread = f"; {len(unused)} unused, e.g. {min(unused)}" if unused else ""
        files = min((stored.file.name for stored in weights.values()), default="its weights")
        what = "; ".join(problems) + unread
        raise CheckpointError(
            f"{name}: {component.folder}: {files} and config.json describe different models: {what}; "
            "use the config and the weights of one checkpoint"
        )
    if unused:
        count = f"{len(unused)} tensors that the model does not use" if len(unused) > 1 else "a tensor that is not used"
        log.warning("%s: %s: left out %s: %s", name, component.folder, count, shortened(unused))
