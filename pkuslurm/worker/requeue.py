"""What a worker asks of Slurm, on its node: to be started again, and whether it is being preempted.

submitit requeues only functions of its own, so the worker does it. A requeued job keeps its id, and what depends on it
stays attached.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

SECONDS = 30.0


def ours(environ: Mapping[str, str]) -> bool:
    """Whether this worker is what a Slurm job of ours runs. A local run inside somebody's allocation is not."""
    return bool(environ.get("SLURM_JOB_ID")) and not environ.get("PKUSLURM_LAUNCHER_PID")


def job_id(environ: Mapping[str, str]) -> str | None:
    """As scontrol takes it: an array's element by its number in the array."""
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environ.get('SLURM_ARRAY_TASK_ID')}"
    return environ.get("SLURM_JOB_ID")


def requeue(environ: Mapping[str, str]) -> str | None:
    """``scontrol requeue``; why it was refused, or None: Slurm ends this attempt now and starts the next one later."""
    out, problem = _scontrol(environ, "requeue", job_id(environ) or "")
    return None if out is not None or "pending execution" in problem else problem  # Slurm was faster


def preempted(environ: Mapping[str, str]) -> bool:
    """Whether Slurm is about to take the nodes away and starts the job again by itself.

    Only if it still runs when the time of grace is over: a job that ends within it counts as ended by itself.
    """
    out, _ = _scontrol(environ, "show", "job", "-o", job_id(environ) or "")
    return bool(out and re.search(r" JobState=RUNNING ", out) and re.search(r" PreemptTime=\d", out))


def details(environ: Mapping[str, str]) -> str | None:
    """What Slurm has written down about this worker's job, with the indices of its devices on each node."""
    return _scontrol(environ, "show", "job", "-d", job_id(environ) or "")[0] if job_id(environ) else None


def _scontrol(environ: Mapping[str, str], *words: str) -> tuple[str | None, str]:
    program = shutil.which("scontrol", path=environ.get("PATH"))
    if program is None:
        return None, "there is no scontrol on this node"
    try:
        done = subprocess.run(
            [program, *words],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"scontrol {words[0]}: {error}"
    lines = done.stderr.strip().splitlines()
    return (done.stdout, "") if done.returncode == 0 else (None, lines[-1] if lines else f"exit code {done.returncode}")
