"""Secrets: they may come from the environment by name, and nothing else of them is ever kept.

Every user of a cluster can read what stands in an argv or in a job's description (ps, scontrol).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pkuslurm.errors import PkuslurmError

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
NOT_SECRET = ("TOKENIZERS_PARALLELISM",)
BY_NAME = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)")
# NAME=value in a shell line or an option, unless the value is a variable
ASSIGNED = re.compile(r"\b(\w*(?:TOKEN|KEY|SECRET|PASSWORD)\w*)=(?![\"']?\$)[\"']?[^\s\"',;]")
# LLaMA-Factory's keys that take a secret (split_special_tokens and its like take none)
SECRET_ENDS = ("_token", "_key", "_secret", "_password")


def looks_secret(name: str) -> bool:
    return SECRET.search(name) is not None and name.upper() not in NOT_SECRET


def kept_by_name(raw: DictConfig) -> DictConfig:
    """A copy of ``raw`` in which variables that come from the environment stay as ``${oc.env:NAME}`` when resolved."""
    copy: DictConfig = raw.copy()
    unresolved: Any = OmegaConf.to_container(raw, resolve=False)
    for node, values in _tables(unresolved):
        for name, value in values.items():
            if isinstance(value, str) and BY_NAME.fullmatch(value):
                OmegaConf.select(copy, node)[name] = "\\" + value
    return copy


def check_secrets(unresolved: Mapping[str, Any]) -> None:
    """Raise PkuslurmError for a secret that is written down, or that would be."""
    for node, values in _tables(unresolved):
        for name, value in values.items():
            _variable(f"{node}.{name}", str(name), value, dry_run=unresolved.get("dry_run") is True)
    for node in ("train", "merge"):
        for key, value in (unresolved.get(node) or {}).items():
            if str(key).endswith(SECRET_ENDS) and value not in (None, "", False):
                hint = (
                    f"export {key.upper()} in your shell, and write cluster.env.{key.upper()}=${{oc.env:{key.upper()}}}"
                )
                raise PkuslurmError(f"{node}.{key}: a secret does not belong into a configuration; {hint}")
    for key, text in _texts(unresolved):
        if re.match(r"cluster\.(jobs\.\w+\.)?(extra|setup)\b", key) and (written := ASSIGNED.search(text)):
            _refuse(key, written.group(1))
        kept = BY_NAME.fullmatch(text) and re.match(r"cluster\.(jobs\.\w+\.)?env\.", key)
        names = [name for name in FROM_ENVIRONMENT.findall(text) if looks_secret(name)]
        if names and not kept:
            _refuse(key, names[0])


def _refuse(key: str, name: str) -> None:
    raise PkuslurmError(
        f"{key}: it would write the secret {name} down; export {name}, and write cluster.env.{name}=${{oc.env:{name}}}"
    )


def _variable(key: str, name: str, value: object, dry_run: bool) -> None:
    by_name = BY_NAME.fullmatch(value) if isinstance(value, str) else None
    if by_name is not None:
        source = by_name.group(1)
        if source not in os.environ and not dry_run:
            raise PkuslurmError(f"{key}=${{oc.env:{source}}}: {source} is not set; export {source}=… in your shell")
    elif looks_secret(name) and value not in (None, ""):
        raise PkuslurmError(
            f"{key}: a secret does not belong into a configuration; export {name}, and write {key}=${{oc.env:{name}}}"
        )


def _tables(unresolved: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every table of variables: all jobs', and each kind's."""
    cluster = unresolved.get("cluster")
    if not isinstance(cluster, Mapping):
        return
    jobs = cluster.get("jobs")
    tables = [("cluster.env", cluster.get("env"))]
    if isinstance(jobs, Mapping):
        tables += [
            (f"cluster.jobs.{kind}.env", job.get("env")) for kind, job in jobs.items() if isinstance(job, Mapping)
        ]
    yield from ((node, values) for node, values in tables if isinstance(values, Mapping))


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value
