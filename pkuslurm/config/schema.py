"""The configuration as plain dataclasses. conf/ holds the defaults and each key's meaning; here are the types.

``parse_config`` is strict: an unknown key, a wrong type or an impossible value raises PkuslurmError that names the
field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pkuslurm.errors import PkuslurmError


@dataclass(frozen=True)
class Cluster:
    executor: Literal["local", "slurm", "meet"]
    accelerator: Literal["npu", "cuda", "cpu"]
    nproc_per_node: int | None
    python: str | None
    launcher: Literal["auto", "torchrun", "prefork"]
    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    constraint: str | None
    nodelist: str | None
    exclude: str | None
    mem: str | int | None
    cpus_per_task: int | None
    exclusive: bool | str | None
    time: str | int | None
    gres: str | None
    gpus: str | int | None
    gpus_per_node: str | int | None
    arrays: bool
    array_parallelism: int | None
    pack: bool
    extra: dict[str, Any]
    env: dict[str, Any]
    setup: list[str]
    jobs: dict[str, Any]
    meet: str | None
    join_timeout: int | float
    poll_seconds: int | float


@dataclass(frozen=True)
class Model:
    path: str | None
    make: Literal["tiny"] | None
    template: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Dataset:
    path: str | None
    name: str | None
    formatting: Literal["auto", "alpaca", "sharegpt"]
    columns: dict[str, Any] | None
    tags: dict[str, Any] | None


@dataclass(frozen=True)
class Infer:
    prompts: list[str] | str
    expect: str | list[str] | None
    max_new_tokens: int
    batch_size: int
    adapter: str | None
    base: str | None


@dataclass(frozen=True)
class Container:
    runtime: Literal["none", "apptainer", "singularity", "charliecloud", "docker", "podman", "enroot", "pyxis"]
    image: str | None
    llamafactory: str | None


@dataclass(frozen=True)
class Pipeline:
    name: str
    jobs: list[str]


@dataclass(frozen=True)
class Resume:
    max_attempts: int
    signal_seconds: int
    hang_minutes: int | float | None


@dataclass(frozen=True)
class Sweep:
    metric: str
    direction: Literal["minimize", "maximize"]
    extend: str | None
    keep_merged: Literal["all", "best", "none"]


@dataclass(frozen=True)
class Serve:
    engine: str
    command: str | list[str] | None
    port: int | None
    idle_minutes: int | float | None


@dataclass(frozen=True)
class Config:
    """One run's whole configuration. ``train`` and ``merge`` are LLaMA-Factory's own keys, unchanged."""

    nodes: int
    name: str | None
    notes: list[str]
    run_root: str
    cache_root: str
    dry_run: bool
    wait: bool | None
    access: Literal["private", "group"]
    from_yaml: str | None
    here: bool
    cluster: Cluster
    model: Model
    dataset: Dataset
    train: dict[str, Any]
    merge: dict[str, Any]
    infer: Infer
    container: Container
    pipeline: Pipeline
    resume: Resume
    sweep: Sweep
    serve: Serve


@dataclass(frozen=True)
class Setting:
    """A value that differs from the default, and who set it (``command line``, ``model=tiny``, …)."""

    key: str
    value: Any
    default: Any
    origin: str


T = TypeVar("T")


def parse_config(values: Mapping[str, Any]) -> Config:
    """``values`` (nested, resolved) as a typed Config. Pure; what values mean is looked at by ``checks.check``."""
    return _parse(Config, values, "")


def _parse(cls: type[T], values: object, prefix: str) -> T:
    if not isinstance(values, Mapping):
        raise PkuslurmError(f"{prefix.rstrip('.')}={values!r}: it holds keys of its own; set one of them")
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(names)}"
            raise PkuslurmError(f"{prefix}{key}: no such key{hint}")
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in names})


def _value(hint: Any, value: object, key: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _parse(hint, value, key + ".")
    if _fits(hint, value):
        return value
    if str in _alternatives(hint) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # name=2024, cluster.partition=64: a word that looks like a number
    raise PkuslurmError(f"{key}={_show(value)}: it must be {_describe(hint)}")


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
    for option in _alternatives(hint):
        if get_origin(option) is Literal:
            parts += [str(choice) for choice in get_args(option)]
        elif get_origin(option) is list:
            parts.append("a list [a,b] of text")
        elif get_origin(option) is dict:
            parts.append("keys and values {a: 1}")
        else:
            parts.append(words.get(option, str(option)))
    return " or ".join(dict.fromkeys(parts))


def _show(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"
