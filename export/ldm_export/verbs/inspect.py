"""``ldm-export inspect``: show what is in a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm_export.report.lenient_json import mapping
from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.bench_split import SPLIT_COLUMNS, split_rows
from ldm_runtime.bundle import Bundle

__all__ = ["add_arguments", "run"]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--check", action="store_true", help="also check the digest of every file")


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run ``ldm-export inspect``."""
    from ldm_export.bundle.abandoned import abandoned_work
    from ldm_export.bundle.feature_cache_layers import FEATURE_CACHE
    from ldm_export.bundle.inspection import inspect_bundle

    if (work := abandoned_work(args.bundle)) is not None:
        screen.note(f"{work}: left by a build that was killed; `build` continues it, any other command removes it")
    bundle = Bundle.open(args.bundle)
    if args.check:
        with screen.bar("checking", len(bundle.manifest.files)) as bar:
            names = list(bundle.manifest.files)
            bundle.check(lambda name: bar.to(names.index(name), what=name))
    facts = inspect_bundle(bundle)
    if args.json:
        screen.json({**facts, "checked": bool(args.check), "abandoned": None if work is None else str(work)})
        return
    conditioning, guidance = ", ".join(facts["conditioning"]) or "none", ", ".join(facts["guidance"]) or "none"
    model = [["family", facts["family"]], ["conditioning", conditioning], ["guidance", guidance]]
    screen.table("model", ["", ""], model)
    for name, component in facts["components"].items():
        rows = [[direction, text] for direction in ("inputs", "outputs") for text in component[direction]]
        for precision, graph in component["graphs"].items():
            rows.append([precision, f"{graph['file']}, {human_bytes(graph['bytes'])}"])
            if graph.get("operators"):
                most = sorted(graph["operators"].items(), key=lambda item: -item[1])[:8]
                rows.append(["operators", ", ".join(f"{count} {kind}" for kind, count in most)])
            if graph.get("islands"):
                half, *others = graph["islands"].items()
                reasons = ", ".join(f"{count} {reason}" for reason, count in others)
                rows.append(["arithmetic", f"{half[1]} nodes in {precision}, in fp32: {reasons}"])
        for engine, graphs in component.get("variants", {}).items():
            rows += [[engine, f"{graph['file']}, {human_bytes(graph['bytes'])}"] for graph in graphs.values()]
        rows += [["engine", _engine(engine)] for engine in component.get("engines", ())]
        screen.table(name, ["", ""], rows)
    for name, lora in facts.get("loras", {}).items():
        layers = ", ".join(f"{count} of {part}" for part, count in lora["layers"].items())
        rows = [["file", f"{lora['file']}, {human_bytes(lora['bytes'])}"], ["layers", layers], ["from", lora["source"]]]
        screen.table(f"LoRA adapter {name}", ["", ""], rows)
    screen.table("request", ["", ""], _flat(facts["request"]))
    screen.table("tools", ["", ""], _flat(facts["tools"]))
    measured = {name: value for name, value in facts["measured"].items() if name != FEATURE_CACHE}
    screen.table("measured", ["", ""], _flat(measured) or [["nothing yet", "run `ldm-export verify`"]])
    if split := mapping(facts["measured"].get(FEATURE_CACHE)):
        title = f"layers of the shallow UNet, measured with {split.get('images')} images; chosen: {split.get('layers')}"
        screen.table(title, SPLIT_COLUMNS, split_rows(split))
    if "quality" in facts:
        from ldm_export.report.quality_section import QUALITY_COLUMNS, quality_rows

        record = bundle.quality()
        title = f"stored settings for `generate --budget`, measured with {record.images} images"
        screen.table(title, QUALITY_COLUMNS, quality_rows(record))
    if args.check:
        screen.result(f"checked: all {len(bundle.manifest.files)} files have the sizes and digests of the manifest")


def _engine(engine: dict[str, Any]) -> str:
    gpus = ", ".join(engine["compute_capabilities"]) or "the GPU it was built on"
    work = ", ".join(f"{count} {kind}" for kind, count in mapping(engine["proof"].get("matrix_work")).items())
    later = " and later (not proven: no such plan has been run yet)" if engine["version_compatible"] else ""
    what = f"{engine['precision']} for {gpus}, {engine['package']} {engine['version']}{later}"
    attention = mapping(engine["proof"].get("attention"))
    fused = f"; fused attention: {attention.get('fused')} of {attention.get('graph')}" if attention else ""
    return f"{engine['file']}, {human_bytes(engine['bytes'])}; {what}; matrix work: {work or 'none'}{fused}"


def _flat(facts: Any, prefix: str = "") -> list[list[str]]:
    if isinstance(facts, dict):
        return [row for key, value in facts.items() for row in _flat(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(facts, list):
        return [row for index, value in enumerate(facts) for row in _flat(value, f"{prefix}[{index}]")]
    return [[prefix, f"{facts:.6g}" if isinstance(facts, float) else str(facts)]]
