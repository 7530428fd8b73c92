"""Geometry of the report's pictures, in per cent of the width and height that the page gives them; the template draws them as inline SVG.

Nothing here knows of colours or markup. Logarithmic axes have whole decades; a value of zero, which they do not have, stands at the low end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .locate import number


@dataclass(frozen=True)
class Axis:
    """From `low` to `high` (exponents of ten when `log`) with ticks (per cent, label)."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float | None:
        """Per cent of the axis at which a value stands, never outside it; None for NaN."""
        if math.isnan(value):
            return None
        if self.log:
            value = self.low if value <= 0.0 else (self.high if math.isinf(value) else math.log10(value))
        return round(100.0 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)


def log_axis(values: Iterable[float], most: int = 5) -> Axis:
    """Whole decades around the positive finite values, with at most `most` labelled."""
    given = [math.log10(value) for value in values if value > 0.0 and math.isfinite(value)]
    low, high = (math.floor(min(given) - 0.3), math.ceil(max(given) + 0.3)) if given else (-17, 0)
    every = max(1, math.ceil((high - low) / most))
    places = range(math.ceil(low / every) * every, high + 1, every)
    return Axis(low, high, True, tuple((round(100.0 * (place - low) / (high - low), 2), f"1e{place}" if place else "1") for place in places))


def linear_axis(values: Iterable[float], most: int = 5, *, whole: bool = False) -> Axis:
    """A range around the finite values with round ticks, whole numbers if `whole`."""
    given = [value for value in values if math.isfinite(value)]
    low, high = (min(given), max(given)) if given else (0.0, 1.0)
    if low == high:
        low, high = low - max(abs(low), 1.0) * 0.05, high + max(abs(high), 1.0) * 0.05
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(max(rough, float(whole))))
    step = next(unit * factor for factor in (1.0, 2.0, 5.0, 10.0) if unit * factor >= max(rough * 0.999, float(whole)))
    first = math.ceil(low / step - 1e-9)
    ticks = [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, False, tuple((round(100.0 * (tick - low) / (high - low), 2), f"{tick:.6g}" if step < 1e5 else number(tick))
                                        for tick in ticks))


@dataclass(frozen=True)
class Line:
    """A line of a chart: its label, the place of its colour in the palette, and the path that an SVG of 100 x 100 draws.

    `dots` is a path of points without length, where they are few enough to be marked.
    """

    label: str
    colour: int
    path: str
    dashed: bool = False
    dots: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over common axes. `level` is a height to mark, such as what is allowed."""

    title: str
    x_label: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    level: float | None = None
    level_label: str = ""


@dataclass(frozen=True)
class Data:
    """What a chart is made from: a label and points (x, y); a line may be drawn dashed in the colour of the one before it."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    paired: bool = False


def chart(title: str, x_label: str, data: Sequence[Data], *, log: bool = True, level: float | None = None, level_label: str = "") -> Chart | None:
    """A chart of the data; None when no point of it can be drawn. NaN breaks a line, infinity and zero stand at the ends of a logarithmic axis."""
    drawn = [line for line in data if any(not math.isnan(y) for _, y in line.points)]
    if not drawn:
        return None
    heights = [y for line in drawn for _, y in line.points] + ([] if level is None else [level])
    x = linear_axis((x for line in drawn for x, _ in line.points), whole=True)
    y = log_axis(heights) if log else linear_axis(heights)
    colours = [sum(not line.paired for line in drawn[:place]) - line.paired for place, line in enumerate(drawn)]
    lines = tuple(Line(line.label, max(0, colour) % 8, _path(line.points, x, y), line.dashed, _dots(line.points, x, y))
                  for colour, line in zip(colours, drawn, strict=True))
    return Chart(title, x_label, x, y, lines, None if level is None else y.at(level), level_label)


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    parts, pen = [], "M"
    for across, up in points:
        height = y.at(up)
        if height is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x.at(across):g} {100.0 - height:.5g}")
        pen = "L"
    return "".join(parts)


def _dots(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    if len(points) > 25:
        return ""
    return "".join(f"M{x.at(across):g} {100.0 - y.at(up):.5g}h0" for across, up in points if y.at(up) is not None)


def warmth(value: float, allowed: float) -> int:
    """How close a value is to what is allowed, from 0 (seven decades below, or zero) to 7 (within the last decade), and 9 above it or NaN."""
    if math.isnan(value) or value > allowed:
        return 9
    if value <= 0.0 or math.isinf(allowed):
        return 0
    return max(0, 7 - math.floor(math.log10(allowed / value)))
