"""``ldm-export convert``: write an original checkpoint as a diffusers folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen
from ldm_export.verbs.options import quieten
from ldm_export.verbs.original_options import add_embedding_argument, add_original_arguments, open_given
from ldm_runtime.errors import CheckpointError

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("checkpoint", type=Path, help="a checkpoint file of CompVis/latent-diffusion")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add_original_arguments(verb)
    add_embedding_argument(verb)


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export convert``.

    Raises:
        LdmError: The checkpoint, an option or the output folder cannot be used.
    """
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.originals.checkpoint_file import is_checkpoint_file
        from ldm_export.originals.convert import convert
    quieten(args.verbose)
    if not is_checkpoint_file(args.checkpoint):
        raise CheckpointError(
            f"{args.checkpoint}: got no .ckpt, .pt, .pth or .safetensors file, expected one; check it"
        )
    checkpoint = open_given(args.checkpoint, args)
    with screen.bar("converting"):
        parts = convert(checkpoint, args.output)
    if args.json:
        screen.json({"folder": str(args.output), "kind": checkpoint.family, "parts": parts})
        return
    screen.result(f"{args.output}: {checkpoint.family}, {', '.join(parts)}")
