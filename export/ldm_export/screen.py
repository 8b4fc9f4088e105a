"""Output of the command line: results, tables, notes and progress bars."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table

__all__ = ["PACKAGES", "Screen", "human_bytes", "printable", "warnings_on"]


class Screen:
    """Writes results to standard output, and progress and notes to standard error unless ``quiet``."""

    def __init__(self, quiet: bool = False):
        self.out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.notes = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def result(self, text: str) -> None:
        """Print a line to standard output."""
        self.out.print(printable(text))

    def note(self, text: str) -> None:
        """Print a line to standard error."""
        self.notes.print(printable(text))

    def json(self, facts: Any) -> None:
        """Print facts to standard output as indented JSON, always without colour."""
        print(json.dumps(facts, indent=2, allow_nan=False), file=self.out.file, flush=True)

    @contextmanager
    def bar(self, what: str, total: int | None = None) -> Iterator[_Bar]:
        """Show a progress bar while the block runs, on a terminal only."""
        what_column = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), what_column, BarColumn(), MofNCompleteColumn())
        off = not self.notes.is_terminal or self.notes.quiet
        with Progress(
            *columns, TimeElapsedColumn(), TimeLeft(), console=self.notes, transient=True, disable=off
        ) as live:
            yield _Bar(live, what, total)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; with a header row, all columns but the first are aligned to the right."""
        headed = any(columns)
        table = Table(title=title, title_justify="left", title_style="bold", show_header=headed)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and headed else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        self.out.print(table)


PACKAGES = ("ldm_runtime", "ldm_calibration", "ldm_export")


class _Notes(logging.Handler):
    """Prints warnings as notes, each text once."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self._screen, self._reported = screen, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self._reported:
            self._reported.add(text)
            self._screen.note(f"warning: {text}")


@contextmanager
def warnings_on(screen: Screen, shown: bool = True) -> Iterator[None]:
    """Print the warnings that this project's packages log while the block runs, and hide them from the root logger.

    Args:
        screen: Prints them, unless it is quiet.
        shown: False leaves them to the root logger.
    """
    if not shown:
        yield
        return
    notes, loggers = _Notes(screen), [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(notes)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(notes)
            logger.setLevel(level)
            logger.propagate = propagate


class _Bar:
    def __init__(self, live: Progress, what: str, total: int | None):
        self._live, self._task = live, live.add_task(what, total=total)

    def to(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Update the bar: ``done`` of ``total`` steps, and the name of the current task."""
        self._live.update(self._task, completed=done, total=total, description=what and printable(what))


def printable(text: str) -> str:
    """Escape control characters and lone surrogates, because names in a bundle are untrusted."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def human_bytes(size: float) -> str:
    """Format bytes in powers of 1000, e.g. "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
