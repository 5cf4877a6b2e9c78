"""wait=true on Slurm: say what changes until the run has ended. The jobs do not need us."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import status
from pkuslurm.read.changes import stamps
from pkuslurm.read.rules import ENDED
from pkuslurm.read.text import safe
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.submit import queue
from pkuslurm.worker import checkpoints

# so many looks in a row at which nothing is told, before it is given up: a controller may be away for a while
MOST_UNKNOWN = 20
# of a job that was cut off, which another attempt can go on with
CUT_OFF = ("TIMEOUT", "NODE_FAIL", "PREEMPTED")


def follow(run: RunDir, seconds: float, retry: Callable[[RunDir], None] | None = None) -> int:
    """Until the run has ended: 0, or 1 where a job did not complete. Ctrl-C raises KeyboardInterrupt.

    One question to Slurm every ``seconds``; between them only files are looked at. ``retry`` is called where a job was
    cut off and could not have itself requeued, as long as each attempt comes further than the one before.
    """
    shown: dict[str, tuple[str, str | None]] = {}
    unknown = 0
    reached = -1
    while True:
        now = status.read(run.path)
        for job in now.jobs:
            said = (job.state, job.reason)
            if shown.get(job.kind) != said:
                shown[job.kind] = said
                with suppress(OSError):
                    why = f": {safe(job.reason)}" if job.reason else ""
                    print(f"{job.kind:<8} {job.state}{why}", file=sys.stderr, flush=True)
        queue.lift(run, now)
        if all(job.state in (*ENDED, "PREEMPTED") for job in now.jobs):
            train, step = now.job("train"), checkpoints.last_step(run.adapter)
            if retry and train and train.state in CUT_OFF and train.attempt < _most(run) and step > reached:
                reached = step
                retry(run)
                continue
            return 0 if now.state == "COMPLETED" else 1
        unknown = unknown + 1 if all(job.state in (*ENDED, "UNKNOWN") for job in now.jobs) else 0
        if unknown > MOST_UNKNOWN:
            raise PkuslurmError(f"{run.run_id}: nothing is known of its jobs any more; see `pkuslurm status`")
        _pause(run, seconds)


def _most(run: RunDir) -> int:
    most = ((read_json(run.job("train")) or {}).get("resume") or {}).get("max_attempts")
    return most if isinstance(most, int) else 1


def _pause(run: RunDir, seconds: float) -> None:
    """Until ``seconds`` have passed, or a marker or a state file shows that something has changed."""
    before = stamps(run)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and stamps(run) == before:
        time.sleep(min(1.0, seconds))
