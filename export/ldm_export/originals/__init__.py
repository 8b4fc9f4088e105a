"""Original checkpoint files of CompVis and Stability AI: read without running their code, and opened for export."""

from __future__ import annotations

from pathlib import Path

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families import open_checkpoint
from ldm_export.originals.checkpoint import open_original, open_yaml
from ldm_export.originals.checkpoint_file import is_checkpoint_file
from ldm_runtime.errors import CheckpointError

__all__ = ["open_model", "open_original", "open_yaml"]

YAML = (".yaml", ".yml")


def open_model(
    path: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    weights: str | None = None,
    categories: Path | None = None,
    prediction_type: str | None = None,
    random_weights: bool = False,
) -> Checkpoint:
    """Open a diffusers folder or an original checkpoint file.

    Args:
        path: The folder, the file, or, with ``random_weights``, the yaml of an original checkpoint.
        config, tokenizer, weights, categories, prediction_type: See ``open_original``; for files only.
        random_weights: True draws random weights; for folders and yamls.

    Raises:
        CheckpointError: It cannot be opened, or an option does not apply to this kind of checkpoint.
    """
    arguments = {
        "config": config,
        "tokenizer": tokenizer,
        "weights": weights,
        "categories": categories,
        "prediction_type": prediction_type,
    }
    options = [f"--{name.replace('_', '-')}" for name, value in arguments.items() if value is not None]
    if path.suffix in YAML and path.is_file():
        if not random_weights:
            raise CheckpointError(f"{path}: a yaml has no weights; give the checkpoint, or --random-weights")
        if options:
            raise CheckpointError(f"{path}: {', '.join(options)}: for original checkpoint files; leave them out")
        return open_yaml(path)
    if is_checkpoint_file(path):
        if random_weights:
            raise CheckpointError(
                f"{path}: random weights are drawn for a folder of configs or a yaml; give one of them"
            )
        return open_original(path, **arguments)  # type: ignore[arg-type]
    if options:
        raise CheckpointError(f"{path}: {', '.join(options)}: for original checkpoint files; leave them out")
    return open_checkpoint(path, random_weights=random_weights)
