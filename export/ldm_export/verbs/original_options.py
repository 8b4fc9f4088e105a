"""Options of verbs that read checkpoints: original checkpoint files, LoRA files and embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_export.checkpoint.choices import PREDICTION_TYPES, WEIGHTS

if TYPE_CHECKING:
    from ldm_export.checkpoint.folder import Checkpoint

__all__ = ["add_embedding_argument", "add_original_arguments", "open_given"]


def add_original_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA file to merge into the weights of UNet and text encoders (default scale 1); may be repeated",
    )
    original = verb.add_argument_group(
        "original checkpoints (.ckpt, .pt, .pth or .safetensors of CompVis or Stability AI)"
    )
    original.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="the yaml it was trained with (not needed for the sizes of a published model)",
    )
    original.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="vocab.txt of BERT for text-to-image models, a folder with vocab.json and merges.txt for Stable Diffusion",
    )
    original.add_argument(
        "--categories", type=Path, metavar="FILE", help="names of the categories, one per line, for models of layouts"
    )
    original.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="moving averages or plain weights of the UNet (default: the averages if there are any, unless the yaml "
        "says use_ema: False)",
    )
    original.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="whether the UNet predicts noise (epsilon) or velocity (v_prediction), as the yaml would say; needed for "
        "Stable Diffusion 2 without a yaml",
    )


def add_embedding_argument(verb: argparse.ArgumentParser) -> None:
    """Add the option for textual inversion."""
    verb.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="textual inversion embedding to add, and its token in prompts (default: the token in the file, or the "
        "file's name); may be repeated",
    )


def open_given(path: Path | None, args: argparse.Namespace, task: str | None = None) -> Checkpoint:
    """Open the diffusers folder or the checkpoint file that a command names; without one, a demo model.

    Args:
        path: Path that the command names, or None.
        args: Arguments with the options of ``add_original_arguments``, and maybe that of ``add_embedding_argument``.
        task: Task of the demo model; None for text-to-image.

    Raises:
        BuildError: The command names no checkpoint, and no demo model is installed.
        CheckpointError: It cannot be opened; see ``originals.open_model``.
    """
    from ldm_export.demo import TASKS, demo_checkpoint, demo_config
    from ldm_export.families.safety_checker import without_safety_checker
    from ldm_export.lora import parse_lora, with_loras
    from ldm_export.originals import open_model
    from ldm_export.textual_inversion import parse_embedding, with_embeddings

    random = getattr(args, "random_weights", False)
    options = {
        name: getattr(args, name) for name in ("config", "tokenizer", "weights", "categories", "prediction_type")
    }
    if path is None:
        path = demo_checkpoint(task or TASKS[0])
        options["config"] = options["config"] or demo_config(task or TASKS[0])
    opened = with_loras(open_model(path, random_weights=random, **options), [parse_lora(text) for text in args.lora])
    if getattr(args, "no_safety_checker", False):
        opened = without_safety_checker(opened)
    return with_embeddings(opened, [parse_embedding(text) for text in getattr(args, "embedding", [])])
