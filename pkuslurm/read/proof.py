"""Whether a marker is to be believed, looked at quickly: readers ask this of many runs, again and again."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pkuslurm.read import pruned as pruning
from pkuslurm.read.pruned import excuses
from pkuslurm.rundir import RunDir, read_json

SCHEMA_VERSION = 1
# The worker hashes much more before it builds on a marker; a list of a hundred runs must not read a hundred models.
HASHED_UP_TO = 1024 * 1024


def marker_of(
    run: RunDir, run_id: str, kind: str, pruned: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """The marker of job ``kind`` if its artifacts are what it says, else None and what is wrong with it.

    ``pruned``: what was taken away on purpose, as pruned.read gives it; what is missing there is no doubt.
    """
    if run.home(kind) != run:
        run, run_id, pruned = run.home(kind), run.home(kind).run_id, None
    name = f"done/{kind}.json"
    try:
        run.done(kind).lstat()
    except OSError:
        return None, f"there is no marker {name}"
    value = read_json(run.done(kind))
    if value is None:
        return None, f"its marker {name} is damaged"
    for key, right in {"schema_version": SCHEMA_VERSION, "kind": kind, "run_id": run_id}.items():
        if value.get(key) != right:
            return None, f"its marker {name} says {key} {value.get(key)!r}, not {right!r}"
    entries = value.get("artifacts")
    if not isinstance(entries, list) or not entries:
        return None, f"its marker {name} names no artifacts"
    part = excuses(kind, value, pruned or {})
    for entry in entries:
        if problem := _doubt(run.path, kind, entry, part):
            return None, problem
    return value, ""


def open_kinds(run: RunDir, kinds: Iterable[str]) -> list[str]:
    """Those of ``kinds`` that are not proved complete; what was pruned since then is. ``serve`` is never open."""
    gone = pruning.read(run)
    kinds = [kind for kind in kinds if kind != "serve"]
    return [kind for kind in kinds if marker_of(run, run.run_id, kind, gone)[0] is None]


def _doubt(root: Path, kind: str, entry: object, pruned: str | None) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return f"its marker done/{kind}.json is damaged"
    name = entry["path"]
    relative = PurePosixPath(name)
    # the directory may be another user's: nothing outside it is opened
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        return f"its marker names {name!r}, which is not below the run's directory"
    try:
        known = (root / relative).stat()
        if not stat.S_ISREG(known.st_mode):
            return f"{name} is no file"
        if kind == "report":
            # `report` may write the page anew at any time; it depends on nothing that is not marked itself
            return None if known.st_size else f"{name} is empty"
        if known.st_size != entry.get("bytes"):
            return f"{name} has {known.st_size} bytes, its marker says {entry.get('bytes')}"
        if known.st_size <= HASHED_UP_TO:
            content = (root / relative).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
                return f"{name} has changed since it was marked complete"
    except FileNotFoundError as error:
        return None if pruned == relative.parts[0] else f"{name}, which its marker names: {error.strerror}"
    except OSError as error:
        return f"{name}, which its marker names: {error.strerror or error}"
    except ValueError:  # half of a surrogate pair
        return f"its marker names {name!r}, which can be no file's name"
    return None
