"""Charts as SVG text, without a plotting library: line charts, horizontal bar charts, and sheets of several charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from ldm_runtime.errors import SpecError

__all__ = ["HEIGHT", "WIDTH", "ChartAxis", "Series", "bars", "lines", "sheet"]

WIDTH, HEIGHT = 720, 400
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#000000")
"""Okabe and Ito's palette for colour-blind readers. It repeats after eight series."""

_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW, _CHAR = 72, 190, 44, 52, 22, 6.6


@dataclass(frozen=True)
class Series:
    """A named series of points (x, y): ``joined`` connects them by a line, ``marked`` draws a dot at each."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True)
class ChartAxis:
    """Range of one axis, from ``low`` to ``high``, with a linear or a logarithmic scale."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool) -> ChartAxis:
        """Create an axis that covers all values; a linear axis includes 0.

        Raises:
            SpecError: There are no values, or a value is not finite, or not above 0 on a logarithmic axis.
        """
        fit = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        if not fit or len(fit) != len(values):
            raise SpecError(f"chart: got {list(values)!r:.80}, expected finite numbers{' above zero' if log else ''}")
        if log:
            low, high = min(fit), max(fit)
            return cls(low / 1.15, high * 1.15, True)
        low, high = min(0.0, *fit), max(0.0, *fit)
        return cls(low, (high if high > low else low + 1) * 1.05, False)

    def at(self, value: float) -> float:
        """Position of a value: 0 at the start of the axis, 1 at its end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values on the axis, about five."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1,), (1, 3), (1, 2, 5)):
                ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                ticks = [value for value in ticks if self.low <= value <= self.high]
                if len(ticks) >= 4:
                    break
            return ticks or [self.low, self.high]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        return [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def lines(
    title: str,
    x: str,
    y: str,
    series: Sequence[Series],
    *,
    log: tuple[bool, bool] = (False, False),
    height: int = HEIGHT,
) -> str:
    """Line chart with axis labels ``x`` and ``y``; ``log`` says which of the two axes is logarithmic.

    Raises:
        SpecError: There are no points, or one of them does not lie on an axis.
    """
    points = [point for one in series for point in one.points]
    across, up = (ChartAxis.over([point[side] for point in points], log[side]) for side in (0, 1))
    margin = max(_RIGHT, round(34 + _CHAR * max(len(one.name) for one in series)))
    wide, high = max(120, WIDTH - _LEFT - margin), height - _TOP - _BOTTOM
    marks = [_text(_LEFT, 24, title, "bold")]
    for tick in across.ticks():
        place = _LEFT + wide * across.at(tick)
        marks += [
            _line(place, _TOP, place, _TOP + high, "#e3e3e3"),
            _text(place, _TOP + high + 18, _number(tick), "mid"),
        ]
    for tick in up.ticks():
        place = _TOP + high * (1 - up.at(tick))
        marks += [
            _line(_LEFT, place, _LEFT + wide, place, "#e3e3e3"),
            _text(_LEFT - 8, place + 4, _number(tick), "end"),
        ]
    marks += [
        _line(_LEFT, _TOP + high, _LEFT + wide, _TOP + high, "#666"),
        _line(_LEFT, _TOP, _LEFT, _TOP + high, "#666"),
    ]
    marks.append(_text(_LEFT + wide / 2, height - 12, x, "mid"))
    marks.append(f'<g transform="translate(16 {_TOP + high / 2:.1f}) rotate(-90)">{_text(0, 0, y, "mid")}</g>')
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        places = [(_LEFT + wide * across.at(px), _TOP + high * (1 - up.at(py))) for px, py in one.points]
        if one.joined and len(places) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if one.marked or len(places) == 1:
            marks += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}"/>' for px, py in places]
        below = _TOP + 14 + 18 * index
        marks.append(f'<rect x="{_LEFT + wide + 14}" y="{below - 9}" width="10" height="10" fill="{colour}"/>')
        marks.append(_text(_LEFT + wide + 30, below, one.name))
    return _svg(WIDTH, height, marks)


def bars(title: str, label: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Horizontal bar chart.

    Args:
        title: Title of the chart.
        label: Unit of the values.
        rows: Row name -> series name -> value. A row has one bar for each series.

    Raises:
        SpecError: There are no bars, or a value is not finite.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    along = ChartAxis.over([value for row in rows.values() for value in row.values()], log=False)
    left = 24 + _CHAR * max(len(row) for row in rows)
    margin = 70 + (16 + _CHAR * max(map(len, names)) if len(names) > 1 else 0)
    wide, marks, below = max(120.0, WIDTH - left - margin), [_text(left, 24, title, "bold")], float(_TOP)
    for row, values in rows.items():
        marks.append(_text(left - 8, below + _ROW * len(values) / 2 + 4, row, "end"))
        for name, value in values.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            start, end = sorted((left + wide * along.at(0), left + wide * along.at(value)))
            caption = f"{_number(value)} {name}" if len(names) > 1 else _number(value)
            marks.append(
                f'<rect x="{start:.1f}" y="{below + 3:.1f}" width="{end - start:.1f}" height="16" fill="{colour}"/>'
            )
            marks.append(_text(end + 6, below + 16, caption))
            below += _ROW
        below += 8
    marks.append(_text(left + wide / 2, below + 18, label, "mid"))
    return _svg(WIDTH, round(below + 34), marks)


def sheet(charts: Sequence[str]) -> str:
    """Stack several charts vertically into one SVG."""
    marks, below = list[str](), 0
    for chart in charts:
        high = int(chart.partition(' height="')[2].partition('"')[0])
        marks.append(chart.replace("<svg ", f'<svg y="{below}" ', 1))
        below += high
    return _svg(WIDTH, below, marks)


def _svg(width: int, height: int, marks: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'
    return "\n".join([f"{head} {font}>", '<rect width="100%" height="100%" fill="#fff"/>', *marks, "</svg>\n"])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, kind: str = "start") -> str:
    style = {"mid": ' text-anchor="middle"', "end": ' text-anchor="end"', "bold": ' font-weight="bold" font-size="14"'}
    return f'<text x="{x:.1f}" y="{y:.1f}"{style.get(kind, "")}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
