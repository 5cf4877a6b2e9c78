"""A run's jobs in Slurm's queue: cancelled all together, by ids that are still its own."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.submit.local import check_owner

ALIVE = ("PENDING", "RUNNING")
# KillWait (30 s by default) passes between TERM and KILL
END_SECONDS = 60.0


def alive(document: dict[str, Any]) -> dict[str, str]:
    """{kind: job id} of the jobs that wait or run now. Raises PkuslurmError where Slurm does not answer.

    A job counts only under its key: an id alone may have been given to another job since.
    """
    found = {}
    known = {kind: entry for kind, entry in document["jobs"].items() if entry.get("asked")}
    ids = sorted({str(entry["job_id"]) for entry in known.values() if entry.get("job_id")})
    answer = commands.queue(ids)
    if not answer.complete:
        raise PkuslurmError(f"Slurm does not answer ({answer.problem}); try again later")
    for kind, entry in known.items():
        row = answer.rows.get(str(entry.get("job_id")))
        if entry.get("job_id") is None:
            # its launcher did not live to hear the answer
            named = commands.by_name(entry["key"])
            if not named.complete:
                raise PkuslurmError(f"Slurm does not answer ({named.problem}); try again later")
            row = next(iter(named.rows.values()), None)
        if row is not None and row.name == entry["key"] and row.state in ALIVE:
            found[kind] = row.job_id
    return found


def cancel(run: RunDir) -> bool:
    """scancel the whole chain and wait for its end. False: nothing of it was in the queue."""
    check_owner(run)
    document = read_json(run.run_json)
    if document is None:
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    living = alive(document)
    if living:
        commands.cancel(sorted(set(living.values())))
    if living or any(entry.get("job_id") is None for entry in document["jobs"].values()):
        # from now on what never started was cancelled, not skipped
        document["cancelled"] = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(run.run_json, document)
    deadline = time.monotonic() + END_SECONDS
    while living and alive(document):
        if time.monotonic() > deadline:
            raise PkuslurmError(
                f"{run.run_id}: told to stop {END_SECONDS:.0f} s ago, and still in the queue; see squeue"
            )
        time.sleep(1.0)
    return bool(living)
