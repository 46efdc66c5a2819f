"""Line charts as SVG text, coloured by the classes of the page around them. Knows no benchmark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
NUM_TICKS = 5


@dataclass(frozen=True, slots=True)
class Series:
    """points are (x, y) in order; color is a class; dashed lines are of a second kind."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    dots: bool = False
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """unit is written behind tooltips' values; a log axis needs values above 0."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    unit: str = ""

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(
    label: str,
    values: Sequence[float],
    *,
    log: bool = False,
    unit: str = "",
    whole: bool = False,
    marked: bool = False,
) -> Axis:
    """Around all values: from 0 if linear, from a round number if logarithmic.

    whole: no ticks between integers; marked: ticks at the values, as long as they stand apart.
    """
    positive = sorted({value for value in values if value > 0}) or [0.1, 1.0]
    low, high = (_log_range if log else _range)(positive)
    if marked and _stand_apart(positive, log):
        ticks: Sequence[float] = positive
    elif log:
        ticks = _log_ticks(low, high)
    else:
        step = max(_step(high), 1.0) if whole else _step(high)
        ticks = [i * step for i in range(int(high / step + 1e-6) + 1)]
    return Axis(label, low, high, ticks, log, unit)


def _range(values: Sequence[float]) -> tuple[float, float]:
    step = _step(values[-1])
    return 0.0, max(math.ceil(values[-1] / step - 1e-9) * step, step)


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    low = 10.0 ** math.floor(math.log10(values[0]))
    low *= max(factor for factor in (1, 2, 5) if factor * low <= values[0] * 1.0001)
    return low, max(values[-1] * 1.05, low * 2)


def _stand_apart(values: Sequence[float], log: bool) -> bool:
    places = [math.log(value) if log else value for value in values]
    length = places[-1] - (places[0] if log else 0.0)
    return all(b - a > length / 14 for a, b in itertools.pairwise(places))


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """One chart; without a point it says so."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_x_tick(x, value) for value in x.ticks),
        *(_y_tick(y, value) for value in y.ticks),
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        _text(LEFT + _inner_width() / 2, HEIGHT - 8, x.label, "label middle"),
        f'<text class="label middle" transform="translate(14 {TOP + _inner_height() / 2:.0f}) '
        f'rotate(-90)">{escape(y.label)}</text>',
    ]
    for line in series:
        parts += _line(line, x, y)
    if not any(line.points for line in series):
        parts.append(_text(LEFT + _inner_width() / 2, HEIGHT / 2, "no data", "label middle"))
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """As on an axis: 1,500 or 0.25."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _inner_width() -> int:
    return WIDTH - LEFT - RIGHT


def _inner_height() -> int:
    return HEIGHT - TOP - BOTTOM


def _x(place: float) -> float:
    return LEFT + min(max(place, 0.0), 1.0) * _inner_width()


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - min(max(place, 0.0), 1.0) * _inner_height()


def _x_tick(x: Axis, value: float) -> str:
    at = _x(x.place(value))
    line = f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return line + _text(at, HEIGHT - BOTTOM + 17, number(value), "tick middle")


def _y_tick(y: Axis, value: float) -> str:
    at = _y(y.place(value))
    line = f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
    return line + _text(LEFT - 7, at + 4, number(value), "tick end")


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _line(line: Series, x: Axis, y: Axis) -> list[str]:
    places = [(_x(x.place(px)), _y(y.place(py))) for px, py in line.points]
    if not places:
        return []
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for px, py in places[1:]:
        path += f"H{px:.1f}V{py:.1f}" if line.steps else f"L{px:.1f} {py:.1f}"
    style = f"line {line.color}" + (" dashed" if line.dashed else "")
    title = f"<title>{escape(line.label)}</title>"
    parts = [f'<path class="{style}" d="{path}">{title}</path>']
    if line.dots:
        for (px, py), (vx, vy) in zip(places, line.points, strict=True):
            words = f"{line.label}: {number(vy)}{y.unit} at {number(vx)}{x.unit}"
            parts.append(
                f'<circle class="dot {line.color}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
                f"<title>{escape(words)}</title></circle>"
            )
    return parts


def _step(top: float) -> float:
    """A round distance that divides 0 to top into about NUM_TICKS."""
    rough = top / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    factors = (1, 2, 5) if high / low < 300 else (1,)
    first = math.floor(math.log10(low))
    powers = range(first, math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
