"""Settings: what differs from the defaults, and who set it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkuslurm.compose import presets
from pkuslurm.compose.choosing import SHIPPED
from pkuslurm.compose.from_yaml import NEUTRAL, Given
from pkuslurm.compose.presets import Defaults, flatten
from pkuslurm.compose.words import GROUPS
from pkuslurm.config.parse import show as shown
from pkuslurm.config.schema import Setting

COMMAND_LINE = "command line"
# The order in which Hydra puts one on the other; defaults.yaml comes before the experiment.
ORDER = ("cluster", "container", "pipeline", "infer", "train", "dataset", "model")
# What these set is a default, too, where the model or the data is not the demo's.
DEFAULT_CHOICES = tuple(f"{group}={choice}" for group, choice in SHIPPED.items() if group not in ("model", "dataset"))


def origins_of(
    typed: Sequence[str],
    choices: Mapping[str, str],
    roots: Sequence[Path],
    defaults: Defaults,
    given: Given | None = None,
) -> dict[str, str]:
    """Who has the last word on each key: the command line, the YAML of ``from_yaml``, a preset of ours by its choice,
    another by its file."""
    origins: dict[str, str] = {}
    for group in ORDER:
        origins |= _of_preset(group, choices, roots)
    origins |= {key: str(defaults.files[key]) for key in defaults.values}
    origins |= _of_preset("experiment", choices, roots)
    if given is not None:
        origins |= dict.fromkeys(flatten(given.values), given.name)
    for item in typed:
        key = item.lstrip("+~").partition("=")[0]
        if key not in GROUPS:
            origins = {name: origin for name, origin in origins.items() if not name.startswith(key + ".")}
            origins[key] = COMMAND_LINE
    return origins


def _of_preset(group: str, choices: Mapping[str, str], roots: Sequence[Path]) -> dict[str, str]:
    choice = choices.get(group)
    files = presets.keys_of(group, choice, roots)
    return {key: f"{group}={choice}" if presets.is_ours(file) else str(file) for key, file in files.items()}


def origin_of(key: str, origins: Mapping[str, str]) -> str | None:
    """The origin of a key, or of the node that it was set with."""
    parts = key.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((origins[name] for name in names if name in origins), None)


def settings_of(
    values: Mapping[str, Any], shipped: Mapping[str, Any], origins: Mapping[str, str], given: Given | None = None
) -> tuple[Setting, ...]:
    """Every value that differs from what a command without a word composes; where a YAML is ``given``, no preset of a
    model, of data or of a training would have applied."""
    changed = []
    unsaid = DEFAULT_CHOICES
    if given is not None:
        shipped = {key: value for key, value in shipped.items() if key.split(".")[0] not in NEUTRAL}
        unsaid = (*unsaid, *given.chosen)
    for key, value in flatten(values).items():
        if key == "notes" or value == shipped.get(key):
            continue
        origin = origin_of(key, origins)
        # without one it is config.yaml's own value, which the default model has changed
        if origin is not None and origin not in unsaid:
            changed.append(Setting(key, value, shipped.get(key), origin))
    return tuple(changed)


def told(settings: Sequence[Setting]) -> list[Setting]:
    """Those that are said at launch: not what a shipped preset sets, which is what its name stands for, nor what one's
    own YAML says; status and the report show all.
    """
    file = next((item.value for item in settings if item.key == "from_yaml"), None)
    return [item for item in settings if not re.fullmatch(r"\w+=[\w.-]+", item.origin) and item.origin != file]


def show(settings: Sequence[Setting]) -> str:
    """One line a setting: ``train.learning_rate = 5e-05  (default 0.005; command line)``."""
    return "".join(
        f"{item.key} = {shown(item.value)}  (default {shown(item.default)}; {item.origin})\n" for item in settings
    )
