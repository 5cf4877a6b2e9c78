"""Presets: the folders that they are found in, their files, and the defaults.yaml of one's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, basecontainer
from omegaconf.errors import OmegaConfBaseException

from pkuslurm.compose.words import GROUPS, nearest, nearest_key
from pkuslurm.config.parse import hint_of, is_node
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF

# What others have a word for and we a setting.
MEANT = {"train=qlora": "train=lora train.quantization_bit=4"}
MANY = 10  # choices
# YAML 1.1 reads 1:00:00 as 3600, 0012 as 10 and 2024_01 as 202401.
TRAP = re.compile(r"[-+]?(\d+(:[0-5]?\d)+|0[0-7_]+|[1-9]\d*(_\d+)+)")


@dataclass(frozen=True)
class Defaults:
    """What defaults.yaml files say: a choice for groups, values for dotted keys, and which file said it."""

    choices: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


def roots(config_dirs: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The folders of presets; of two with the same name, that of the first folder is taken. Ours is the last."""
    candidates = [*config_dirs]
    if not _is_checkout(Path("conf")):
        candidates.append(Path("conf"))
    with suppress(RuntimeError):  # no HOME
        candidates.append(Path.home() / ".config" / "pkuslurm" / "conf")
    if given := os.environ.get("PKUSLURM_CONF"):
        if not Path(given).expanduser().is_dir():
            raise PkuslurmError(f"PKUSLURM_CONF={given}: there is no such folder; mend the variable, or unset it")
        candidates.append(Path(given).expanduser())
    found = [path.resolve() for path in candidates if path.is_dir()]
    return tuple(dict.fromkeys([path for path in found if path != CONF.resolve()] + [CONF.resolve()]))


def _is_checkout(conf: Path) -> bool:
    """Our own source, perhaps another version than the one that runs, is nobody's folder of presets."""
    return (conf / "config.yaml").is_file() and (conf.absolute().parent / "pkuslurm" / "__init__.py").is_file()


def choices(roots: Sequence[Path]) -> dict[str, list[str]]:
    """What each group can be."""
    found = {group: {path.stem for root in roots for path in (root / group).glob("*.yaml")} for group in GROUPS}
    return {group: sorted(names - {"auto"}) for group, names in found.items()}


def no_such_choice(group: str, choice: str, roots: Sequence[Path]) -> str:
    """The refusal of a choice that there is no file for."""
    if f"{group}={choice}" in MEANT:
        return f"{group}={choice}: no such choice; write {MEANT[f'{group}={choice}']}"
    known = choices(roots).get(group, [])
    near = nearest(choice, known)
    # twenty models fill more lines than anybody reads for the one that was meant
    listed = "launch --help lists all" if near and len(known) > MANY else f"there are: {', '.join(known)}"
    return f"{group}={choice}: no such choice{near}; {listed}"


def file_of(group: str, choice: str | None, roots: Sequence[Path]) -> Path | None:
    """The file of a choice, the one that Hydra takes."""
    candidates = (root / group / f"{choice}.yaml" for root in roots)
    return next((path for path in candidates if path.is_file()), None)


def is_ours(file: Path) -> bool:
    return file.is_relative_to(CONF.resolve())


def load(file: Path) -> DictConfig:
    """A file of keys, to be read only. Raises PkuslurmError with the line where it is not YAML."""
    return _ours(file) if is_ours(file) else _load(file)


@cache
def _ours(file: Path) -> DictConfig:
    return _load(file)


def plain(file: Path) -> dict[str, Any]:
    """The same as plain values, references as they are written; to be read only."""
    content = _quickly(file) if is_ours(file) else OmegaConf.to_container(load(file))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@cache
def _quickly(file: Path) -> Any:
    """A file of ours by libyaml: without it the half of a launch's composing is reading YAML."""
    return yaml.load(file.read_bytes(), Loader=_loader()) or {}


def yaml_loader() -> Any:
    """OmegaConf's own, for which 1e-4 is a number. It has moved in 2.4; the module that uses it has not."""
    module: Any = basecontainer
    return module.get_yaml_loader()


@cache
def _loader() -> Any:
    """OmegaConf's loader (for which 1e-4 is a number) on libyaml's parser, where PyYAML has that."""
    pure = yaml_loader()
    fast = getattr(yaml, "CSafeLoader", None)
    return pure if fast is None else type("Loader", (fast,), {"yaml_implicit_resolvers": pure.yaml_implicit_resolvers})


def is_global(file: Path) -> bool:
    """Whether its keys are the configuration's own, not its group's."""
    return "@package _global_" in file.read_text(encoding="utf-8").split("\n", 1)[0]


