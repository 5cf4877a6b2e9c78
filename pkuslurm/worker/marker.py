"""The marker: the proof that a job is complete, written last, and looked at sceptically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir
from pkuslurm.worker.state import now, save

SCHEMA_VERSION = 1

# Reading a merged model of gigabytes again before every job would cost minutes on a shared disk; of files
# larger than this only the size is compared.
HASHED_UP_TO = 64 * 1024 * 1024


def write(run: RunDir, run_id: str, kind: str, attempt: int, job_id: str, artifacts: Iterable[Path]) -> None:
    """Write done/<kind>.json about ``artifacts`` (files below the run's directory), hashes included.

    Raises PkuslurmError when an artifact cannot be read or the marker cannot be written.
    """
    entries = []
    for path in sorted(artifacts):
        try:
            entries.append(
                {
                    "path": path.relative_to(run.path).as_posix(),
                    "bytes": path.stat().st_size,
                    "sha256": _sha256(path),
                }
            )
        except OSError as error:
            raise PkuslurmError(f"{path}: cannot be read: {error.strerror or error}") from None
    save(
        run.done(kind),
        {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "run_id": run_id,
            "attempt": attempt,
            "job_id": job_id,
            "finished": now(),
            "artifacts": entries,
        },
    )


def doubt(run: RunDir, run_id: str, kind: str) -> str | None:
    """None if the marker is there and its artifacts are what it says; else what is wrong, in a few words.

    Files over ``HASHED_UP_TO`` bytes are compared by size only.
    """
    if run.home(kind) != run:
        run, run_id = run.home(kind), run.home(kind).run_id
    # on NFS a listing looks again for what another node has just written
    try:
        os.listdir(run.done(kind).parent)
    except OSError:
        return f"no marker done/{kind}.json"
    if not run.done(kind).exists():
        return f"no marker done/{kind}.json"
    value = rundir.read_json(run.done(kind))
    if value is None:
        return f"its marker done/{kind}.json is no whole JSON object"
    expected = {"schema_version": SCHEMA_VERSION, "kind": kind, "run_id": run_id}
    for name, right in expected.items():
        if value.get(name) != right:
            return f"its marker done/{kind}.json says {name} {value.get(name)!r}, not {right!r}"
    entries = value.get("artifacts")
    if not isinstance(entries, list) or not entries:
        return f"its marker done/{kind}.json names no artifacts"
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            return f"its marker done/{kind}.json is damaged"
        if entry["path"].startswith("/") or ".." in entry["path"].split("/"):
            return f"its marker done/{kind}.json names {entry['path']!r}, which is not below the run's directory"
        if problem := _compare(run.path / entry["path"], entry["path"], entry):
            return problem
    return None


def _compare(path: Path, name: str, entry: dict[str, object]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            return f"{name} has {size} bytes, its marker says {entry.get('bytes')}"
        if size <= HASHED_UP_TO and _sha256(path) != entry.get("sha256"):
            return f"{name} has changed since it was marked complete"
    except OSError as error:
        return f"{name}, which its marker names: {error.strerror or error}"
    except ValueError:  # a null byte, half of a surrogate pair
        return f"its marker names {name!r}, which can be no file's name"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
