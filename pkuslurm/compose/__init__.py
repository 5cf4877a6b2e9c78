"""Hydra and OmegaConf, here and nowhere else: what was typed becomes one checked Config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.compose import composition, presets, typed
from pkuslurm.compose.secrets import check_secrets
from pkuslurm.compose.settings import blamed, origins_of, settings_of, show
from pkuslurm.config.checks import check
from pkuslurm.config.parse import parse_config
from pkuslurm.config.schema import Config, Setting
from pkuslurm.errors import PkuslurmError

__all__ = ["Composed", "compose", "groups", "reload", "show"]


@dataclass(frozen=True)
class Composed:
    """One point: the checked config, its YAML as it is kept (environment values by name), and who set what.

    ``notes`` is what should be said about what was typed; nothing of it is wrong.
    """

    config: Config
    yaml: str
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Composed:
    """Compose ``overrides`` (as typed) over the presets of ``config_dirs``, of the user, and of conf/.

    Raises PkuslurmError for every mistake that a user can make; Hydra's own messages are reworded.
    """
    roots = presets.roots(config_dirs)
    wanted = typed.as_typed(overrides, roots)
    defaults = presets.defaults(roots)
    point = composition.compose(wanted, roots, defaults)
    origins = origins_of(wanted, point.choices, roots, defaults)
    try:
        presets.check_files(point.choices, roots)
        values, config = _checked(point)
    except PkuslurmError as error:
        raise blamed(error, origins) from None
    settings = settings_of(values, composition.shipped(), origins)
    return Composed(config, point.yaml, tuple(overrides), point.choices, settings, typed.notes(overrides))


def reload(yaml: str, overrides: Sequence[str]) -> Composed:
    """The config of an existing run (its config.yaml) with further ``overrides``; its groups stay as chosen."""
    point = composition.recompose(yaml, typed.as_typed(overrides, presets.roots(), choosing=False))
    _, config = _checked(point)
    return Composed(config, point.yaml, tuple(overrides), {}, (), typed.notes(overrides))


def groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The choices of each group, for --help: those of ``config_dirs``, the user's and the shipped."""
    return presets.choices(presets.roots(config_dirs))


def _checked(point: composition.Point) -> tuple[dict[str, Any], Config]:
    check_secrets(point.unresolved)
    values = point.resolved()
    config = parse_config(values)
    check(config, point.choices)
    return values, config
