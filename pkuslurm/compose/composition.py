"""Hydra, asked: overrides in its grammar become one configuration and the choices that its groups took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import omegaconf
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkuslurm.compose import presets
from pkuslurm.compose.choosing import SHIPPED, choose, foreseen
from pkuslurm.compose.from_yaml import NEUTRAL, Given
from pkuslurm.compose.presets import Defaults
from pkuslurm.compose.secrets import kept_by_name
from pkuslurm.compose.words import GROUPS, chain, reword
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF

# config.yaml goes to Hydra by a name of its own: a ./conf with another program's config.yaml is searched before ours.
PRIMARY, OWN_DEFAULTS, FROM_YAML = "pkuslurm_config", "pkuslurm_defaults", "pkuslurm_from_yaml"


@dataclass(frozen=True)
class Point:
    """One composition, interpolations as they were written, and the choice of each group."""

    raw: DictConfig
    choices: Mapping[str, str]

    @property
    def yaml(self) -> str:
        return OmegaConf.to_yaml(self.raw)

    @property
    def unresolved(self) -> dict[str, Any]:
        return _plain(OmegaConf.to_container(self.raw, resolve=False))

    def resolved(self) -> dict[str, Any]:
        """The values; only variables of jobs that come from the environment by name stay as they were written."""
        return _resolved(kept_by_name(self.raw))


def compose(overrides: Sequence[str], roots: Sequence[Path], defaults: Defaults, given: Given | None = None) -> Point:
    """Compose ``overrides``, in Hydra's grammar, over ``given`` (a YAML's keys) over the presets in ``roots``."""
    if given is not None:  # one's own defaults say nothing of what the YAML is about
        kept = {key: value for key, value in defaults.values.items() if key.split(".")[0] not in NEUTRAL}
        defaults = replace(defaults, values=kept)
    if (
        "experiment=null" in overrides
    ):  # Hydra takes no null for a group; none is the default, unless defaults.yaml has one
        overrides = [item for item in overrides if item != "experiment=null"]
        left = {group: choice for group, choice in defaults.choices.items() if group != "experiment"}
        defaults = replace(defaults, choices=left)
    with _hydra(roots, defaults, {} if given is None else given.values):
        chosen = given.chosen if given is not None else foreseen(overrides, roots, defaults)
        if chosen is None:
            # nothing can be taken away from a group that is not chosen yet
            raw, choices = _compose([item for item in overrides if not item.startswith("~")], roots)
            chosen = choose(raw, choices)
        raw, choices = _compose([*overrides, *chosen], roots)
    _known_experiment(choices, roots)
    if given is None and raw.from_yaml is not None:
        raise PkuslurmError(f"from_yaml={raw.from_yaml}: it is typed, no preset can hold it")
    return Point(raw, choices)


def recompose(text: str, overrides: Sequence[str]) -> Point:
    """A kept config.yaml with ``overrides`` put to it."""
    _register_resolver()
    try:
        config = OmegaConf.create(text)
    except yaml.YAMLError as error:
        raise PkuslurmError(presets.not_yaml(error, "config.yaml")) from None
    if not isinstance(config, DictConfig):
        raise PkuslurmError("config.yaml of this run holds no configuration")
    for item in overrides:
        override = OverridesParser.create().parse_override(item)
        if override.is_sweep_override() or override.is_delete():
            raise PkuslurmError(f"{item}: one value is wanted here")
        OmegaConf.update(config, str(override.key_or_group), override.value(), force_add=True)
    return Point(config, {})


def shipped() -> dict[str, Any]:
    """The values of a command without a word, from our own files alone."""
    _register_resolver()
    return presets.flatten(_resolved(OmegaConf.create(_shipped())))


@cache
def _shipped() -> dict[str, Any]:
    # the files put one on the other: what Hydra makes of them, too, in a tenth of the time (a test compares them)
    merged = presets.plain(CONF.resolve() / "config.yaml")
    for group, choice in SHIPPED.items():
        file = CONF.resolve() / group / f"{choice}.yaml"
        content = presets.plain(file)
        merged = _merged(merged, content if presets.is_global(file) else {group: content})
    merged.pop("defaults")
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above``, node by node."""
    both = {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
        if key != "defaults"
    }
    return {**below, **both}


