"""Which runs and sweeps have ended for good, and the files that prove it: what a list of runs may remember."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkuslurm import sweepdir
from pkuslurm.read import pruned
from pkuslurm.read.job import TOLD, Reader
from pkuslurm.read.scheduler import Asked
from pkuslurm.read.status import Look, RunStatus
from pkuslurm.read.sweep import SweepStatus
from pkuslurm.read.values import text
from pkuslurm.rundir import RunDir
from pkuslurm.sweepdir import SweepDir


def evidence(now: RunStatus | SweepStatus, look: Look) -> list[Path] | None:
    """The files that alone decide about ``now``, as ``look`` has seen it, for ever; None where there is more to it."""
    if isinstance(now, RunStatus):
        # a point's state depends on its sweep
        return None if sweepdir.sweep_of(RunDir(now.path)) is not None else _settled([now.path], look)
    files = _settled([now.path, *(run.path for run in (*now.shares, *now.runs))], look) if now.runs else None
    if files is None:
        return None
    home = SweepDir(now.path)
    groups = [home.group(number) for number in range(len(now.document.get("groups") or ()))]
    return [home.sweep_json, home.groups, *groups, *files]


def _settled(paths: Sequence[Path], look: Look) -> list[Path] | None:
    files: list[Path] = []
    for path in paths:
        reader = look.at(path)
        if isinstance(reader, str) or not settled(reader, look.asked):
            return None
        files += evidence_of(reader)
    return files


def settled(reader: Reader, asked: Asked) -> bool:
    """Whether ``evidence_of`` will say the same of all jobs for ever, with no look at Slurm or at a process."""
    told = {job.kind: job.state for job in reader.jobs(asked)}
    return bool(told) and all(_is_settled(reader, kind, told[kind], asked) for kind in reader.own if kind != "serve")


def _is_settled(reader: Reader, kind: str, told: str, asked: Asked) -> bool:
    if reader.marked(kind) is not None:
        return True
    seen = text(reader.states[kind].get("state"))
    if reader.on_slurm:
        return seen in TOLD or text(reader.known[kind].get("job_id")) in asked.forgotten
    # without a word of its own: because of its parents, which have one
    return seen in (*TOLD, "OUT_OF_MEMORY", "CANCELLED") or (seen is None and told == "SKIPPED")


def evidence_of(reader: Reader) -> list[Path]:
    """The files that the states of a run's jobs come from. For those that are not there their folder stands."""
    run = reader.run
    kinds = [kind for kind in reader.own if kind != "serve"]
    own = [file for kind in kinds for file in (run.state(kind), run.done(kind))]
    named = [entry["path"] for kind in kinds for entry in (reader.markers[kind][0] or {}).get("artifacts", ())]
    return [
        run.run_json,
        *(run.path / name for name in ("state", "done")),
        *(file for file in (*own, pruned.record(run)) if file.exists()),
        *(run.path / name for name in named),
    ]
