"""The loss curve as SVG, without a library and without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from pkuslurm.read.report.facts import Point
from pkuslurm.read.report.markup import plain

MOST_POINTS = 1000
# below this a smoothed curve would only hide what there is to see
SMOOTHED_FROM = 24


@dataclass(frozen=True)
class Frame:
    """The drawing's size and margins in its own units, and the ranges that its axes show."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: int = 52
    right: int = 54
    top: int = 14
    bottom: int = 42

    def x(self, value: float) -> float:
        inner = self.width - self.left - self.right
        return self.left + inner * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        inner = self.height - self.top - self.bottom
        return self.top + inner * (self.y_high - value) / (self.y_high - self.y_low)


def chart(losses: Sequence[Point], evals: Sequence[Point], unit: str, width: int, height: int, style: str) -> str:
    """The curves in a drawing of ``width`` × ``height``; at least one point is needed. ``unit`` names the y axis."""
    everything = [*losses, *evals]
    steps, values = [step for step, _ in everything], [value for _, value in everything]
    frame, axes = framed(Frame(width, height, min(steps), max(steps), min(values), max(values)), unit)
    parts = [axes]
    # more than one a pixel would only blacken the drawing
    most = min(MOST_POINTS, width)
    if losses:
        smooth = smoothed(losses) if len(losses) >= SMOOTHED_FROM else None
        parts.append(line(frame, decimated(losses, most), "raw" if smooth else "loss"))
        if smooth:
            parts.append(line(frame, decimated(smooth, most), "loss"))
        parts.append(end(frame, losses[-1], "loss"))
    if evals:
        parts.append(line(frame, decimated(evals, most), "eval"))
        parts += [dot(frame, point, "eval") for point in (evals if len(evals) <= 60 else evals[-1:])]
        if not losses or abs(frame.y(evals[-1][1]) - frame.y(losses[-1][1])) > 14:
            parts.append(end(frame, evals[-1], "eval"))
    return drawing(width, height, style, ("损失曲线 Loss curve", describe(losses, evals)), parts)


def framed(data: Frame, unit: str) -> tuple[Frame, str]:
    """``data`` with its ranges widened to round numbers, and its axes and grid."""
    low, high = data.y_low, data.y_high
    y_ticks = ticks(min(0.0, low) if low < 0.5 * high else low, high, 5)
    x_low, x_high = data.x_low, data.x_high
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x_ticks = [tick for tick in ticks(x_low, x_high, max(3, data.width // 110)) if x_low <= tick <= x_high]
    frame = replace(data, x_low=x_low, x_high=x_high, y_low=y_ticks[0], y_high=y_ticks[-1])
    return frame, grid(frame, [tick for tick in x_ticks if tick == int(tick)], y_ticks, unit)


def drawing(width: int, height: int, style: str, words: tuple[str, str], parts: Sequence[str]) -> str:
    """``parts`` as one picture; ``words``: its title, and what it shows for whoever does not see it."""
    title, description = words
    return (
        f'<svg class="chart {style}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="t-{style} d-{style}"><title id="t-{style}">{plain(title)}</title>'
        f'<desc id="d-{style}">{plain(description)}</desc>\n' + "\n".join(parts) + "\n</svg>"
    )


def describe(losses: Sequence[Point], evals: Sequence[Point]) -> str:
    """The curve in words, for whoever does not see it."""
    parts = []
    for name, curve in (("Training loss", losses), ("Evaluation loss", evals)):
        if curve:
            (first, start), (last, end) = curve[0], curve[-1]
            lowest = min(value for _, value in curve)
            parts.append(
                f"{name}: {start:.4g} at step {first}, {end:.4g} at step {last}, lowest {lowest:.4g}, "
                f"{len(curve)} points."
            )
    return " ".join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose ``low`` to ``high``, ``about`` so many."""
    most = max(abs(low), abs(high))
    if high - low <= max(1e-9 * most, 1e-12):  # as good as equal
        high = max(high, low + 0.1 * (most if most > 1e-12 else 1.0))
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1.0, 2.0, 5.0, 10.0) if factor * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def decimated(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points: the first, the last, and of each stretch between them the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    buckets = (most - 2) // 2
    kept = [points[0]]
    for index in range(buckets):
        bucket = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
        if bucket:
            kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours, a twentieth of the curve; to both sides, so that nothing lags."""
    radius = max(1, len(points) // 40)
    sums = [0.0, *accumulate(value for _, value in points)]
    found = []
    for index, (step, _) in enumerate(points):
        # as many on either side, also near the ends: else the curve would bend there
        reach = min(radius, index, len(points) - 1 - index)
        found.append((step, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return found


def grid(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], unit: str) -> str:
    """Axes, ticks and their names, as SVG."""
    low, right = frame.height - frame.bottom, frame.width - frame.right
    digits = 0
    if len(y_ticks) > 1:
        digits = max(0, min(6, math.ceil(-math.log10(y_ticks[1] - y_ticks[0]) - 1e-9)))
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    for tick in x_ticks:
        x = frame.x(tick)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{low}" y2="{low + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{low + 19}" text-anchor="middle">{tick:.0f}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{low}" y2="{low}"/>')
    middle = (frame.left + right) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{frame.height - 4}" text-anchor="middle">步 step</text>')
    turned = f"rotate(-90 12 {frame.top + (low - frame.top) / 2:.0f})"
    parts.append(
        f'<text class="name" x="12" y="{frame.top + (low - frame.top) / 2:.0f}" text-anchor="middle" '
        f'transform="{turned}">{plain(unit)}</text>'
    )
    return "".join(parts)


def line(frame: Frame, points: Sequence[tuple[float, float]], style: str) -> str:
    path = "M" + "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in points)
    return f'<path class="{style}" d="{path}"/>'


def dot(frame: Frame, point: Point, style: str) -> str:
    return f'<circle class="{style}" cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="3"/>'


def end(frame: Frame, point: Point, style: str) -> str:
    x, y = frame.x(point[0]), frame.y(point[1])
    return dot(frame, point, style) + f'<text class="end {style}" x="{x + 7:.1f}" y="{y + 4:.1f}">{point[1]:.3g}</text>'
