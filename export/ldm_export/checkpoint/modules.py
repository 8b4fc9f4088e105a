"""The torch modules of a checkpoint, one at a time: checked on the meta device, then filled tensor by tensor.

Nothing is allocated before the config's sizes and the files' tensors are known to agree, and no second copy of the
weights is held: peak memory is the module in float32 and its largest tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm_export.checkpoint.folder import Checkpoint, Component
from ldm_export.checkpoint.json_files import first_line, shortened
from ldm_export.checkpoint.layout import ModuleSource, Part, WeightNames
from ldm_export.checkpoint.weights import DTYPES, StoredTensor
from ldm_runtime.errors import CheckpointError, SpecError

__all__ = ["MAX_BYTES", "load_module"]

MAX_BYTES = 64 * 2**30
"""Largest module in float32, in bytes; the UNet of ldm-text2im-large-256 has 3.5 GB."""


def load_module(checkpoint: Checkpoint, name: str) -> nn.Module:
    """The module ``name`` of the checkpoint's layout, float32 on the CPU, in eval mode and without gradients.

    Raises:
        CheckpointError: The config describes no module, or one above MAX_BYTES; tensors are missing, left over,
            misshapen, of another dtype than DTYPES, or not finite; the files cannot be read (``weights.read_weights``).
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
    return module.eval().requires_grad_(False)


def _constructed(part: Part, component: Component) -> nn.Module:
    try:
        return part.module(component.class_name, component.config)
    except Exception as error:  # diffusers and torch raise whatever an odd config leads to
        file = component.folder / part.config_file
        message = f"{file} describes no {component.class_name}: {first_line(error)}; correct the config"
        raise CheckpointError(f"{component.name}: {message}") from error


def _without(module: nn.Module, source: ModuleSource) -> nn.Module:
    for name, stand_in in source.left_out.items():
        if getattr(module, name, None) is not None:
            setattr(module, name, stand_in() if stand_in else None)
    return module


def _fill(module: nn.Module, name: str, source: ModuleSource, part: Part, component: Component) -> None:
    """Read the weights of a module on the meta device into it."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    weights = _named_as_today(component.weights(), expected, part.weights, component)
    unused = tuple(f"{left_out}." for left_out in source.left_out)
    weights = {
        key: stored
        for key, stored in weights.items()
        if key in expected or not (key.startswith(unused) or key.endswith(part.weights.ignored))
    }
    _check(weights, expected, name, part.weights, component)
    state = {key: stored.read().reshape(expected[key]) for key, stored in weights.items()}
    module.load_state_dict(state, assign=True)
    if left := [key for key, buffer in module.named_buffers() if buffer.is_meta]:
        with _EmptyOnMeta():
            twin = _constructed(part, component)
        for key in left:
            owner, _, attribute = key.rpartition(".")
            setattr(module.get_submodule(owner), attribute, twin.get_buffer(key))


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters, which start as torch.empty, go to the meta device; buffers, which have values, become real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function is torch.empty else {}))


def _named_as_today(
    weights: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    names: WeightNames,
    component: Component,
) -> dict[str, StoredTensor]:
    """The weights under the names the module expects, where they are stored under older ones."""
    named = {key: stored for key, stored in weights.items() if key in expected}
    for key, stored in weights.items():
        new = key if key in expected else _name_of_today(key, names, component)
        if new not in expected:
            named[key] = stored
        elif new not in weights:  # else a copy under the older name: some files hold both
            named[new] = stored
    return named


def _name_of_today(name: str, names: WeightNames, component: Component) -> str:
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
    """Raise one CheckpointError naming what is missing, left over, misshapen or of another dtype."""
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    misfits = []
    for key in sorted(expected.keys() & weights.keys()):
        stored, shape = weights[key], expected[key]
        flat = names.matrices_as_convolutions and stored.shape == (*shape, 1, 1)
        if stored.dtype not in DTYPES or not (flat or stored.shape == shape):
            misfits.append(f"{stored.name} (got {stored.dtype} {list(stored.shape)}, expected float {list(shape)})")
    problems = [
        f"{len(keys)} tensors {what}: {shortened(keys)}"
        for what, keys in (("missing", missing), ("left over", extra), ("of another shape or dtype", misfits))
        if keys
    ]
    if problems:
        files = shortened({stored.file.name for stored in weights.values()}) or "its weights"
        raise CheckpointError(
            f"{name}: {component.folder}: {files} and config.json describe different models: {'; '.join(problems)}; "
            "use the config and the weights of one checkpoint"
        )
