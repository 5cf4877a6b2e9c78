"""Hydra and OmegaConf, here and nowhere else: what was typed becomes one checked Config."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkuslurm.config.checks import check
from pkuslurm.config.schema import Config, Setting, parse_config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF

GROUPS = ("cluster", "model", "dataset", "train", "infer", "container", "pipeline", "experiment")
# Nodes that take any key (LLaMA-Factory's, sbatch's, variables): Hydra wants `++` there; a user need not know.
OPEN = ("train", "merge", "cluster.env", "cluster.extra", "cluster.jobs", "dataset.columns", "dataset.tags")
# What these set is a default, too, where the model or the data is not the demo's.
DEFAULT_CHOICES = ("cluster=local", "train=lora", "infer=default", "container=none", "pipeline=full")
SLIPS = {
    "node": "nodes",
    "nnodes": "nodes",
    "lr": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_train_epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "template": "model.template",
    "model_name_or_path": "model.path",
    "nproc_per_node": "cluster.nproc_per_node",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "time": "cluster.time",
    "python": "cluster.python",
    "accelerator": "cluster.accelerator",
    "prompts": "infer.prompts",
    "expect": "infer.expect",
}


@dataclass(frozen=True)
class Composed:
    """One point: the checked config, its YAML as it is kept (environment values by name), and who set what."""

    config: Config
    yaml: str
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    settings: tuple[Setting, ...]


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Composed:
    """Compose ``overrides`` (as typed) over conf/.

    Raises PkuslurmError for every mistake that a user can make; Hydra's own messages are reworded.
    """
    _register_resolver()
    typed = [_as_typed(item) for item in overrides]
    search = [*config_dirs, *_preset_dirs()]
    with _hydra():
        raw, choices = _hydra_compose(typed, search)
        chosen = _choose(raw, choices)
        if chosen:
            typed += chosen
            raw, choices = _hydra_compose(typed, search)
        _known_experiment(choices, search)
        defaults, _ = _hydra_compose(["model=tiny", "dataset=identity", "train=lora"], search)
    values, base = _plain(raw), _plain(defaults)
    config = parse_config(values)
    check(config, choices)
    origins = _origins(typed, choices, search)
    return Composed(config, OmegaConf.to_yaml(raw), tuple(overrides), choices, _settings(values, base, origins))


def reload(yaml: str, overrides: Sequence[str]) -> Composed:
    """The config of an existing run (its config.yaml) with further ``overrides``; its groups stay as chosen."""
    _register_resolver()
    config = OmegaConf.create(yaml)
    if not isinstance(config, DictConfig):
        raise PkuslurmError("config.yaml of this run holds no configuration")
    for item in overrides:
        override = OverridesParser.create().parse_override(_as_typed(item))
        key = str(override.key_or_group)
        if override.is_sweep_override() or override.is_delete():
            raise PkuslurmError(f"{item}: one value is wanted here")
        if OmegaConf.select(config, key, default=_MISSING) is _MISSING and not _is_open(key):
            raise PkuslurmError(f"{key}: no such key{_nearest(key, _flatten(_plain(config)))}")
        OmegaConf.update(config, key, override.value(), force_add=True)
    parsed = parse_config(_plain(config))
    check(parsed, {})
    return Composed(parsed, OmegaConf.to_yaml(config), tuple(overrides), {}, ())


def groups() -> dict[str, list[str]]:
    """The choices of each group of ours, for --help."""
    found = {}
    for group in GROUPS:
        files = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        found[group] = [name for name in files if name != "auto"]
    return found


_MISSING = object()


def _register_resolver() -> None:
    # a run's config.yaml keeps this by name, so that an installation that moved still finds its own files
    OmegaConf.register_new_resolver("pkuslurm.conf", lambda name: str(CONF / str(name)), replace=True)


class _hydra:
    """Hydra's global state, for the length of a composition."""

    def __enter__(self) -> None:
        GlobalHydra.instance().clear()
        # 1.3 warns without version_base, 1.4 with it
        version = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
        self.context = initialize_config_dir(str(CONF), **version)
        self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


def _preset_dirs() -> list[Path]:
    """Where people keep presets of their own: ./conf, the user's, the group's."""
    candidates = [Path("conf")]
    with suppress(RuntimeError):  # no HOME
        candidates.append(Path.home() / ".config" / "pkuslurm" / "conf")
    if os.environ.get("PKUSLURM_CONF"):
        candidates.append(Path(os.environ["PKUSLURM_CONF"]))
    return [path.resolve() for path in candidates if path.is_dir() and path.resolve() != CONF.resolve()]


def _hydra_compose(overrides: Sequence[str], search: Sequence[Path]) -> tuple[DictConfig, dict[str, str]]:
    """The composed config without Hydra's own node, and which choice each group took."""
    extra = []
    if search:
        extra = ["hydra.searchpath=[" + ",".join(_quote("file://" + str(path)) for path in search) + "]"]
    try:
        config = hydra_compose("config", overrides=[*overrides, *extra], return_hydra_config=True)
        chosen = {group: str(choice) for group, choice in config.hydra.runtime.choices.items() if choice}
        OmegaConf.set_struct(config, False)
        del config["hydra"]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise PkuslurmError(_reword(error, overrides)) from None
    return config, {group: chosen[group] for group in GROUPS if group in chosen}


def _known_experiment(choices: Mapping[str, str], search: Sequence[Path]) -> None:
    """The group is optional for Hydra, which therefore passes over a choice that does not exist."""
    name = choices.get("experiment")
    if name is not None and _file_of("experiment", name, search) is None:
        known = groups()["experiment"]
        raise PkuslurmError(f"experiment={name}: no such choice{_nearest(name, known)}; there are: {', '.join(known)}")


