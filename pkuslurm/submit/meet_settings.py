"""What the nodes of a meeting must have in common, and the command that brings another node to it."""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkuslurm.config.parse import show
from pkuslurm.config.schema import Config
from pkuslurm.paths import absolute
from pkuslurm.submit.meet_where import Role, is_local

# may differ from node to node
OWN_KEYS = ("cluster.join_timeout", "cluster.python", "here", "wait")
# what these name is compared, not their words; notes are for people
NOT_COMPARED = (*OWN_KEYS, "from_yaml", "notes", "dry_run")
# node 0 alone reads these: a copy in another folder is as good
READ_ONCE = ("dataset.path", "infer.prompts")
# folders that need not exist yet
FOLDERS = ("cluster.meet", "run_root", "cache_root")
PATHS = (
    *(*READ_ONCE, *FOLDERS, "from_yaml", "cluster.python", "container.image", "dataset.media_dir", "model.path"),
    *("model.adapter", "infer.adapter", "infer.base", "train.deepspeed", "--config-dir"),
)
MOST_TOLD = 3


def settings(composed: str, config: Config) -> tuple[str, ...]:
    """One text a key of ``composed``, the config.yaml of what was typed on this node: contents, not words.

    A path counts as where it leads from here, a file that node 0 alone reads as what stands in it.
    """
    import yaml

    values = dict(_flat(yaml.safe_load(composed)))
    values["cluster.nproc_per_node"] = config.cluster.nproc_per_node or 1
    kept = sorted(key for key, value in values.items() if key not in NOT_COMPARED and value is not None)
    return tuple(f"{key}={_content(key, values[key])}" for key in kept)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _content(key: str, value: Any) -> str:
    if key not in PATHS or not isinstance(value, str) or "${" in value:
        return show(value)
    path = _place(value)
    if key in READ_ONCE and path.exists():
        return f"{path.name} (content {_digest(path)})"
    return str(path) if key in FOLDERS or path.exists() else value


def _digest(path: Path) -> str:
    """Of a file's bytes; of a folder's dataset_info.json and of the names and sizes of its files."""
    whole = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            whole.update(f"{file.name} {file.stat().st_size if file.is_file() else ''}\n".encode(errors="replace"))
        path = path / "dataset_info.json"
    if path.is_file():
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()[:12]


def difference(ours: Sequence[str], theirs: object) -> str | None:
    """The first keys that differ, in words, up to the other one's name; None: nothing does."""
    others = [str(item) for item in theirs] if isinstance(theirs, list | tuple) else []
    only = [item for item in ours if item not in others]
    missing = [item for item in others if item not in ours]
    keys = list(dict.fromkeys(item.partition("=")[0] for item in (*only, *missing)))
    if not keys:
        return None
    told = [
        " ".join(item for item in items if item.partition("=")[0] in keys[:MOST_TOLD]) or "nothing of it"
        for items in (only, missing)
    ]
    more = f" (and {len(keys) - MOST_TOLD} more that differ)" if len(keys) > MOST_TOLD else ""
    return f"{told[0]} here, but {told[1]}{more}"


def rooted(typed: Sequence[str]) -> list[str]:
    """``typed`` as it means the same in any folder."""
    return [_rooted(item) for item in typed]


def _rooted(item: str) -> str:
    key, equals, value = item.partition("=")
    if value[:1] in ("'", '"') and value[-1:] == value[:1]:
        value = value[1:-1]
    if key.lstrip("+") not in PATHS or not value or "${" in value:
        return item
    path = _place(value)
    return f"{key}{equals}{path}" if key.lstrip("+") in FOLDERS or path.exists() else item


def _place(value: str) -> Path:
    return Path(os.path.normpath(absolute(value)))


def again(typed: Sequence[str], module: str = "pkuslurm.launch", variables: Mapping[str, str] | None = None) -> str:
    """The command, to be typed on the other nodes, with what it needs of the environment there."""
    said = [f"{name}={value}" for name, value in (variables or {}).items()]
    return shlex.join([*(["env", *said] if said else []), sys.executable, "-m", module, *rooted(typed)])


def variables(own: Role, nodes: int, environ: Mapping[str, str], run_root: str | None = None) -> dict[str, str] | None:
    """What another node needs in its environment; None: the platform has started the command there, too.

    ``run_root``: where it is not typed, and the nodes meet there.
    """
    found = {} if run_root is None else {"PKUSLURM_RUN_ROOT": run_root}
    if own.rank is None:
        return found
    name = "NODE_RANK" if environ.get("NODE_RANK") else "RANK"
    if name == "RANK" and environ.get("WORLD_SIZE"):
        return None
    other = "0" if own.rank else "1" if nodes == 2 else f"1_TO_{nodes - 1}"
    given = {key: environ[key] for key in ("MASTER_ADDR", "MASTER_PORT") if environ.get(key)}
    if own.address is not None and not own.rank and is_local(own.address):
        given["MASTER_ADDR"] = socket.gethostname()
    return {name: other} | given | found
