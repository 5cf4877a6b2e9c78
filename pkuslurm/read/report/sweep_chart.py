"""A sweep's loss curves over each other: the best point's stands out, the others are thin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pkuslurm.read.report.chart import SMOOTHED_FROM, Frame, decimated, dot, drawing, framed, line, smoothed
from pkuslurm.read.report.facts import Point
from pkuslurm.read.report.markup import plain

MOST_CURVES = 60
# a curve of so few points is still the same to the eye, and sixty of them are no megabytes
MOST_POINTS = 200
# more names than these would hide the curves' ends
MOST_NAMES = 12
LINE_HEIGHT = 14.0


@dataclass(frozen=True)
class Curve:
    """What is drawn of one point."""

    n: int
    label: str
    losses: tuple[Point, ...]
    evals: tuple[Point, ...] = ()


def overlay(curves: Sequence[Curve], best: int | None, unit: str, width: int, height: int, style: str) -> str:
    """The curves, in the order of the ranks; at least one, each with losses. ``best``: the number of the best point."""
    chosen = next((curve for curve in curves if curve.n == best), None)
    evals = chosen.evals if chosen else ()
    steps = [step for curve in curves for step, _ in curve.losses]
    shown = {curve.n: _smooth(curve.losses) for curve in curves}
    top = _top(list(shown.values()) + ([evals] if evals else []))
    low = min(value for curve in (*shown.values(), evals) for _, value in curve)
    frame, axes = framed(Frame(width, height, min(steps), max(steps), low, max(top, low), right=76), unit)
    parts = [axes]
    most = min(MOST_POINTS, width // 2)
    for curve in reversed(curves):  # the better ones over the others
        if curve is not chosen:
            parts.append(_titled(curve, _line(frame, decimated(shown[curve.n], most), "other")))
    names: list[tuple[float, str]] = []
    if chosen:
        if shown[chosen.n] is not chosen.losses:
            parts.append(_line(frame, decimated(chosen.losses, most), "raw"))
        parts.append(_titled(chosen, _line(frame, decimated(shown[chosen.n], 2 * most), "loss")))
        _name(parts, names, frame, chosen.losses[-1], f"#{chosen.n} {chosen.losses[-1][1]:.3g}", "loss")
        if evals:
            parts.append(_line(frame, decimated(evals, most), "eval"))
            _name(parts, names, frame, evals[-1], f"{evals[-1][1]:.3g}", "eval")
    if len(curves) <= MOST_NAMES:
        for curve in curves:
            if curve is not chosen:
                _name(parts, names, frame, shown[curve.n][-1], f"#{curve.n}", "other")
    words = describe(curves, chosen)
    if out := sum(max(value for _, value in curve) > frame.y_high for curve in shown.values()):
        words += f" {out} of them leave the drawing at its top."
        parts.append(f'<text x="{frame.width - frame.right}" y="11" text-anchor="end">↑ {out}</text>')
    return drawing(width, height, style, ("各组合的损失曲线 Loss curves of the points", words), parts)


def describe(curves: Sequence[Curve], best: Curve | None) -> str:
    """The drawing in words."""
    ends = [curve.losses[-1][1] for curve in curves]
    words = f"{len(curves)} training losses; their last values are between {min(ends):.4g} and {max(ends):.4g}."
    return words + (f" The best point, #{best.n} ({best.label}), ends at {best.losses[-1][1]:.4g}." if best else "")


def _smooth(losses: Sequence[Point]) -> Sequence[Point]:
    return smoothed(losses) if len(losses) >= SMOOTHED_FROM else losses


def _top(curves: Sequence[Sequence[Point]]) -> float:
    """The highest value to show: of curves that run away only what is not far above the others."""
    peaks = sorted(max(value for _, value in curve) for curve in curves)
    return min(peaks[-1], 1.5 * peaks[len(peaks) // 2])


def _line(frame: Frame, points: Sequence[Point], style: str) -> str:
    """The curve where it is within the drawing; where it leaves that, up to the edge."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for before, point in pairwise([points[0], *points]):
        (first, low), (step, value) = before, point
        if (low > frame.y_high) != (value > frame.y_high):
            at = first + (step - first) * (frame.y_high - low) / (value - low)
            pieces[-1].append((at, frame.y_high))
        if value <= frame.y_high:
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return "".join(line(frame, piece, style) for piece in pieces if piece)


def _titled(curve: Curve, path: str) -> str:
    """Which one it is, shown where the pointer rests on it."""
    return f"<g><title>{plain(f'#{curve.n} {curve.label}')}</title>{path}</g>"


def _name(parts: list[str], names: list[tuple[float, str]], frame: Frame, point: Point, words: str, style: str) -> None:
    """A curve's name at its end, where no other name is in its way."""
    step, value = point
    x, y = frame.x(step), frame.y(value)
    if value > frame.y_high:
        return
    if style != "other":
        parts.append(dot(frame, point, style))
    elif x < frame.width - frame.right - 1:
        return  # it ended early, in the midst of the others
    if all(abs(y - other) >= LINE_HEIGHT for other, _ in names):
        names.append((y, words))
        parts.append(f'<text class="end {style}" x="{x + 7:.1f}" y="{y + 4:.1f}">{plain(words)}</text>')
