"""A job's next attempt: its number, and its job file made ready for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import status
from pkuslurm.rundir import RunDir, read_json, write_json


def next_attempt(run: RunDir, kind: str) -> int:
    """One more than the last that anything is known of; a job that never began starts as it was planned."""
    if not run.state(kind).exists():
        return int((read_json(run.job(kind)) or {}).get("first_attempt", 1))
    return status.last_attempt(run.path, kind) + 1


def renumber(run: RunDir, kind: str, attempt: int, key: str | None) -> None:
    """Write the number of the next attempt, and its key on Slurm, into the job's file."""
    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    job["first_attempt"] = attempt
    if key is not None:
        job["key"] = key
        _without_bad_nodes(run, job)
    write_json(run.job(kind), job)
    if run.stop(kind).exists():
        os.unlink(run.stop(kind))


def renumbering(run: RunDir, kinds: Sequence[str]) -> Callable[[], None]:
    """What gives the jobs on this machine their next numbers; counted now, written when it is called."""
    attempts = {kind: next_attempt(run, kind) for kind in kinds}

    def begin() -> None:
        for kind, attempt in attempts.items():
            renumber(run, kind, attempt, None)

    return begin


def once_more(run: RunDir, kind: str) -> None:
    """Make a job ready to be done again although it may be complete."""
    renumber(run, kind, next_attempt(run, kind), None)
    run.done(kind).unlink(missing_ok=True)


def _without_bad_nodes(run: RunDir, job: dict[str, Any]) -> None:
    """Keep the next attempt from the nodes that failed under those before."""
    from pkuslurm.submit.queue import bad_nodes

    if bad := bad_nodes(run, job):
        options = job["request"]["options"]
        options["exclude"] = ",".join(dict.fromkeys([*str(options.get("exclude") or "").split(","), *bad])).strip(",")
