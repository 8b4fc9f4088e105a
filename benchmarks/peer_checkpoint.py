"""Writes a checkpoint of config files with the random weights that ``ldm-export build --random-weights`` draws.

The other runtimes of ``peers.py`` load it with diffusers. One component at a time is in memory.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import save_file

from ldm_export.bundle.publish import publish
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.placeholder_vocabulary import placeholder_tokenizer
from ldm_export.families import open_checkpoint
from ldm_export.families.text_to_image import VOCABULARY_FILES

FILES = {
    "text_encoder": "bert/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vqvae/diffusion_pytorch_model.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="a diffusers folder without weights")
    parser.add_argument("output", type=Path, help="the folder to write")
    args = parser.parse_args()
    write(args.configs, args.output)


def write(configs: Path, output: Path) -> None:
    """Write ``output``, a diffusers folder with safetensors, unless it exists."""
    if output.exists():
        return
    checkpoint = open_checkpoint(configs, random_weights=True)
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(configs, part)
    source, target = checkpoint.files["tokenizer"], part / "tokenizer"
    if not any((source / name).exists() for name in VOCABULARY_FILES):
        target.mkdir(exist_ok=True)
        placeholder_tokenizer(source, target)
    for name, file in FILES.items():
        weights = load_module(checkpoint, name).state_dict()
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, part / file, {"format": "pt"})
    publish(part, output)


if __name__ == "__main__":
    main()
