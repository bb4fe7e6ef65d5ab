"""Plots as inline SVG: dots and lines over linear or logarithmic axes, coloured by the page's own style sheet.

A colour is a number, the class `s0`, `s1`, ... of what is drawn; the page gives it one for light and one for dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 44
_LEGEND_LINE = 20
_CHARACTER = 6.8  # width of the legend's letters, about
Point = tuple[float, float]
Span = tuple[float, float]  # lowest and highest
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """Points of one colour; `labels` appear when the pointer rests on a point."""

    name: str
    colour: int
    points: Sequence[Point]
    labels: Sequence[str] = ()
    is_line: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis. Values at or below `floor` lie on the edge of a logarithmic one. `names` replace numbers."""

    label: str
    is_log: bool = False
    floor: float = 0.0
    names: Sequence[str] = ()

    def scale(self, value: float) -> float:
        return math.log10(max(value, self.floor)) if self.is_log else value


def plot(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    limit: float | None = None,
    width: int = 720,
    height: int = 300,
) -> str:
    """An SVG element. `limit` draws a dashed line across, the y that must not be exceeded. `title` is read aloud."""
    legend, legend_height = _legend(series, width)
    height += legend_height
    y_values = [value for item in series for _, value in item.points] + ([limit] if limit is not None else [])
    x_range = _range(x, [value for item in series for value, _ in item.points])
    y_range = _range(y, y_values)

    def place(point: Point) -> Point:
        across = (x.scale(point[0]) - x_range[0]) / (x_range[1] - x_range[0])
        up = (y.scale(point[1]) - y_range[0]) / (y_range[1] - y_range[0])
        inner_height = height - _TOP - _BOTTOM - legend_height
        return _LEFT + across * (width - _LEFT - _RIGHT), height - _BOTTOM - up * inner_height

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" class="plot">',
        f"<title>{escape(title)}</title>",
        legend,
        *_grid(x, y, x_range, y_range, place, (width, height, legend_height)),
    ]
    if limit is not None:
        _, level = place((x_range[0] if not x.is_log else 10 ** x_range[0], limit))
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="limit-name" x="{width - _RIGHT - 4}" y="{level - 5:.1f}">tolerance</text>')
    for item in series:
        parts += _draw(item, item.colour % NUM_COLOURS, [place(point) for point in item.points])
    return "".join([*parts, "</svg>"])


def _range(axis: Axis, values: Iterable[float]) -> Span:
    if axis.names:
        return -0.5, len(axis.names) - 0.5
    scaled = [axis.scale(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(scaled), max(scaled)
    if axis.is_log:
        low, high = math.floor(low), math.ceil(high + 1e-9)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(axis: Axis, span: Span) -> list[tuple[float, str]]:
    """(value, text)."""
    if axis.names:
        last, step = len(axis.names) - 1, max(1, math.ceil(len(axis.names) / 16))
        shown = [index for index in range(0, last, step) if last - index >= step] + [last]
        return [(index, axis.names[index]) for index in shown]
    if axis.is_log:
        low, high = round(span[0]), round(span[1])
        step = max(1, math.ceil((high - low) / 8))
        return [(10.0**power, _power(power)) for power in range(low, high + 1, step)]
    size = 10 ** math.floor(math.log10((span[1] - span[0]) / 4))
    step_size = next(size * factor for factor in (1, 2, 5, 10) if (span[1] - span[0]) / (size * factor) <= 6)
    first = math.ceil(span[0] / step_size)
    return [(index * step_size, f"{index * step_size:g}") for index in range(first, int(span[1] / step_size) + 1)]


def _power(power: int) -> str:
    return {0: "1", 1: "10"}.get(power, "10" + str(power).translate(_SUPERSCRIPT))


def _grid(
    x: Axis, y: Axis, x_range: Span, y_range: Span, place: Callable[[Point], Point], size: tuple[int, int, int]
) -> list[str]:
    """Lines, numbers and names of both axes; `size` is width, height and the legend's height."""
    width, height, legend_height = size
    floor, ceiling, parts = height - _BOTTOM, _TOP + legend_height, []
    for value, text in _ticks(y, y_range):
        _, level = place((1.0 if x.is_log else x_range[0], value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="tick y" x="{_LEFT - 8}" y="{level + 4:.1f}">{escape(text)}</text>')
    for value, text in _ticks(x, x_range):
        across, _ = place((value, 1.0 if y.is_log else y_range[0]))
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{ceiling}" y2="{floor}"/>')
        parts.append(f'<text class="tick x" x="{across:.1f}" y="{floor + 17}">{escape(text)}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{height - 6}">{escape(x.label)}</text>')
    half = (floor + ceiling) / 2
    parts.append(
        f'<text class="axis" transform="translate(13 {half:.0f}) rotate(-90)">{escape(y.label)}</text>'
        f'<line class="frame" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    return parts


def _draw(series: Series, colour: int, places: Sequence[Point]) -> list[str]:
    parts = []
    if series.is_line:
        points = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        parts.append(f'<polyline class="line s{colour}" points="{points}"/>')
    for index, (across, up) in enumerate(places):
        label = f"<title>{escape(series.labels[index])}</title>" if series.labels else ""
        parts.append(f'<circle class="dot s{colour}" cx="{across:.1f}" cy="{up:.1f}" r="3">{label}</circle>')
    return parts


def _legend(series: Sequence[Series], width: int) -> tuple[str, int]:
    """Names beside their colours, in as many lines as they need."""
    parts, across, line = [], float(_LEFT), 0
    for item in series:
        length = 26 + _CHARACTER * len(item.name)
        if across + length > width and across > _LEFT:
            across, line = float(_LEFT), line + 1
        up = 10 + line * _LEGEND_LINE
        parts.append(f'<circle class="dot s{item.colour % NUM_COLOURS}" cx="{across + 5:.1f}" cy="{up}" r="4.5"/>')
        parts.append(f'<text class="legend" x="{across + 14:.1f}" y="{up + 4}">{escape(item.name)}</text>')
        across += length
    return "".join(parts), (line + 1) * _LEGEND_LINE if series else 0
