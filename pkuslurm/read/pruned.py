"""What ``prune`` took from a complete run, as done/pruned.json tells it: no longer there, and proved while it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkuslurm.read.values import text, whole
from pkuslurm.rundir import RunDir, read_json

SCHEMA_VERSION = 1
# job → the part of the run's directory that it makes and that can be made again
PARTS = {"prepare": "data", "merge": "merged"}
WORDS = {
    "data": "its tokenized data was pruned",
    "merged": "merged model pruned; `pkuslurm merge` makes it again",
}


def record(run: RunDir) -> Path:
    return run.path / "done" / "pruned.json"


def read(run: RunDir) -> dict[str, Any]:
    """part → the marker that proved it (``attempt``, ``finished``), ``when`` it was pruned, its ``bytes``."""
    value = read_json(record(run)) or {}
    parts = value.get("parts")
    if value.get("schema_version") != SCHEMA_VERSION or not isinstance(parts, dict):
        return {}
    return {part: entry for part, entry in parts.items() if isinstance(entry, dict)}


def excuses(kind: str, marker: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """The part whose absence is no doubt about ``marker``; None where prune took nothing that this marker proves."""
    part = PARTS.get(kind)
    entry = known.get(part) if part else None
    if part is None or entry is None or text(entry.get("finished")) is None:
        return None
    # a later attempt's marker is not excused by what was pruned before it
    same = whole(entry.get("attempt")) == whole(marker.get("attempt")) and entry["finished"] == marker.get("finished")
    return part if same else None


def part_of(run: RunDir, kind: str, marker: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """``excuses``, where the part is indeed gone."""
    part = excuses(kind, marker, known)
    return part if part is not None and not (run.path / part).exists() else None
