"""What Slurm and a job's own script said, outside of the worker: the files in logs/.slurm."""

from __future__ import annotations

import re
from pathlib import Path

from pkuslurm import sweepdir
from pkuslurm.read.text import safe
from pkuslurm.rundir import RunDir

# srun says it at every start where nodes are not bound to cores, to nobody's use
NOISE = "cluster configuration lacks support for cpu binding"
OURS = "pkuslurm: "
LONGEST = 200
# of a script that printed a lot
TAIL = 1 << 16
_TELLING = re.compile(r"[Ee]rror|Killed|slurmstepd")


def find(run: RunDir, kind: str, job_id: str | None) -> Path | None:
    """The file of job ``kind``, or of the allocation that it shares; absolute."""
    if job_id is None or not re.fullmatch(r"\d+(_\d+)?", job_id):
        return None
    named = (folder / f"{name}-{job_id}.out" for folder in folders(run, kind) for name in (kind, "pack"))
    return next((file for file in named if file.is_file()), None)


def folders(run: RunDir, kind: str) -> list[Path]:
    """Where such files are: the run's own; of what went through an array, the sweep's."""
    home = run.home(kind)
    sweep = sweepdir.sweep_of(run)
    return [one.logs.absolute() / ".slurm" for one in (home, sweep.own if sweep else None) if one is not None]


def last_words(file: Path) -> str | None:
    """The line that tells best why the job ended, harmless and not too long; None: no line tells."""
    lines = [line for line in _lines(file) if NOISE not in line]
    ours = [line.removeprefix(OURS) for line in lines if line.startswith(OURS)]
    told = [line for line in ours or lines if ours or _TELLING.search(line)]
    if not told:
        return None
    words = safe(told[-1])
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def says_nothing(file: Path) -> bool:
    """Whether there is no line in it that anybody would want to read."""
    return file.stat().st_size < TAIL and all(NOISE in line for line in _lines(file))


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
