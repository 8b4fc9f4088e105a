"""The int8 section of the report page: budget and quality, sensitivity of the layers, ranges over timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm_export.page.chart import Series, lines
from ldm_export.page.document import Figure, Markup, element, number, table
from ldm_export.report.lenient_json import finite, mapping, mappings
from ldm_export.screen import human_bytes, printable
from ldm_runtime.bundle_layout import INT8_REPORT
from ldm_runtime.model import UNET

__all__ = ["FILE", "int8_section"]

FILE = INT8_REPORT
MAX_LISTED, MAX_LINES, MAX_NAME = 15, 6, 44
"""Maximum number of listed sensitive layers, of lines in a plot of ranges, and of characters of a name in a plot."""

MEASURES = {"latent_db": "the final latents", "output_db": "the layer's own result"}

Facts = Mapping[str, Any]


def int8_section(facts: Facts) -> Iterator[Markup]:
    """Return all parts of the section. The file is untrusted: missing facts and wrong types are skipped."""
    yield element("h2", "int8")
    yield from _outcome(facts)
    entries = mapping(facts.get("components"))
    components = {name: entries[name] for name in sorted(entries, key=lambda name: name != UNET)}
    yield from _components(components)
    for name, part in components.items():
        yield from _sensitivity(name, mappings(mapping(part).get("layers")))
    for name, part in components.items():
        yield from _ranges(name, mapping(mapping(part).get("ranges")))
    record = mapping(facts.get("record"))
    if record:
        digest = element("code", record.get("sha256"))
        yield element("p", f"The calibration record is {record.get('file')}, SHA-256 ", digest, ".", class_="note")


def _outcome(facts: Facts) -> Iterator[Markup]:
    budget, summary = mapping(facts.get("budget")), mapping(facts.get("summary"))
    settings, speed = mapping(facts.get("settings")), mapping(facts.get("speed"))
    if budget:
        met = budget.get("met") is True
        verdict = f"Budget {'met' if met else 'not met'}: {budget.get('verdict')}."
        yield element("p", verdict, class_="good" if met else "bad")
    warnings = facts.get("warnings")
    for warning in warnings[:MAX_LISTED] if isinstance(warnings, list) else []:
        yield element("p", f"Warning: {warning}.", class_="bad")
    exact = _share(summary, "correct_fp32")
    rows = [
        ("trial images", finite(settings.get("images")), f"{settings.get('steps')} steps on {settings.get('backend')}"),
        ("PSNR against fp32", _decibel(summary, "psnr_mean"), f"worst {_decibel(summary, 'psnr_worst') or 'unknown'}"),
        ("SSIM against fp32", _digits(summary, "ssim_mean"), f"worst {_digits(summary, 'ssim_worst') or 'unknown'}"),
        ("prompt accuracy", _share(summary, "correct_int8"), f"{exact or 'not graded'} in fp32"),
        ("UNet operations in int8", _share(summary, "unet_int8_share"), "of its multiply-adds"),
        ("graphs", _bytes(summary, "bytes_int8"), f"{_bytes(summary, 'bytes_fp32') or 'unknown'} in fp32"),
    ]
    times = mapping(speed.get("unet_ms"))
    if (ratio := finite(speed.get("ratio"))) is not None:
        measured = ", ".join(
            f"{name} {number(ms)} ms" for name, value in times.items() if (ms := finite(value)) is not None
        )
        rows.append(
            ("UNet, times as fast as fp32", Figure(f"{ratio:.2f}"), f"{measured}; {speed.get('backend')}, alternating")
        )
    yield table(("", "", ""), rows)


def _components(components: Facts) -> Iterator[Markup]:
    rows = []
    for name, entry in components.items():
        part = mapping(entry)
        layers = mappings(part.get("layers"))
        quantized = sum(layer.get("int8") is True for layer in layers)
        size, before = _bytes(part, "bytes_int8"), _bytes(part, "bytes_fp32")
        why = "" if part.get("quantized") is True else part.get("why")
        rows.append((name, Figure(f"{quantized} of {len(layers)}"), _share(part, "int8_share"), size, before, why))
    if rows:
        yield table(("component", "layers in int8", "of its operations", "int8", "fp32", "why not"), rows)


def _sensitivity(component: str, layers: Sequence[Facts]) -> Iterator[Markup]:
    """Plot the sensitivity of each layer, if measured on the final latents, and list the most sensitive layers."""
    key = next((key for key in MEASURES if any(finite(layer.get(key)) is not None for layer in layers)), None)
    if key is None:
        return
    numbers = [(place, layer, finite(layer.get(key))) for place, layer in enumerate(layers, 1)]
    measured = [(place, layer, value) for place, layer, value in numbers if value is not None]
    kinds = (("in int8", True), ("kept in float", False))
    points = {
        name: tuple((float(place), value) for place, layer, value in measured if (layer.get("int8") is True) is kind)
        for name, kind in kinds
    }
    series = [Series(name, values, joined=False) for name, values in points.items() if values]
    yield element("h3", f"{component}: sensitivity of each layer")
    ratio = f"Signal-to-noise ratio of {MEASURES[key]} with that layer alone in int8"
    explanation = f"{ratio}; a lower ratio means a more sensitive layer."
    yield element("p", explanation, class_="note")
    yield Markup(lines(f"{printable(component)}: sensitivity", "layer, in the graph's order", "dB", series))
    measured.sort(key=lambda item: item[2])
    rows = [
        (
            place,
            layer.get("name"),
            layer.get("op"),
            finite(layer.get("flops")),
            Figure(f"{value:.1f}"),
            "int8" if layer.get("int8") is True else f"float: {layer.get('why')}",
            Figure(f"{smoothing:g}") if (smoothing := finite(layer.get("smoothing"))) else "",
        )
        for place, layer, value in measured[:MAX_LISTED]
    ]
    yield table(("", "most sensitive first", "", "operations", "dB", "computed in", "smoothing"), rows)


def _ranges(component: str, ranges: Facts) -> Iterator[Markup]:
    """Plot the tensors whose largest magnitude changes most along the trajectory, and list those with the largest."""
    recorded = ranges.get("timesteps")
    timesteps = [finite(value) for value in recorded] if isinstance(recorded, list) else []
    magnitudes = {}
    for name, values in mapping(ranges.get("tensors")).items():
        numbers = [finite(value) for value in values] if isinstance(values, list) else []
        if len(numbers) == len(timesteps) > 1 and all(value is not None and value > 0 for value in numbers):
            magnitudes[name] = [value for value in numbers if value is not None]
    steps = [value for value in timesteps if value is not None]
    if not magnitudes or len(steps) != len(timesteps):
        return
    yield element("h3", f"{component}: ranges over timesteps")
    yield element("p", "Denoising runs from right to left, from the largest timestep to the smallest.", class_="note")
    moves = sorted(magnitudes, key=lambda name: -max(magnitudes[name]) / min(magnitudes[name]))[:MAX_LINES]
    largest = sorted(magnitudes, key=lambda name: -max(magnitudes[name]))[:MAX_LINES]
    for title, names in (("Layer inputs that change most", moves), ("Largest layer inputs", largest)):
        series = [
            Series(_shortened(name), tuple(zip(steps, magnitudes[name], strict=True)), marked=False) for name in names
        ]
        yield Markup(lines(title, "timestep", "largest magnitude", series, log=(False, True)))


def _shortened(name: str) -> str:
    """Shorten a tensor's name to its end, which distinguishes it from other names."""
    text = printable(name)
    return text if len(text) <= MAX_NAME else f"…{text[1 - MAX_NAME :]}"


def _share(facts: Facts, key: str) -> Figure | None:
    value = finite(facts.get(key))
    return None if value is None else Figure(f"{value:.1%}")


def _decibel(facts: Facts, key: str) -> Figure | None:
    value = finite(facts.get(key))
    return None if value is None else Figure(f"{value:.1f} dB")


def _digits(facts: Facts, key: str) -> Figure | None:
    value = finite(facts.get(key))
    return None if value is None else Figure(f"{value:.4f}")


def _bytes(facts: Facts, key: str) -> Figure | None:
    value = finite(facts.get(key))
    return None if value is None else Figure(human_bytes(value))
