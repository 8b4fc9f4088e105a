"""HTML tables for nested facts of any form, like a manifest's ``measured``. Entries with equal keys share a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm_export.page.document import Markup, element, table

__all__ = ["fact_tables"]

MAX_ROWS, MAX_COLUMNS = 60, 12


def fact_tables(facts: Any, name: str = "") -> Iterator[Markup]:
    """Yield a table of the plain values, then one section with a heading for each nested list or mapping."""
    if name:
        yield element("h3", name)
    if isinstance(facts, Mapping) and facts and all(isinstance(value, Mapping) for value in facts.values()):
        alike = _columns(list(facts.values()))
        if alike is not None:
            yield from _rows(("", *alike), [(key, *_cells(value, alike)) for key, value in facts.items()])
            return
    if isinstance(facts, Sequence) and not isinstance(facts, str):
        if all(isinstance(value, Mapping) for value in facts) and (alike := _columns(list(facts))) is not None:
            yield from _rows(alike, [_cells(value, alike) for value in facts])
            return
        facts = {str(index): value for index, value in enumerate(facts)}
    if not isinstance(facts, Mapping):
        facts = {"": facts}
    plain = [(key, value) for key, value in facts.items() if not isinstance(value, Mapping | list)]
    if plain:
        yield from _rows(("", ""), plain)
    for key, value in facts.items():
        if isinstance(value, Mapping | list) and value:
            yield from fact_tables(value, f"{name}, {key}" if name else str(key))


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Keys of all rows; None if there are too many keys or values that are not plain."""
    keys = dict.fromkeys(key for row in rows for key in row)
    nested = any(isinstance(value, Mapping | list) for row in rows for value in row.values())
    return tuple(keys) if 0 < len(keys) <= MAX_COLUMNS and not nested else None


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(column) for column in columns)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[Markup]:
    yield table([column.replace("_", " ") for column in columns], rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        yield element("p", f"… and {len(rows) - MAX_ROWS} more.", class_="note")
