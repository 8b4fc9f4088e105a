"""Writes a checkpoint with random weights for ``peers.py``, from a folder of config files.

The weights are those that ``ldm-export build --random-weights`` draws, so that the other runtimes, which load the
checkpoint with diffusers, compute the same. Only one component at a time is in memory.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import save_file

from ldm_export.bundle.publish import publish
from ldm_export.checkpoint.clip_tokenizer_files import CLIP_FILES
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.placeholder_vocabulary import placeholder_clip_tokenizer, placeholder_tokenizer
from ldm_export.families import open_checkpoint
from ldm_export.families.text_to_image import VOCABULARY_FILES

PREFIXES = {"CLIPTextModel": "text_model."}
"""Class -> prefix of its tensors in published checkpoints, which transformers before 5 expects."""
VOCABULARIES = {
    "LDMBertModel": (VOCABULARY_FILES, placeholder_tokenizer),
    "CLIPTextModel": (CLIP_FILES, placeholder_clip_tokenizer),
}
"""Class of the text encoder -> files of its tokenizer, and what writes a placeholder for them."""


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
    files, placeholder = VOCABULARIES[checkpoint.components["text_encoder"].class_name]
    if not any((source / name).exists() for name in files):
        target.mkdir(exist_ok=True)
        placeholder(source, target)
    for name, component in checkpoint.components.items():
        text = name == "text_encoder"
        file = f"{component.folder.name}/{'model' if text else 'diffusion_pytorch_model'}.safetensors"
        prefix, weights = PREFIXES.get(component.class_name, ""), load_module(checkpoint, name).state_dict()
        save_file({f"{prefix}{key}": one.contiguous() for key, one in weights.items()}, part / file, {"format": "pt"})
    publish(part, output)


if __name__ == "__main__":
    main()
