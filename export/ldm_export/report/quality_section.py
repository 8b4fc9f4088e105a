"""Measured settings of a bundle as a table, for the terminal and for the report page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

from ldm_export.page.document import Figure, Markup, element, table
from ldm_runtime.quality import QualityRecord

__all__ = ["QUALITY_COLUMNS", "quality_rows", "quality_section"]

QUALITY_COLUMNS = [
    *("graph", "steps", "cache\nevery", "guidance\nevery"),
    *("time\n(s)", "speed", "dB\nmean", "dB\nworst", "correct"),
]
"""Columns of the table; line breaks keep it within 80 characters."""


def quality_rows(record: QualityRecord) -> list[list[str]]:
    """Rows of a table with ``QUALITY_COLUMNS``, the fastest setting first."""
    reference = record.reference.seconds
    return [
        [
            *map(str, astuple(one.setting)),
            f"{one.seconds:.3g}",
            f"{reference / one.seconds:.2f}×",
            *("same" if value is None else f"{value:.1f}" for value in (one.mean_psnr, one.worst_psnr)),
            "" if one.correct is None else f"{one.correct:.0%}",
        ]
        for one in sorted(record.results, key=lambda one: one.seconds)
    ]


def quality_section(record: QualityRecord) -> Iterator[Markup]:
    """Return the section of the report page."""
    yield element("h2", "Measured settings")
    yield table(QUALITY_COLUMNS, [[row[0], *map(Figure, row[1:])] for row in quality_rows(record)])
    engines = ", ".join(f"{precision} by {engine}" for precision, engine in record.engines.items())
    options = "".join(f", {name} {value:g}" for name, value in record.options.items())
    yield element(
        "p",
        f"{record.images} images for each setting{options}; {engines}. PSNR and speed are against "
        f"{record.reference.setting}. ldm-export generate --budget takes one of these settings.",
        class_="note",
    )
