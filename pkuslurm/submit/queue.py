"""A run's jobs in Slurm's queue: found, and cancelled all together, by ids that are still its own."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read.status import RunStatus
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.slurm.parse import ALIVE, Row
from pkuslurm.submit import identity
from pkuslurm.submit.alone import alone
from pkuslurm.sweepdir import check_settled, load, sweep_of
from pkuslurm.worker import hostlist

# KillWait (30 s by default) passes between TERM and KILL
END_SECONDS = 60.0


def adopt(document: dict[str, Any]) -> None:
    """Fill in the ids of jobs whose launcher did not live to hear the answer: they are found by their keys.

    Raises PkuslurmError where Slurm does not answer.
    """
    for entry in document["jobs"].values():
        # an array's name is that of all its elements: adopted by the sweep
        if entry.get("asked") and entry.get("job_id") is None and entry.get("group") is None:
            answer = commands.by_name(entry["key"])
            if not answer.complete:
                raise silent(answer.problem)
            entry["job_id"] = identity.named(answer)


def alive(document: dict[str, Any]) -> dict[str, str]:
    """{kind: job id} of the jobs that wait or run now. Raises PkuslurmError where Slurm does not answer."""
    return {kind: row.job_id for kind, row in there(document).items()}


def there(document: dict[str, Any]) -> dict[str, Row]:
    """The same, as Slurm has them.

    A job counts only under its key: an id alone may have been given to another job since.
    """
    known = {kind: entry for kind, entry in document["jobs"].items() if entry.get("job_id")}
    answer = commands.queue(sorted({str(entry["job_id"]) for entry in known.values()}))
    if not answer.complete:
        raise silent(answer.problem)
    rows = {kind: answer.rows.get(str(entry["job_id"])) for kind, entry in known.items()}
    return {
        kind: row
        for kind, row in rows.items()
        if row is not None and row.name == known[kind]["key"] and row.state in ALIVE
    }


def orphans(
    jobs: Mapping[str, Any], kinds: Collection[str], living: Mapping[str, Row], idle: Sequence[str] = ()
) -> list[str]:
    """Those that wait for a job of ``kinds`` that is no more: it failed, or Slurm has lost it and may have given its id
    to another; or for one of ``idle``, which is about to be taken away. ``jobs`` are in the order of the chain."""
    gone = [*idle, *(kind for kind in kinds if kind not in living and jobs[kind].get("asked"))]
    found: list[str] = []
    for kind, entry in jobs.items():
        waits = kind in living and living[kind].state == "PENDING"
        if waits and any(parent in (*gone, *found) for parent in entry.get("parents") or ()):
            found.append(kind)
    return found


def lift(run: RunDir, seen: RunStatus) -> list[str]:
    """Start requeued jobs at once that Slurm would hold for two minutes; the kinds. Only where the run is one's own."""
    if seen.document.get("executor") != "slurm" or run.path.stat().st_uid != os.getuid():
        return []
    lifted = []
    for job in seen.jobs:
        if job.state != "PENDING" or not (job.reason or "").startswith("BeginTime") or run.home(job.kind) != run:
            continue
        # an attempt before it: a --begin of the user's own is not touched
        file = read_json(run.job(job.kind)) or {}
        again = job.attempt > int(file.get("first_attempt") or 1)
        if again and job.job_id and commands.begin_now(job.job_id, _excluded(file, bad_nodes(run, file))):
            lifted.append(job.kind)
    return lifted


def _excluded(job: Mapping[str, Any], bad: Sequence[str]) -> list[str]:
    """With those that the user excludes: Slurm takes the list as a whole."""
    if not bad:
        return []
    given = job.get("request", {}).get("options", {}).get("exclude")
    return list(dict.fromkeys([*(hostlist.expand(str(given)) if given else []), *bad]))


def bad_nodes(run: RunDir, job: Mapping[str, Any]) -> list[str]:
    """The nodes that failed under this job (its job file) before, if its partition has enough others."""
    known = (read_json(run.attempt(str(job.get("kind")))) or {}).get("bad_nodes")
    bad = [str(name) for name in known] if isinstance(known, list) else []
    options = job.get("request", {}).get("options", {})
    if not bad or options.get("nodelist"):  # whoever names the nodes gets them
        return []
    others = {*commands.nodes_up(options.get("partition"))} - {*_excluded(job, bad)}
    return bad if len(others) >= int(job.get("nodes") or 1) else []


def _own(run: RunDir, living: dict[str, str]) -> dict[str, str]:
    """Without what a point shares with others."""
    return {kind: job_id for kind, job_id in living.items() if run.home(kind) == run}


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def silent(problem: str) -> PkuslurmError:
    """What a question that Slurm did not answer is raised as."""
    return PkuslurmError(f"Slurm does not answer ({problem}); try again later")


def cancel(run: RunDir) -> bool:
    """scancel the whole chain and wait for its end. False: nothing of it was in the queue."""
    with alone(run) as document:
        if (home := sweep_of(run)) is not None:
            check_settled(run, load(home, strict=True) or {})
        adopt(document)
        living = _own(run, alive(document))
        if living:
            commands.cancel(sorted(set(living.values())))
        if living or any(entry.get("job_id") is None for entry in document["jobs"].values()):
            # from now on what never started was cancelled, not skipped
            document["cancelled"] = now()
            write_json(run.run_json, document)
    deadline = time.monotonic() + END_SECONDS
    while living and _own(run, alive(document)):
        if time.monotonic() > deadline:
            raise PkuslurmError(
                f"{run.run_id}: told to stop {END_SECONDS:.0f} s ago, and still in the queue; see squeue"
            )
        time.sleep(1.0)
    return bool(living)
