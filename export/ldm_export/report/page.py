"""Renders a report as one self-contained HTML page: images of each precision side by side, figures and plots."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ldm_export.page.chart import Series, lines
from ldm_export.page.document import (
    Figure,
    Markup,
    decibel,
    difference,
    document,
    element,
    inline_image,
    number,
    table,
    text,
)
from ldm_export.page.fact_tables import fact_tables
from ldm_export.report.contents import REFERENCE, Report
from ldm_export.report.input_images import input_images
from ldm_export.report.int8_section import int8_section
from ldm_export.report.lenient_json import finite, mapping
from ldm_export.report.quality_section import quality_section
from ldm_export.requests import label
from ldm_export.screen import human_bytes, printable
from ldm_runtime.bundle_layout import INT8_REPORT, MANIFEST, QUALITY_REPORT, RANGES_REPORT, precision_report

__all__ = ["report_page"]

MAX_LISTED = 40
"""Maximum number of rows of long lists."""


def report_page(report: Report) -> str:
    """Render the report as HTML with inline images and plots; no network is needed to open it."""
    sections = (_images, _precisions, _quality, _int8, _half, _engines, _measured, _origin)
    return document(
        f"{report.bundle.folder.resolve().name}: report", (part for section in sections for part in section(report))
    )


def _images(report: Report) -> Iterator[Markup]:
    others = [name for name, result in report.results.items() if name != REFERENCE and result.images]
    yield element("h2", "Images")
    for name, result in report.results.items():
        if result.failure:
            yield element("p", f"{name} could not run: {result.failure}", class_="bad")
    if not report.results[REFERENCE].images:
        return
    times = {name: _amplification(report, name) for name in others}
    defaults = report.bundle.manifest.defaults
    steps = report.options.steps or defaults.num_inference_steps
    yield element(
        "p",
        f"The same request and seed in each precision, {steps} steps, guidance scale {defaults.guidance_scale:g}, eta "
        f"{defaults.eta:g}." + (" Differences from fp32 are amplified by the factor in the heading." if others else ""),
    )
    rows = []
    inputs = [input_images(request) for request in report.requests]
    given = ("input",) if any(inputs) else ()
    for index, request in enumerate(report.requests):
        title = label(request)
        images = {name: report.results[name].images[index] for name in (REFERENCE, *others)}
        row = [Markup(f"{text(title)}<br><span class=note>seed {report.options.seed + index}</span>")]
        row += [Markup("".join(inline_image(image, name) for name, image in inputs[index].items()))] if given else []
        row += [inline_image(image, f"{title}, {name}") for name, image in images.items()]
        row += [
            Markup(
                inline_image(difference(images[name], images[REFERENCE], times[name]), f"difference of {name}")
                + element("span", f"PSNR {decibel(report.psnr(name)[index])}", class_="note")
            )
            for name in others
        ]
        rows.append(row)
    yield table(("request", *given, REFERENCE, *others, *(f"|{name} − fp32| × {times[name]}" for name in others)), rows)


def _amplification(report: Report, precision: str) -> int:
    """The largest power of two, at most 64, that keeps the largest difference within the range of a pixel."""
    pairs = zip(report.results[REFERENCE].images, report.results[precision].images, strict=True)
    largest = max(int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) for one, other in pairs)
    return int(2 ** min(6, max(0, np.floor(np.log2(255 / max(largest, 1))))))


def _precisions(report: Report) -> Iterator[Markup]:
    yield element("h2", "Precisions")
    first = report.results[REFERENCE].step
    rows = []
    for name, result in report.results.items():
        ratios = [value for value in report.psnr(name) if value is not None] if name != REFERENCE else []
        equal = bool(result.images) and name != REFERENCE and not ratios
        rows.append(
            (
                name,
                Figure(human_bytes(report.size(name))),
                Figure(f"{report.size(name) / report.size(REFERENCE):.0%}"),
                "equal" if equal else Figure(f"{np.mean(ratios):.1f}") if ratios else None,
                "equal" if equal else Figure(f"{min(ratios):.1f}") if ratios else None,
                result.backend,
                Figure(f"{1000 * result.step:.1f}") if result.step else None,
                Figure(f"{first / result.step:.2f}×") if result.step and first else None,
            )
        )
    yield table(("", "graphs", "of fp32", "PSNR mean, dB", "PSNR worst, dB", "engine", "ms per step", "speed"), rows)
    yield element(
        "p",
        f"PSNR compares the {len(report.requests)} images above with fp32. A step is one denoising step of one request "
        "on the machine that made this report (median of all steps). The precisions ran one after another, so "
        "differences of a few percent in speed are noise.",
        class_="note",
    )


def _quality(report: Report) -> Iterator[Markup]:
    if QUALITY_REPORT in report.files:
        yield from quality_section(report.bundle.quality())


def _int8(report: Report) -> Iterator[Markup]:
    if facts := report.files.get(INT8_REPORT):
        yield from int8_section(facts)


def _half(report: Report) -> Iterator[Markup]:
    rows, listed = [], []
    for precision in report.results:
        for component in report.components:
            facts = report.files.get(precision_report(component, precision))
            if facts is None or "islands" not in facts:
                continue
            islands = mapping(facts.get("islands"))
            reasons = Counter(str(reason).partition(":")[0] for reason in islands.values())
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            rows.append((component, precision, finite(facts.get("half")), len(islands), counts))
            listed += [
                (component, precision, node, reason) for node, reason in islands.items() if "range" in str(reason)
            ]
    if not rows:
        return
    yield element("h2", "Half precision: operators that stay in fp32")
    yield table(("component", "precision", "nodes in half", "nodes in fp32", "why"), rows)
    if listed:
        yield element("p", "Operators that stay in fp32 because of their measured range:")
        yield table(("component", "precision", "node", "why"), listed[:MAX_LISTED])
        if len(listed) > MAX_LISTED:
            yield element("p", f"… and {len(listed) - MAX_LISTED} more.", class_="note")
    yield from _magnitudes(report.files.get(RANGES_REPORT, {}))


def _magnitudes(ranges: Mapping[str, Any]) -> Iterator[Markup]:
    """Plot the largest magnitude of each tensor of each component, in descending order."""
    series = []
    for component, magnitudes in ranges.items():
        values = [value for value in map(finite, mapping(magnitudes).values()) if value and value > 0]
        if values:
            points = tuple((float(rank), value) for rank, value in enumerate(sorted(values, reverse=True), 1))
            series.append(Series(printable(component), points, marked=False))
    if series:
        longest = max(len(one.points) for one in series)
        limit = float(np.finfo(np.float16).max)
        series.append(Series("largest fp16 number", ((1.0, limit), (longest, limit)), marked=False))
        title = "Largest magnitude of each tensor along denoising trajectories"
        yield Markup(lines(title, "tensors, the largest first", "magnitude", series, log=(False, True)))


def _engines(report: Report) -> Iterator[Markup]:
    rows = []
    for component, part in report.bundle.manifest.components.items():
        for engine in part.engines:
            work = mapping(engine.proof.get("matrix_work"))
            kinds = ", ".join(f"{count} {kind}" for kind, count in work.items())
            built = f"{engine.package} {engine.version}"
            attention = mapping(engine.proof.get("attention"))
            fused = f"{attention.get('fused')} of {attention.get('graph')}" if attention else "none"
            gpus = ", ".join(engine.compute_capabilities)
            rows.append((component, engine.precision, built, gpus, kinds or "none", fused))
    if rows:
        yield element("h2", "Engines")
        columns = ("component", "precision", "built by", "compute capability", "proof: matrix work", "fused attention")
        yield table(columns, rows)


def _measured(report: Report) -> Iterator[Markup]:
    for name, facts in report.bundle.manifest.measured.items():
        if name == "int8" and INT8_REPORT in report.files:
            continue  # shown in its own section
        yield element("h2", f"Measured: {name}")
        yield from fact_tables(facts)


def _origin(report: Report) -> Iterator[Markup]:
    manifest = report.bundle.manifest
    yield element("h2", "Origin")
    yield table(("build request", ""), [(key, _short(value)) for key, value in sorted(manifest.request.items())])
    yield table(("built with", ""), sorted(manifest.tools.items()))
    digest = hashlib.sha256((report.bundle.folder / MANIFEST).read_bytes()).hexdigest()
    yield element("p", "SHA-256 of the manifest: ", element("code", digest), class_="note")


def _short(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
