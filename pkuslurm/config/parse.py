"""Values become a typed Config. Strict: an unknown key, a wrong type or an impossible value raises PkuslurmError that
names the field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pkuslurm.config.schema import JOBS, NOT_PER_JOB, Cluster, Config
from pkuslurm.errors import PkuslurmError

T = TypeVar("T")


def _hints(cls: Any) -> dict[str, Any]:
    """Evaluated once: a sweep parses thousands of configurations."""
    return _evaluated(cls)


_evaluated = cache(get_type_hints)


def parse_config(values: Mapping[str, Any]) -> Config:
    """``values`` (nested, resolved) as a typed Config. Pure; what values mean is looked at by ``checks.check``."""
    config = _parse(Config, values, "")
    cluster = config.cluster
    return replace(config, cluster=replace(cluster, env=_words(cluster.env), jobs=_jobs(cluster.jobs)))


def hint_of(key: str) -> Any:
    """The type of a dotted key, ``Any`` below an open node, or None where there is no such key."""
    hint: Any = Config
    for part in key.split("."):
        if any(get_origin(option) is dict for option in _alternatives(hint)):
            return Any
        hint = _hints(hint).get(part) if is_dataclass(hint) else None
        if hint is None:
            return None
    return hint


def is_node(key: str) -> bool:
    """Whether ``key`` only holds other keys."""
    return is_dataclass(hint_of(key))


def is_word(key: str) -> bool:
    """Whether ``key`` takes text (or null) and nothing else."""
    return set(_alternatives(hint_of(key))) in ({str}, {str, type(None)})


def is_number(key: str) -> bool:
    """Whether ``key`` takes numbers (or null) and nothing else."""
    return set(_alternatives(hint_of(key))) <= {int, float, type(None)}


def choices_of(hint: Any) -> str:
    """What a value of type ``hint`` may be, in words."""
    return _describe(hint)


def _parse(cls: type[T], values: object, prefix: str) -> T:
    if not isinstance(values, Mapping):
        raise PkuslurmError(f"{prefix.rstrip('.')}={show(values)}: it holds keys of its own; set one of them")
    hints = _hints(cls)
    _known(values, [field.name for field in fields(cls)], prefix)  # type: ignore[arg-type]
    # a default of its own has what came later: the config.yaml of an older run lacks it
    later = {field.name for field in fields(cls) if field.default is not MISSING}  # type: ignore[arg-type]
    missing = next((name for name in hints if name not in values and name not in later), None)
    if missing is not None:
        raise PkuslurmError(f"{prefix}{missing}: it is missing; a key is emptied with {prefix}{missing}=null")
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in hints if name in values})


def _known(values: Iterable[object], names: Sequence[str], prefix: str) -> None:
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.7)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are: {', '.join(names)}"
            raise PkuslurmError(f"{prefix}{key}: no such key{hint}")


def _jobs(jobs: Mapping[str, Any]) -> dict[str, Any]:
    """``cluster.jobs``: for each kind, some of the cluster's own keys, of the cluster's own types."""
    hints = {name: hint for name, hint in _hints(Cluster).items() if name not in NOT_PER_JOB}
    parsed: dict[str, Any] = {}
    for kind, values in jobs.items():
        prefix = f"cluster.jobs.{kind}"
        if kind not in (*JOBS, "serve"):
            raise PkuslurmError(f"{prefix}: no such kind of job; there are: {', '.join((*JOBS, 'serve'))}")
        if not isinstance(values, Mapping):
            raise PkuslurmError(f"{prefix}={show(values)}: it holds keys such as partition; set one of them")
        shared = next((key for key in values if key in NOT_PER_JOB), None)
        if shared is not None:
            raise PkuslurmError(f"{prefix}.{shared}: it is the same for all jobs; write cluster.{shared}=…")
        _known(values, list(hints), prefix + ".")
        parsed[kind] = {key: _value(hints[key], value, f"{prefix}.{key}") for key, value in values.items()}
        if "env" in parsed[kind]:
            parsed[kind]["env"] = _words(parsed[kind]["env"])
    return parsed


def _words(env: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as a shell knows them: true, not Python's True."""
    return {str(key): str(value).lower() if isinstance(value, bool) else value for key, value in env.items()}


def _value(hint: Any, value: object, key: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _parse(hint, value, key + ".")
    if isinstance(value, list) and list[str] in _alternatives(hint):
        value = [str(item) if _is_number(item) else item for item in value]  # prompts=[42]
    if _fits(hint, value):
        if value == "":
            raise PkuslurmError(f"{key}=: it is empty; it must be {_describe(hint)}")
        return value
    if str in _alternatives(hint) and _is_number(value):
        return str(value)  # name=2024, cluster.partition=64: a word that looks like a number
    if isinstance(value, list) and str in _alternatives(hint) and list[str] not in _alternatives(hint):
        raise PkuslurmError(f"{key}=[…]: it must be {_describe(hint)}, no list; text with brackets is quoted: '[a]'")
    raise PkuslurmError(f"{key}={show(value)}: it must be {_describe(hint)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(hint: Any, value: object) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint) and not isinstance(value, bool)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(get_args(hint)[0], item) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    parts = []
    options = _alternatives(hint)
    for option in options:
        if option is int and float in options:  # said by "a number"
            continue
        if get_origin(option) is Literal:
            parts += [str(choice) for choice in get_args(option)]
        elif get_origin(option) is list:
            parts.append("a list [a,b] of text")
        elif get_origin(option) is dict:
            parts.append("keys and values {a: 1}")
        else:
            parts.append(words.get(option, str(option)))
    return " or ".join(dict.fromkeys(parts))


def show(value: object) -> str:
    """``value`` as one writes it, in a message: on one line, not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "…"
