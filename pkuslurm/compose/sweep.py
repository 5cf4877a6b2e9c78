"""A sweep: every point composed and checked before anything is done with one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.compose import presets
from pkuslurm.compose.copies import Composer
from pkuslurm.compose.expansion import Axis, axes_of, points_of, shared_values
from pkuslurm.compose.labels import labels_of
from pkuslurm.compose.once import UNSWEPT, Composed
from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError


@dataclass(frozen=True)
class SweepPoint:
    """One point: what one would type for it alone, and what ``compose`` makes of that.

    ``values`` holds what varies, as typed; ``family`` is the same for points with the same choices of groups.
    """

    overrides: tuple[str, ...]
    values: Mapping[str, str]
    label: str
    composed: Composed
    family: int


@dataclass(frozen=True)
class Sweep:
    """The points, the last of ``keys`` varying fastest, and what should be said, once."""

    keys: tuple[str, ...]
    points: tuple[SweepPoint, ...]
    notes: tuple[str, ...]


def compose_sweep(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Sweep:
    """Compose every point of ``overrides``, as typed behind -m.

    Raises PkuslurmError for the first point that cannot be, with its number, its label and the key.
    """
    roots = presets.roots(config_dirs)
    defaults = presets.defaults(roots)
    axes = axes_of(overrides, roots, defaults)
    chosen = list(points_of(axes))
    values = [
        {axis.name: axis.values[at] for axis, at in zip(axes, point, strict=True) if axis.varies} for point in chosen
    ]
    labels = labels_of(values)
    composer = Composer(axes, roots, defaults)
    families: dict[tuple[tuple[str, str], ...], int] = {}
    first: dict[str, Any] = {}
    points = []
    for n, point in enumerate(chosen):
        items = tuple(axis.items[at] for axis, at in zip(axes, point, strict=True))
        try:
            composed = composer.compose(items)
            first = _shared(composed, first)
        except PkuslurmError as error:
            raise (PkuslurmError(f"point {n} ({labels[n]}): {error}") if values[n] else error) from None
        family = families.setdefault(tuple(composed.choices.items()), len(families))
        points.append(SweepPoint(items, values[n], labels[n], composed, family))
    keys = tuple(axis.name for axis in axes if axis.varies)
    return Sweep(keys, tuple(points), tuple(dict.fromkeys(_notes(axes, points, roots))))


def _shared(composed: Composed, first: Mapping[str, Any]) -> dict[str, Any]:
    """What all points have in common; an experiment or a reference may have set it for one of them."""
    values = shared_values(composed.config, composed.choices)
    for key, value in values.items():
        if first and first[key] != value:
            raise PkuslurmError(
                f"{key}={show(value)}: all points of a sweep share it, and point 0 has {show(first[key])}"
            )
    return values


def _notes(axes: Sequence[Axis], points: Sequence[SweepPoint], roots: Sequence[Path]) -> Iterator[str]:
    for axis in axes:
        yield from (
            f"{axis.name}={value} is among the values more than once: the same point again"
            for value, times in Counter(axis.values).items()
            if times > 1
        )
        if axis.name == "experiment" and axis.varies:
            for name in axis.values:
                if swept := presets.sweep_of(name, roots):
                    left_out = f"its own sweep of {', '.join(swept)} is left out"
                    yield f"experiment={name}: {left_out}, since experiments are swept"
    for point in points:
        yield from (note for note in point.composed.notes if UNSWEPT not in note)
