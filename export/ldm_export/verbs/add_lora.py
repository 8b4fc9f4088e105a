"""``ldm-export add-lora``: add LoRA adapters to a bundle, which each request then selects."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_export.screen import Screen, human_bytes
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.manifest_reader import check_lora_name

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument(
        "loras",
        nargs="*",
        metavar="NAME=FILE",
        help="name that requests select, and a LoRA file of diffusers or kohya; it replaces an adapter of that name",
    )
    verb.add_argument(
        "--remove", action="append", default=[], metavar="NAME", help="remove an adapter; may be repeated"
    )


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export add-lora``.

    Raises:
        LdmError: A file cannot be read, does not fit the bundle, or the bundle cannot be written.
    """
    from ldm_export.extras import needs

    with needs("export"):
        from ldm_export.bundle.add_lora import change_loras
        from ldm_export.lora import adapter_of, lora_path
    bundle, given = Bundle.open(args.bundle), _given(args.loras, args.remove)
    added = {}
    with screen.bar("reading", len(given)) as bar:
        for index, (name, text) in enumerate(given.items()):
            bar.to(index, what=name)
            file = lora_path(text, "NAME=FILE")
            added[name] = adapter_of(bundle, file), file.name
    replaced = [name for name in added if name in bundle.manifest.loras]
    changed = change_loras(args.bundle, added, args.remove)
    loras = changed.manifest.loras
    if args.json:
        facts = {
            name: {"bytes": changed.manifest.files[lora.file].size, "layers": dict(lora.layers), "source": lora.source}
            for name, lora in loras.items()
        }
        screen.json({"loras": facts, "added": list(added), "replaced": replaced, "removed": list(args.remove)})
        return
    for name, (adapter, source) in added.items():
        size = human_bytes(changed.manifest.files[loras[name].file].size)
        layers = ", ".join(f"{count} of {part}" for part, count in adapter.layers.items())
        what = "replaced" if name in replaced else "added"
        screen.result(f"{what} {name}: {source}, layers: {layers}; {size}")
        if adapter.left_out:
            screen.note(
                f"{name}: {adapter.left_out} layers of text encoders have no effect, because this model skips them"
            )
    for name in args.remove:
        screen.result(f"removed {name}")
    if added:
        screen.note(f"select it with `ldm-export generate {args.bundle} PROMPT --lora {next(iter(added))}:0.7`")


def _given(texts: list[str], removed: list[str]) -> dict[str, str]:
    """Name -> path of the file, of ``NAME=FILE``."""
    given: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise SpecError(f"lora: got {text!r:.80}, expected NAME=FILE, e.g. style=style.safetensors")
        check_lora_name(name)
        if name in given or name in removed:
            raise SpecError(f"lora: got {name!r} twice, expected each name once")
        given[name] = file
    if not given and not removed:
        raise SpecError("lora: got nothing to do, expected NAME=FILE or --remove NAME")
    return given
