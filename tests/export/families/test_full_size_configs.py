"""The config files in benchmarks/configs describe Stable Diffusion 1.5, 2.1 and XL at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_export.families import family_named, open_checkpoint

CONFIGS = Path(__file__).parents[3] / "benchmarks" / "configs"
PARAMETERS = {
    "stable-diffusion-v1-5": {"unet": 859_520_964, "autoencoder": 83_653_863, "text_encoder": 123_060_480},
    "stable-diffusion-2-1": {"unet": 865_910_724, "autoencoder": 83_653_863, "text_encoder": 340_387_840},
    "stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684,
        "autoencoder": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""Published numbers of parameters."""


def test_every_folder_is_listed() -> None:
    assert {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_published_models(name: str) -> None:
    checkpoint = open_checkpoint(CONFIGS / name, random_weights=True)
    with torch.device("meta"):
        modules = {
            part: checkpoint.layout.parts[part].module(component.class_name, component.config)
            for part, component in checkpoint.components.items()
        }
    counts = {part: sum(one.numel() for one in module.parameters()) for part, module in modules.items()}
    assert counts == PARAMETERS[name]
    model = family_named(checkpoint.family).describe(checkpoint)
    assert model.scheduler["prediction_type"] == ("v_prediction" if name == "stable-diffusion-2-1" else "epsilon")
