"""Tensors that tests write to weight files, and what reading them must give."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_export.checkpoint.weights import read_weights

__all__ = ["STATE", "assert_read", "values"]

STATE = {
    "conv.weight": torch.linspace(-2, 2, 24).reshape(2, 3, 2, 2),
    "conv.bias": torch.tensor([0.5, -1.0]),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
}


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in read_weights(folder, "unet").items()}


def assert_read(folder: Path, state: dict[str, torch.Tensor]) -> None:
    result = values(folder)
    assert result.keys() == state.keys()
    for name, tensor in state.items():
        assert result[name].dtype == torch.float32 and result[name].is_contiguous()
        torch.testing.assert_close(result[name], tensor.to(torch.float32), rtol=0, atol=0)
