"""What -m makes of a command line: each key with its values as typed, and the words of every point.

Values, their order and who wins are as in Hydra's own sweeper; what its grammar refuses is split at the same commas.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob, Override, Transformer, ValueType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pkuslurm.compose import presets, typed
from pkuslurm.compose.presets import Defaults
from pkuslurm.compose.quoting import number_of, parsed, split
from pkuslurm.compose.words import GROUPS
from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError

MOST = 10_000  # points
# What all points have in common, and what to say to whoever wants it otherwise.
SHARED = {
    "cluster": "a sweep is submitted to one cluster; launch it once for each",
    "cluster.executor": "a sweep is submitted to one cluster; launch it once for each",
    **dict.fromkeys(
        ("cluster.arrays", "cluster.array_parallelism", "cluster.pack", "sweep"),
        "it says how the whole sweep is run; write one value",
    ),
    **dict.fromkeys(
        ("run_root", "cache_root", "dry_run", "wait", "here", "from_yaml"),
        "all points of a sweep share it; write one value",
    ),
}
# Placeholders: no data and no model of their own.
NOT_IN_GLOBS = ("auto", "custom")


@dataclass(frozen=True)
class Axis:
    """A key or group (``~key``: taken away) and its values, as typed; where it varies there are several."""

    name: str
    items: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def varies(self) -> bool:
        return len(self.items) > 1


def axes_of(items: Sequence[str], roots: Sequence[Path], defaults: Defaults) -> list[Axis]:
    """The axes of a sweep, in its order: the last varies fastest. Of a key that is said twice the last word wins."""
    typed.separate_words(items)
    said = [_axis(item, roots) for item in items]
    axes: list[Axis] = []
    for axis in [*_of_experiment(said, roots, defaults), *said]:
        at = next((at for at, other in enumerate(axes) if other.name == axis.name), None)
        if axis.name.startswith("~") or at is None:
            axes.append(axis)  # taken away, then perhaps set again: the order counts
        elif any(other.name == f"~{axis.name}" for other in axes[at:]):
            axes = [*axes[:at], *axes[at + 1 :], axis]
        else:
            axes[at] = axis
    count = 1
    for axis in axes:
        count *= len(axis.items)
    if count > MOST:
        raise PkuslurmError(f"-m: {_varying(axes)} make {count} points; a sweep has at most {MOST}")
    return axes


def points_of(axes: Sequence[Axis]) -> Iterator[tuple[int, ...]]:
    """For each point, which value of each axis it has."""
    return itertools.product(*(range(len(axis.items)) for axis in axes))


def _varying(axes: Sequence[Axis]) -> str:
    return " × ".join(f"{len(axis.items)} of {axis.name}" for axis in axes if axis.varies)


def _of_experiment(said: Sequence[Axis], roots: Sequence[Path], defaults: Defaults) -> list[Axis]:
    """What the chosen experiment sweeps itself; nothing where experiments are swept."""
    chosen = [axis.values for axis in said if axis.name == "experiment"]
    names = chosen[-1] if chosen else (defaults.choices.get("experiment", "null"),)
    swept = presets.sweep_of(names[0].strip("'\""), roots) if len(names) == 1 else {}
    axes = []
    for key, (value, file) in swept.items():
        try:
            if key.lstrip("+~") == "experiment":
                raise PkuslurmError(f"hydra.sweeper.params.{key}: an experiment is chosen on the command line")
            axes.append(_axis(f"{key}={value}", roots))
        except PkuslurmError as error:
            raise PkuslurmError(f"{error}; it stands in {file}") from None
    return axes


def _axis(item: str, roots: Sequence[Path]) -> Axis:
    if item.startswith("~"):
        return Axis(f"~{typed.override_of(item, roots)[0]}", (item,), ("",))
    name, value = typed.named(item)
    values = _values(name, value, roots)
    key = item.partition("=")[0]
    if len(values) == 1:
        typed.override_of(f"{key}={values[0]}", roots)  # refused now, since it is no point's own mistake
    elif why := SHARED.get("sweep" if name.startswith("sweep.") else name):
        raise PkuslurmError(f"{name}={show(value)}: {why}")
    return Axis(name, tuple(f"{key}={one}" for one in values), tuple(values))


def _values(name: str, value: str, roots: Sequence[Path]) -> list[str]:
    """The values that ``value`` stands for, each as one would type it alone."""
    override: Override | None = parsed(value)
    _wide_comma(name, value, roots)
    if override is not None and not override.is_sweep_override():
        return [value]
    if override is not None and override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return _matching(name, value, override.value(), roots)
    called = re.fullmatch(r"\s*choice\((.*)\)\s*", value, re.DOTALL)
    parts, left_open, _ = split(called.group(1) if called else value)
    if override is None and (left_open or (len(parts) == 1 and not called)):
        return [value]
    if override is not None and (values := _listed(name, value, override)) != _read(parts):
        return values
    if "" in parts:
        rest = ",".join(filter(None, parts))
        raise PkuslurmError(f"{name}={show(value)}: a value is missing beside a comma; write {name}={show(rest)}")
    return parts


def _listed(name: str, value: str, override: Override) -> list[str]:
    """The values of a sweep as Hydra writes them."""
    if not override.is_discrete_sweep():
        raise PkuslurmError(f"{name}={show(value)}: an interval has no end of values; write range(start,stop,step)")
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError):  # 1,range(2,4)
        raise PkuslurmError(f"{name}={show(value)}: these cannot be listed; write each value, or one range()") from None
    if not values:
        raise PkuslurmError(f"{name}={show(value)}: it holds no value; range(start,stop,step) ends before stop")
    return values


def _read(parts: Sequence[str]) -> list[str] | None:
    """``parts`` as Hydra writes them; None where one of them is no single value."""
    overrides = [parsed(part) for part in parts]
    if any(override is None or override.is_sweep_override() for override in overrides):
        return None
    return [Transformer.str(override._value) for override in overrides]


def _matching(name: str, value: str, pattern: Any, roots: Sequence[Path]) -> list[str]:
    """The choices of a group that a ``glob()`` means."""
    if name not in GROUPS:
        raise PkuslurmError(f"{name}={show(value)}: glob() names choices of a group; write the values with commas")
    assert isinstance(pattern, Glob)
    known = [choice for choice in presets.choices(roots)[name] if choice not in NOT_IN_GLOBS]
    found: list[str] = pattern.filter(known)
    if not found:
        raise PkuslurmError(f"{name}={show(value)}: no choice is named so; there are: {', '.join(known)}")
    return found


def _wide_comma(name: str, value: str, roots: Sequence[Path]) -> None:
    """1e-5，5e-5 and identity，mine: the comma of an input method."""
    if "，" not in value:
        return
    parts = re.split("[，,]", value)
    numbers = typed.wants_number(name) and all(number_of(part) is not None for part in parts)
    choices = name in GROUPS and all(presets.file_of(name, part.strip(), roots) for part in parts)
    if numbers or choices:
        raise PkuslurmError(f"{name}={show(value)}: ， separates no values; write {name}={','.join(parts)}")


def shared_values(config: Any, choices: Mapping[str, str]) -> dict[str, Any]:
    """What an experiment could set for one point alone, though all share it."""
    values = {}
    for key in SHARED:
        node = config
        for part in key.split("."):
            node = getattr(node, part)
        values[key] = node
    return values | {"cluster": choices.get("cluster"), "from_yaml": None}
