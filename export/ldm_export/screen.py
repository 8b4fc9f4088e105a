"""What the command line shows: progress bars with time left on a terminal, tables, and nothing where it is quiet."""

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


class Screen:
    """Results go to standard output, progress and notes to standard error, the latter not when ``quiet``."""

    def __init__(self, quiet: bool = False):
        self.out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.notes = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def result(self, text: str) -> None:
        """A line on standard output."""
        self.out.print(printable(text))

    def note(self, text: str) -> None:
        """A line on standard error."""
        self.notes.print(printable(text))

    def json(self, facts: Any) -> None:
        """Facts as indented JSON on standard output, without colour, whatever reads it."""
        print(json.dumps(facts, indent=2, allow_nan=False), file=self.out.file, flush=True)

    @contextmanager
    def bar(self, what: str, total: int | None = None) -> Iterator[_Bar]:
        """A bar while the block runs, removed at its end; shown on a terminal only."""
        what_column = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), what_column, BarColumn(), MofNCompleteColumn())
        off = not self.notes.is_terminal or self.notes.quiet
        with Progress(
            *columns, TimeElapsedColumn(), TimeLeft(), console=self.notes, transient=True, disable=off
        ) as live:
            yield _Bar(live, what, total)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; under a header row the columns after the first are set flush right, as numbers are."""
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
        self._screen, self._told = screen, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self._told:
            self._told.add(text)
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
        """Show ``done`` of ``total``, doing ``what``."""
        self._live.update(self._task, completed=done, total=total, description=what and printable(what))


def printable(text: str) -> str:
    """The text with control characters and lone surrogates spelled out: a bundle's names may come from strangers."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def human_bytes(size: float) -> str:
    """12.3 MB, in powers of a thousand."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