def _register_resolver() -> None:
    # a run's config.yaml keeps this by name, so that an installation that moved still finds its own files
    # 2.4 warns of the name that 2.3 has
    name = "register_new_resolver" if omegaconf.__version__ < "2.4" else "register_resolver"
    register = getattr(OmegaConf, name)
    register("pkuslurm.conf", lambda name: str(CONF / str(name)), replace=True)
    # a model preset's learning rate is LoRA's; all weights at once want a tenth of it
    register("pkuslurm.rate", lambda kind, rate: rate if kind in ("lora", "oft") else rate / 10, replace=True)


class _hydra:
    """Hydra's global state, for the length of a composition."""

    def __init__(self, roots: Sequence[Path], defaults: Defaults, above: Mapping[str, Any]) -> None:
        self.roots = [root for root in roots if root != CONF.resolve()]
        self.defaults, self.above = defaults, above

    def __enter__(self) -> None:
        _register_resolver()
        _store_primary(self.defaults, self.above)
        GlobalHydra.instance().clear()
        # 1.3 warns without version_base, 1.4 with it
        version = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
        self.context = initialize_config_dir(str(CONF.resolve()), **version)
        self.context.__enter__()
        # hydra.searchpath only appends, and one's own presets win over ours
        loader: Any = GlobalHydra.instance().config_loader()
        search = loader.get_search_path()
        for root in self.roots:
            search.prepend("pkuslurm", f"file://{root}", "main")
        loader.repository.initialize_sources(search)

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def _store_primary(own: Defaults, above: Mapping[str, Any]) -> None:
    """config.yaml and defaults.yaml, where Hydra finds them: the latter above the groups, below an experiment.

    ``above``: values above all presets.
    """
    primary = _primary()
    entries: list[Any] = []
    for entry in OmegaConf.to_container(primary.defaults) or []:
        [(name, choice)] = entry.items() if isinstance(entry, dict) else [(entry, None)]
        group = str(name).removeprefix("optional ")
        if group == "experiment":
            entries.append(OWN_DEFAULTS)
        entries.append({name: own.choices.get(group, choice)} if isinstance(entry, dict) else entry)
    primary.defaults = [*entries, FROM_YAML] if above else entries
    values = OmegaConf.create({})
    for key, value in own.values.items():
        OmegaConf.update(values, key, value, force_add=True)
    store = ConfigStore.instance()
    # 1.4 wants to be told, 1.3 knows no such word
    again: Any = {} if hydra.__version__ < "1.4" else {"replace": True}
    store.store(PRIMARY, primary, **again)
    store.store(OWN_DEFAULTS, values, **again)
    store.store(FROM_YAML, OmegaConf.create(dict(above)), **again)


def _primary() -> DictConfig:
    return OmegaConf.create(presets.plain(CONF.resolve() / "config.yaml"))


def _compose(overrides: Sequence[str], roots: Sequence[Path]) -> tuple[DictConfig, dict[str, str]]:
    """The composed config without Hydra's own node, and which choice each group took."""
    try:
        config = hydra_compose(PRIMARY, overrides=list(overrides), return_hydra_config=True)
        chosen = {group: str(choice) for group, choice in config.hydra.runtime.choices.items() if choice}
        OmegaConf.set_struct(config, False)
        del config["hydra"]
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        for group, choice in (item.split("=", 1) for item in overrides if item.partition("=")[0] in GROUPS):
            if (file := presets.file_of(group, choice, roots)) is not None:
                presets.load(file)  # which knows better what is wrong with it
        broken = next((link for link in chain(error) if isinstance(link, yaml.YAMLError)), None)
        raise PkuslurmError(presets.not_yaml(broken) if broken else reword(error, overrides)) from None
    return config, {group: chosen[group] for group in GROUPS if group in chosen}


def _known_experiment(choices: Mapping[str, str], roots: Sequence[Path]) -> None:
    """The group is optional for Hydra, which therefore passes over a choice that does not exist."""
    name = choices.get("experiment")
    if name is not None and presets.file_of("experiment", name, roots) is None:
        raise PkuslurmError(presets.no_such_choice("experiment", name, roots))


def _resolved(config: DictConfig) -> dict[str, Any]:
    try:
        return _plain(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise PkuslurmError(reword(error, [])) from None


def _plain(values: Any) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
