"""A sweep's jobs in Slurm's queue: which of them wait or run, those that were lost sight of, and the end of all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, write_json
from pkuslurm.slurm import commands
from pkuslurm.slurm.parse import ALIVE, Row
from pkuslurm.submit import queue
from pkuslurm.submit.alone import alone
from pkuslurm.sweepdir import SweepDir, document, save, unfinished


@dataclass(frozen=True)
class Living:
    """A job that waits or runs: of which run (its directory below the sweep; "": the sweep's own), as Slurm has it."""

    member: str
    kind: str
    row: Row

    @property
    def job_id(self) -> str:
        return self.row.job_id

    @property
    def whole(self) -> str:
        """The id of the array that it is an element of."""
        return self.job_id.partition("_")[0]


def living(home: SweepDir, sweep: Mapping[str, Any]) -> list[Living]:
    """All that waits or runs now. One question; raises PkuslurmError where Slurm does not answer.

    A job counts only under its key: an id alone may have been given to another job since.
    """
    known: dict[str, list[tuple[str, str, str]]] = {}
    for member, kind, job_id, key in _submitted(home, sweep):
        known.setdefault(job_id, []).append((member, kind, key))  # cluster.pack: one job, all kinds
    answer = commands.queue(list(known))
    if not answer.complete:
        raise queue.silent(answer.problem)
    return [
        Living(member, kind, row)
        for job_id, row in answer.rows.items()
        for member, kind, key in known.get(job_id, ())
        if row.name == key and row.state in ALIVE
    ]


def _submitted(home: SweepDir, sweep: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Member, kind, id and key of everything that was submitted."""
    for group in sweep["groups"]:
        for kind, job in group["jobs"].items():
            for index, member in enumerate(group["members"] if job.get("job_id") else ()):
                own = f"{job['job_id']}_{index}" if group.get("array") else str(job["job_id"])
                yield member, kind, own, job["key"]
    for kind, entry in sweep["jobs"].items():
        if entry.get("job_id"):
            yield "", kind, str(entry["job_id"]), entry["key"]
    for run in apart(home, sweep):
        for kind, entry in (document(run, sweep) or {"jobs": {}})["jobs"].items():
            if entry.get("job_id") and entry.get("group") is None and kind != "prepare":
                yield run.path.name, kind, str(entry["job_id"]), entry["key"]


def apart(home: SweepDir, sweep: Mapping[str, Any]) -> list[RunDir]:
    """The points of which some job was submitted by itself: their own run.json says as what."""
    return [home.point(point["n"]) for point in sweep["points"] if point.get("apart")]


def adopt(home: SweepDir, sweep: dict[str, Any]) -> None:
    """Fill in the ids of jobs whose launcher did not live to hear the answer. Raises PkuslurmError."""
    queue.adopt(sweep)
    for number, group in enumerate(sweep["groups"]):
        lost = [job for job in group["jobs"].values() if job.get("asked") and not job.get("job_id")]
        if lost and group["members"]:
            queue.adopt({"jobs": dict(enumerate(lost))})
            write_json(home.group(number), group)


def cancel(home: SweepDir) -> bool:
    """scancel all of it and wait for its end. False: nothing of it was in the queue."""
    with alone(RunDir(home.path)) as sweep:
        adopt(home, sweep)
        there = living(home, sweep)
        commands.cancel(sorted({one.whole for one in there}))
        # from now on what never started was cancelled, not skipped
        sweep["cancelled"] = queue.now()
        save(home, sweep)
        for number, group in enumerate(sweep["groups"]):
            if unfinished(group):
                for job in group["jobs"].values():
                    job["held"] = False
                write_json(home.group(number), group)
        for run in apart(home, sweep):
            if (value := document(run, sweep)) is not None:
                write_json(run.run_json, value | {"cancelled": sweep["cancelled"]})
    deadline = time.monotonic() + queue.END_SECONDS
    while there and living(home, sweep):
        if time.monotonic() > deadline:
            raise PkuslurmError(
                f"{home.sweep_id}: told to stop {queue.END_SECONDS:.0f} s ago, and still in the queue; see squeue"
            )
        time.sleep(1.0)
    return bool(there)