def _file_of(group: str, choice: str | None, search: Sequence[Path]) -> Path | None:
    candidates = (root / group / f"{choice}.yaml" for root in (CONF, *search))
    return next((path for path in candidates if path.is_file()), None)


def _choose(raw: DictConfig, choices: Mapping[str, str]) -> list[str]:
    """The groups that were left to us (``auto``), from what else was said, by presets too."""
    chosen = []
    if choices.get("train") == "auto":
        kind = raw.train.get("finetuning_type")
        chosen.append(f"train={kind if kind in ('full', 'freeze') else 'lora'}")
    if choices.get("dataset") == "auto":
        chosen.append("dataset=custom" if raw.dataset.path is not None else "dataset=identity")
    if choices.get("model") == "auto":
        default = "tiny" if raw.cluster.executor == "local" else "qwen2.5-1.5b-instruct"
        chosen.append("model=custom" if raw.model.path is not None else f"model={default}")
    return chosen


def _as_typed(item: str) -> str:
    """One override, in Hydra's grammar: what Hydra refuses is quoted, open nodes get their ``++``."""
    if item.startswith("--"):
        fixed = item.lstrip("-")
        if "=" in fixed:
            raise PkuslurmError(f"{item}: settings are typed without dashes: {fixed}")
        raise PkuslurmError(f"{item}: no such option; --help lists them")
    if item.startswith("~"):
        return item
    key, equals, value = item.partition("=")
    if not equals:
        raise PkuslurmError(f"{item!r}: a setting is typed as key=value, without spaces around the =")
    name = key.lstrip("+")
    if name in SLIPS:
        raise PkuslurmError(f"{name}: no such key; did you mean {SLIPS[name]}={value}?")
    if _is_open(name):
        key = "++" + name
    return f"{key}={_quoted_where_needed(key, value)}"


def _is_open(key: str) -> bool:
    return any(key.startswith(node + ".") for node in OPEN) or key in ("cluster.env", "cluster.extra", "cluster.jobs")


def _quoted_where_needed(key: str, value: str) -> str:
    if _parses(f"{key}={value}"):
        return value
    if value.startswith("[") and value.endswith("]") and not re.search(r"[\[\]{}]", value[1:-1]):
        elements = [element.strip() for element in value[1:-1].split(",")]
        fixed = [element if _parses(f"{key}={element}") else _quote(element) for element in elements]
        listed = "[" + ",".join(fixed) + "]"
        if _parses(f"{key}={listed}"):
            return listed
    return _quote(value)


def _parses(item: str) -> bool:
    try:
        OverridesParser.create().parse_override(item)
    except HydraException:
        return False
    return True


def _quote(value: str) -> str:
    """In single quotes by Hydra's rules: a quote is escaped, and so are the backslashes before one."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def _reword(error: Exception, overrides: Sequence[str]) -> str:
    # Hydra wraps: the words may stand in the exception or in any of its causes
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(link) for link in chain)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    missing = re.search(r"Could not (?:find|load) '([\w./-]+)/([^']+)'", text)
    if missing:
        group, choice = missing.groups()
        known = groups().get(group, [])
        return f"{group}={choice}: no such choice{_nearest(choice, known)}; there are: {', '.join(known)}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        return f"{key}: no such key{_nearest(key, _known_keys())}"
    if "Config group override must be" in text:
        wrong = next((item for item in overrides if item.partition("=")[0] in GROUPS and item[-1:].isdigit()), "")
        group, _, choice = wrong.partition("=")
        return f"{group}={choice}: no such choice; there are: {', '.join(groups().get(group, []))}"
    ambiguous = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if ambiguous:
        return f"{ambiguous.group(1)}: several values make a sweep, which needs -m; for a list, write [a,b]"
    return lines[0] if lines else f"the overrides {' '.join(overrides)} could not be composed"


def _known_keys() -> list[str]:
    config = OmegaConf.load(CONF / "config.yaml")
    return [*_flatten(OmegaConf.to_container(config)), *GROUPS]  # type: ignore[arg-type]


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), 3, 0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise PkuslurmError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _origins(typed: Sequence[str], choices: Mapping[str, str], search: Sequence[Path]) -> dict[str, str]:
    """Which file, or the command line, has the last word on a key."""
    origins: dict[str, str] = {}
    for group in ("cluster", "container", "pipeline", "infer", "train", "dataset", "model", "experiment"):
        choice = choices.get(group)
        file = _file_of(group, choice, search)
        if file is None:
            continue
        text = file.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.create(text)) or {}
        assert isinstance(content, dict)
        content.pop("defaults", None)
        prefix = "" if "@package _global_" in text.split("\n", 1)[0] else f"{group}."
        origins.update({prefix + key: f"{group}={choice}" for key in _flatten(content)})  # type: ignore[arg-type]
    for item in typed:
        key = item.lstrip("+~").partition("=")[0]
        if key not in GROUPS:
            origins[key] = "command line"
    return origins


def _settings(values: Mapping[str, Any], base: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[Setting, ...]:
    flat, default = _flatten(values), _flatten(base)
    changed = []
    for key, value in flat.items():
        if value != default.get(key) and key != "notes":
            parts = key.split(".")
            names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
            origin = next((origins[name] for name in names if name in origins), None)
            if (
                origin is not None and origin not in DEFAULT_CHOICES
            ):  # else it is config.yaml's own value, which the default model has changed
                changed.append(Setting(key, value, default.get(key), origin))
    return tuple(changed)