def _load(file: Path) -> DictConfig:
    text = ""
    try:
        content = OmegaConf.create(text := file.read_text(encoding="utf-8")) or OmegaConf.create({})
    except (OSError, UnicodeDecodeError) as error:
        raise PkuslurmError(f"{file}: it cannot be read ({' '.join(str(error).split())})") from None
    except yaml.YAMLError as error:
        raise PkuslurmError(_no_colon(file, text) or _twice(error, file, text) or not_yaml(error, file)) from None
    except OmegaConfBaseException as error:
        raise PkuslurmError(f"{file}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise PkuslurmError(f"{file}: it holds no keys; write key: value, one a line")
    if not is_ours(file):
        if any(re.search("[：=:]", str(key)) for key in content) and (slip := _no_colon(file, text)):
            raise PkuslurmError(slip)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and TRAP.fullmatch(event.value):
                line = event.start_mark.line + 1 if event.start_mark else 1
                found = f"{file}:{line}: {event.value}"
                raise PkuslurmError(f"{found}: YAML reads another number here; write it in quotes: '{event.value}'")
    return content


def _no_colon(file: Path, text: str) -> str | None:
    """The first line that has another sign than a colon and a space after a key of ours."""
    for number, line in enumerate(text.splitlines(), 1):
        found = re.fullmatch(r"\s*([\w.]+)\s*(?:[：=]|:(?=\S))\s*(.+?)\s*", line)
        if found and (found[1] in GROUPS or hint_of(found[1]) or hint_of(f"{file.parent.name}.{found[1]}")):
            return f"{file}:{number}: write `{found[1]}: {found[2]}` (a plain colon and a space)"
    return None


def _twice(error: yaml.YAMLError, file: Path, text: str) -> str | None:
    """A group that has a choice and keys: YAML takes a word only once."""
    found = re.fullmatch(r"found duplicate key (\w+)", str(getattr(error, "problem", "")))
    group = found[1] if found else ""
    choice = re.search(rf"^{group}: *([^\s#]+)", text, re.MULTILINE)
    below = re.search(rf"^{group}:[ \t]*(?:#.*)?\n[ \t]+(\w+: *\S.*)", text, re.MULTILINE)
    if group not in GROUPS or choice is None or below is None:
        return None
    return f"{file}: {group} is there twice; write `{group}.{below[1]}` beside `{group}: {choice[1]}`"


def not_yaml(error: yaml.YAMLError, file: Path | str | None = None) -> str:
    """What is wrong with a file that is not YAML, with its line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{file or getattr(mark, 'name', '')}:{mark.line + 1 if mark else 1}: not YAML ({problem})"


def keys_of(group: str, choice: str | None, roots: Sequence[Path], seen: tuple[Path, ...] = ()) -> dict[str, Path]:
    """Every dotted key that a preset sets, its own defaults of the same group included, and the file that says it."""
    file = file_of(group, choice, roots)
    if file is None or file in seen:
        return {}
    content = plain(file)
    keys: dict[str, Path] = {}
    for entry in _same_group(content.pop("defaults", None)):
        keys |= keys_of(group, entry, roots, (*seen, file))
    if group == "experiment" and _swept(content):
        content.pop("hydra")
    return keys | dict.fromkeys(flatten(content, "" if is_global(file) else f"{group}."), file)


def _same_group(defaults: Any) -> list[str]:
    return [entry for entry in defaults or [] if isinstance(entry, str) and entry != "_self_" and "/" not in entry]


def _swept(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """What ``hydra: {sweeper: {params: …}}`` of an experiment says, where nothing else of Hydra's is set."""
    own = content.get("hydra")
    sweeper = own.get("sweeper") if isinstance(own, dict) and set(own) <= {"mode", "sweeper"} else None
    params = sweeper.get("params") if isinstance(sweeper, dict) and set(sweeper) == {"params"} else None
    return params if isinstance(params, dict) else {}


def sweep_of(experiment: str | None, roots: Sequence[Path], seen: tuple[Path, ...] = ()) -> dict[str, tuple[str, Path]]:
    """``hydra.sweeper.params`` of an experiment: each key's values as they would be typed, and which file says it."""
    file = file_of("experiment", experiment, roots)
    if file is None or file in seen:
        return {}
    content = plain(file)
    params: dict[str, tuple[str, Path]] = {}
    for entry in _same_group(content.get("defaults")):
        params |= sweep_of(entry, roots, (*seen, file))
    for key, value in _swept(content).items():
        if isinstance(value, dict | list):
            right = ",".join(str(item) for item in value) if isinstance(value, list) else "1,2"
            dotted = f"{key}.{next(iter(value), 'key')}" if isinstance(value, dict) else key
            raise PkuslurmError(
                f'hydra.sweeper.params.{key}: values are one text with commas; write {dotted}: "{right}"; '
                f"it stands in {file}"
            )
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        params[str(key)] = text, file
    return params


def check_files(choices: Mapping[str, str], roots: Sequence[Path]) -> None:
    """The presets in use that are not ours hold nothing that we do not know, and nothing that YAML twists."""
    for group, choice in choices.items():
        for key, file in keys_of(group, choice, roots).items():
            if not is_ours(file) and hint_of(key) is None:
                raise PkuslurmError(f"{key}: no such key{nearest_key(key)}; it stands in {file}")


def defaults(roots: Sequence[Path]) -> Defaults:
    """defaults.yaml of the folders of presets, the first that names a key has the word on it."""
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for file in (root / "defaults.yaml" for root in roots):
        if not file.is_file():
            continue
        for key, value in plain(file).items():
            if key in GROUPS and not isinstance(value, dict):
                if key not in files and value is not None:
                    if file_of(key, str(value), roots) is None:
                        raise PkuslurmError(f"{no_such_choice(key, str(value), roots)}; it stands in {file}")
                    chosen[key], files[key] = str(value), file
                continue
            for name, item in flatten({key: value}).items():
                if hint_of(name) is None or is_node(name):
                    raise PkuslurmError(f"{name}: no such key{nearest_key(name)}; it stands in {file}")
                if name not in files:
                    values[name], files[name] = item, file
    return Defaults(chosen, values, files)


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
