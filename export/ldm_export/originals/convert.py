"""Writes an original checkpoint as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from diffusers import __version__ as diffusers_version
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from ldm_export.checkpoint.folder import INDEX, Checkpoint
from ldm_export.checkpoint.layout import ModuleSource
from ldm_export.checkpoint.modules import load_module
from ldm_export.families import family_named
from ldm_export.families.clip_text import clip_tokenizer
from ldm_export.families.text_to_image import tokenizer_folder
from ldm_runtime.errors import BuildError, CheckpointError
from ldm_runtime.schedulers.noise_schedule import COMPVIS_SPACING

__all__ = ["convert"]

_LIBRARIES = {"LDMBertModel": "latent_diffusion"} | dict.fromkeys(
    ("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers"
)


def convert(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Write the folder; it appears complete or not at all.

    diffusers' schedulers take exactly the requested number of steps, so a number that does not divide the number of
    training timesteps gives other images than the authors' sampler.

    Args:
        checkpoint: A checkpoint from ``open_original``.
        target: The folder; it must not exist.

    Returns:
        Names of the parts.

    Raises:
        CheckpointError: diffusers has no pipeline of this kind, or a config of its UNet class cannot express the
            model's number of attention heads.
        BuildError: The folder exists or cannot be written.
    """
    family = family_named(checkpoint.family)
    if not family.pipelines:
        raise CheckpointError(f"{checkpoint.folder}: diffusers has no {family.layout.kind} pipeline; build a bundle")
    if checkpoint.layout.parts["unet"].construct is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: a config of UNet2DModel cannot say this model's number of attention heads, which "
            "is the same at several widths; build a bundle"
        )
    if target.exists():
        raise BuildError(f"{target}: exists, expected a new folder; choose another -o, nothing was changed")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_name(f".{target.name}.part")
        if work.is_dir() and not work.is_symlink():
            shutil.rmtree(work)  # left by a process that was killed
        work.mkdir(mode=0o700)
        try:
            index = _write(checkpoint, family.pipeline_of(checkpoint), work)
            work.chmod(0o755)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"{target}: cannot be written ({error.strerror or error}); choose another -o") from None
    return [name for name, entry in index.items() if isinstance(entry, list)]


def _write(checkpoint: Checkpoint, pipeline: str, folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers_version, **checkpoint.options}
    for name, component in checkpoint.components.items():
        part, source = checkpoint.layout.parts[name], checkpoint.layout.modules[name]
        stored_modules = {key.partition(".")[0] for key in component.tensors or ()}
        left_out = {module: stand_in for module, stand_in in source.left_out.items() if module not in stored_modules}
        whole = replace(
            checkpoint, layout=replace(checkpoint.layout, modules={name: ModuleSource(source.part, left_out)})
        )
        module: Any = load_module(whole, name)
        if hasattr(module.config, "vocab_size"):  # embeddings of textual inversion add tokens
            module.config.vocab_size = len(module.get_input_embeddings().weight)
        module.save_pretrained(folder / part.folders[0])
        index[part.folders[0]] = [_LIBRARIES.get(component.class_name, "diffusers"), component.class_name]
    options = {key: value for key, value in checkpoint.scheduler_config.items() if key != "class"}
    if options["timestep_spacing"] == COMPVIS_SPACING:
        options["timestep_spacing"] = "leading"
    scheduler: Any = DDIMScheduler
    scheduler(**options).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    for name in (name for name in ("tokenizer", "tokenizer_2") if name in checkpoint.files):
        tokenizer = _tokenizer(checkpoint, name)
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    """Open a tokenizer of a checkpoint with transformers."""
    text_encoder = checkpoint.components["text_encoder"]
    if text_encoder.class_name == "CLIPTextModel":
        return clip_tokenizer(checkpoint, name, name.replace("tokenizer", "text_encoder"))
    with tokenizer_folder(checkpoint) as folder:
        tokens = text_encoder.config["max_position_embeddings"]
        return BertTokenizerFast.from_pretrained(str(folder), model_max_length=tokens)
