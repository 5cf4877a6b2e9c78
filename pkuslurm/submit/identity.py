"""Jobs by their keys (their names). An id alone is no identity: a controller that dies forgets the jobs of its last
seconds, and gives their ids to others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.slurm import commands
from pkuslurm.slurm.parse import ALIVE

# for so long the controller is asked whether it has the job
FIND_SECONDS = 60.0
# a job that the controller does not show twice, so far apart, was not taken
ABSENT_SECONDS = 3.0


def find(key: str) -> str | None:
    """The job or array called ``key``; None: Slurm has none. Raises PkuslurmError where the controller does not say."""
    absent = False
    while True:
        job_id = named(_answered(lambda: commands.by_name(key)))
        if job_id is not None or absent:
            return job_id
        absent = True
        time.sleep(ABSENT_SECONDS)


def named(answer: commands.Answer) -> str | None:
    """Which of the jobs or arrays of one name, as Slurm has told them, is the one that is meant."""
    # what was taken back before it began may have had the same name
    rows = [row for row in answer.rows.values() if row.state != "CANCELLED" or row.nodes]
    return min(rows, key=lambda row: row.state not in ALIVE).job_id.partition("_")[0] if rows else None


def _answered(question: Callable[[], commands.Answer]) -> commands.Answer:
    """Ask until the controller answers. Raises PkuslurmError."""
    deadline = time.monotonic() + FIND_SECONDS
    while not (answer := question()).complete:
        if time.monotonic() > deadline:
            raise PkuslurmError(f"the controller does not answer ({answer.problem})")
        time.sleep(ABSENT_SECONDS)
    return answer


def check_there(entries: Iterable[Mapping[str, Any]]) -> None:
    """Raise PkuslurmError where Slurm no longer has what it has just taken."""
    known = {str(entry["job_id"]): str(entry["key"]) for entry in entries if entry.get("job_id")}
    if lost := sorted(set(known.values()) - set(_under_their_keys(known, ended=True).values())):
        raise PkuslurmError(f"Slurm has lost {', '.join(lost)}: its controller was started anew meanwhile")


def _under_their_keys(known: Mapping[str, str], ended: bool) -> dict[str, str]:
    """Those of ``known`` (key by job id) that the controller has."""
    answer = _answered(lambda: commands.queue(list(known)))
    rows = {row.job_id.partition("_")[0]: row.name for row in answer.rows.values() if ended or row.state in ALIVE}
    return {job_id: key for job_id, key in known.items() if rows.get(job_id) == key}


def take_back(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Cancel what of this submission is in the queue: it is held, so nothing of it has run."""
    known = {str(entry["job_id"]): str(entry["key"]) for entry in entries if entry.get("job_id")}
    try:
        commands.cancel(_under_their_keys(known, ended=False))
    except PkuslurmError:
        return False
    return True
