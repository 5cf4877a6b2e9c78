"""wait=true on Slurm: say what changes until the run has ended. The jobs do not need us."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import status
from pkuslurm.read.changes import stamps
from pkuslurm.read.rules import ENDED
from pkuslurm.read.text import safe
from pkuslurm.rundir import RunDir

# so many looks in a row at which nothing is told, before it is given up: a controller may be away for a while
MOST_UNKNOWN = 20


def follow(run: RunDir, seconds: float) -> int:
    """Until the run has ended: 0, or 1 where a job did not complete. Ctrl-C raises KeyboardInterrupt.

    One question to Slurm every ``seconds``; between them only files are looked at.
    """
    shown: dict[str, tuple[str, str | None]] = {}
    unknown = 0
    while True:
        now = status.read(run.path)
        for job in now.jobs:
            said = (job.state, job.reason)
            if shown.get(job.kind) != said:
                shown[job.kind] = said
                with suppress(OSError):
                    why = f": {safe(job.reason)}" if job.reason else ""
                    print(f"{job.kind:<8} {job.state}{why}", file=sys.stderr, flush=True)
        if all(job.state in ENDED for job in now.jobs):
            return 0 if now.state == "COMPLETED" else 1
        unknown = unknown + 1 if all(job.state in (*ENDED, "UNKNOWN") for job in now.jobs) else 0
        if unknown > MOST_UNKNOWN:
            raise PkuslurmError(f"{run.run_id}: nothing is known of its jobs any more; see `pkuslurm status`")
        _pause(run, seconds)


def _pause(run: RunDir, seconds: float) -> None:
    """Until ``seconds`` have passed, or a marker or a state file shows that something has changed."""
    before = stamps(run)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and stamps(run) == before:
        time.sleep(min(1.0, seconds))
