"""One point: what was typed becomes one checked Config, and who said what."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.compose import composition, from_yaml, presets, typed
from pkuslurm.compose.adapting import adapt
from pkuslurm.compose.blame import Blame
from pkuslurm.compose.presets import Defaults
from pkuslurm.compose.secrets import check_secrets
from pkuslurm.compose.settings import origins_of, settings_of
from pkuslurm.config.checks import check
from pkuslurm.config.parse import parse_config
from pkuslurm.config.schema import Config, Setting
from pkuslurm.errors import PkuslurmError

UNSWEPT = ": with -m it runs its sweep of "


@dataclass(frozen=True)
class Composed:
    """One point: the checked config, its YAML as it is kept (environment values by name), and who set what.

    ``notes`` is what should be said about what was typed; nothing of it is wrong. ``blame``: for what is refused later.
    """

    config: Config
    yaml: str
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()
    blame: Blame = field(default_factory=Blame)


@dataclass(frozen=True)
class Parts:
    """A composed point with what it was made of."""

    composed: Composed
    unresolved: Mapping[str, Any]
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    standing: tuple[str, ...]  # notes on its experiment and its YAML, which hold for all copies


def compose_parts(
    overrides: Sequence[str], roots: Sequence[Path], defaults: Defaults, shipped: Mapping[str, Any]
) -> Parts:
    """Compose ``overrides``, as typed, over the presets in ``roots``; settings differ from ``shipped``."""
    wanted = typed.as_typed(overrides, roots)
    standing = _unswept(wanted, roots, defaults)
    given = from_yaml.given(wanted)
    point = composition.compose(wanted, roots, defaults, given)
    origins = origins_of(wanted, point.choices, roots, defaults, given)
    blame = Blame(origins, given)
    if given is not None:
        standing += (*given.notes, *adapt(point.raw, wanted))
    _labelled(wanted, point.choices, roots)
    with blame:
        presets.check_files(point.choices, roots)
        values, config = _checked(point)
    settings = settings_of(values, shipped, origins, given)
    notes = (*typed.notes(overrides), *standing)
    composed = Composed(config, point.yaml, tuple(overrides), point.choices, settings, notes, blame)
    return Parts(composed, point.unresolved, values, origins, standing)


def reload(yaml: str, overrides: Sequence[str]) -> Composed:
    """The config of an existing run (its config.yaml) with further ``overrides``; its groups stay as chosen."""
    point = composition.recompose(yaml, typed.as_typed(overrides, presets.roots(), choosing=False))
    _, config = _checked(point)
    return Composed(config, point.yaml, tuple(overrides), {}, (), typed.notes(overrides))


def _labelled(wanted: Sequence[str], choices: Mapping[str, str], roots: Sequence[Path]) -> None:
    """Raise PkuslurmError for a slip in the name of the data that a preset brings: it would be taken for a label."""
    item = next((item for item in wanted if item.startswith("dataset.name=")), "")
    name, file = item.partition("=")[2].strip("'\""), presets.file_of("dataset", choices.get("dataset"), roots)
    if not name or file is None:
        return
    own = presets.flatten(presets.plain(file))
    right = str(own.get("dataset.name", own.get("name", "")))
    if name != right and difflib.get_close_matches(name, [right], 1, 0.75):
        raise PkuslurmError(
            f"dataset.name={name}: dataset={choices['dataset']} is {right}; did you mean that? leave dataset.name out "
            "(name=… labels a run)"
        )


def _unswept(wanted: Sequence[str], roots: Sequence[Path], defaults: Defaults) -> tuple[str, ...]:
    """The note that an experiment has a sweep of its own; what is typed for one of its keys settles that key."""
    said = {item.lstrip("+~").partition("=")[0]: item.partition("=")[2] for item in wanted}
    name = said.get("experiment", defaults.choices.get("experiment"))
    keys = [key for key in presets.sweep_of(name, roots) if key not in said]
    return (f"experiment={name}{UNSWEPT}{', '.join(keys)}",) if keys else ()


def _checked(point: composition.Point) -> tuple[dict[str, Any], Config]:
    check_secrets(point.unresolved)
    values = point.resolved()
    config = parse_config(values)
    check(config, point.choices)
    return values, config
