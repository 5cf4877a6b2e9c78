"""Whether the processes that a run's files name are there: who runs its jobs, who works."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkuslurm.read.values import unix, whole
from pkuslurm.worker import beats, processes

# launch writes run.json a moment before it says who runs it
BEGINNING_SECONDS = 30.0


def process(named: object, host: str) -> bool | None:
    """Whether the process that ``named`` (host, pid, pid_start) names runs; None where this host cannot know."""
    if not isinstance(named, Mapping) or named.get("host") != host:
        return None
    pid, start = whole(named.get("pid")), whole(named.get("pid_start"))
    if pid is None or start is None:
        return None
    return processes.alive(pid, start)


def worker(state: Mapping[str, Any], document: Mapping[str, Any], launched: bool | None, host: str) -> bool | None:
    """Whether the worker that wrote ``state`` runs; gone where its launcher (``launched``: see below), on the same
    machine, is proved dead."""
    known = process(state, host)
    named = document.get("launcher")
    if known is None and launched is False and isinstance(named, Mapping) and named.get("meeting"):
        return False if named.get("host") == state.get("host") else None
    return known


def launcher(document: Mapping[str, Any], host: str) -> bool | None:
    """Whether the process that runs the jobs is there. It takes its name out of run.json when it has ended."""
    named = document.get("launcher")
    if isinstance(named, Mapping) and named.get("meeting") and named.get("host") != host:
        return beats.alive(Path(str(named["meeting"])), named.get("nonce"), beats.GLANCE_SECONDS)
    if named is not None:
        return process(named, host)
    jobs = document.get("jobs")
    known = jobs.values() if isinstance(jobs, dict) else ()
    if document.get("cancelled") or any(isinstance(job, dict) and job.get("job_id") for job in known):
        return False
    age = time.time() - (unix(document.get("created")) or 0.0)
    return abs(age) < BEGINNING_SECONDS  # a clock that was put back since would make it begin for an hour
