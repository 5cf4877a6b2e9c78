"""Hydra and OmegaConf, here and nowhere else: what was typed becomes one checked Config, or those of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkuslurm.compose import composition, presets
from pkuslurm.compose.labels import labels_of
from pkuslurm.compose.once import Composed, compose_parts, reload
from pkuslurm.compose.settings import show, told
from pkuslurm.compose.sweep import Sweep, SweepPoint, compose_sweep

__all__ = [
    "Composed",
    "Sweep",
    "SweepPoint",
    "compose",
    "compose_sweep",
    "groups",
    "labels_of",
    "reload",
    "show",
    "told",
]


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Composed:
    """Compose ``overrides`` (as typed) over the presets of ``config_dirs``, of the user, and of conf/.

    Raises PkuslurmError for every mistake that a user can make; Hydra's own messages are reworded.
    """
    roots = presets.roots(config_dirs)
    return compose_parts(overrides, roots, presets.defaults(roots), composition.shipped()).composed


def groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The choices of each group, for --help: those of ``config_dirs``, the user's and the shipped."""
    return presets.choices(presets.roots(config_dirs))
