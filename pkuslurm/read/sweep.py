"""A sweep as a whole: what its points and its own jobs are, by one look at the files and one question to Slurm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm import sweepdir
from pkuslurm.read import rules, scheduler
from pkuslurm.read.job import JobStatus
from pkuslurm.read.status import Look, RunStatus
from pkuslurm.read.values import moment, text, unix, whole
from pkuslurm.sweepdir import SweepDir

NEWER = "sweep.json has schema_version {}: a newer pkuslurm wrote it, this one reads 1"
# of a run: nothing of it has failed
FINE = ("COMPLETED", "RUNNING", "REQUEUED", "PREEMPTED", "PENDING")
# in which order states are counted
ORDER = (*FINE, "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "SKIPPED", "UNKNOWN")


@dataclass(frozen=True)
class SweepStatus:
    """``jobs``: its own (each share's prepare, the report); ``runs``: its points, in their order.

    ``document`` is sweep.json with what was submitted (sweepdir.load); ``reason`` says why an UNKNOWN one has no runs.
    """

    sweep_id: str
    path: Path
    state: str
    counts: Mapping[str, int]
    jobs: tuple[JobStatus, ...]
    runs: tuple[RunStatus, ...]
    created: str | None = None
    name: str | None = None
    reason: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shares: tuple[RunStatus, ...] = ()  # what points have in common, each a run of its one job

    def label(self, number: int) -> str:
        """What tells point ``number`` from the others: ``lr=1e-5,ds=mine``."""
        points = self.document.get("points")
        point = points[number] if isinstance(points, list) and number < len(points) else None
        return (text(point.get("label")) if isinstance(point, Mapping) else None) or str(number)

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep_id": self.sweep_id,
            "path": str(self.path),
            "state": self.state,
            "counts": dict(self.counts),
            "jobs": [job.to_json() for job in self.jobs],
            "runs": [run.to_json() for run in self.runs],
        }


def read(path: Path) -> SweepStatus:
    """What the files of the sweep at ``path`` prove, and Slurm. Without a readable sweep.json the state is UNKNOWN."""
    look = Look()
    parts = _parts(path, look)
    return _status(path, parts, look, look.ask())


def read_many(paths: Sequence[Path], look: Look | None = None) -> list[RunStatus | SweepStatus]:
    """Runs and sweeps, in their order: Slurm is asked once for all of them, or not at all."""
    look = look or Look()
    parts = {path: _parts(path, look) for path in paths if sweepdir.is_sweep(path)}
    for path in paths:
        if path not in parts:
            look.at(path)
    asked = look.ask()
    return [_status(path, parts[path], look, asked) if path in parts else look.status(path, asked) for path in paths]


def first_broken(run: RunStatus) -> JobStatus | None:
    """The job that decided that ``run`` did not complete: of those that ended as it did the first."""
    same = [job for job in run.jobs if job.state == run.state]
    return min(same, key=lambda job: unix(job.finished) or float("inf"), default=None)


def ended(run: RunStatus) -> float | None:
    """When it was decided that ``run`` did not complete."""
    job = first_broken(run)
    return None if job is None else unix(job.finished)


@dataclass(frozen=True)
class _Parts:
    """What a sweep.json names. ``problem``: why it cannot be read as one."""

    document: Mapping[str, Any]
    shares: tuple[Path, ...] = ()
    points: tuple[Path, ...] = ()
    problem: str | None = None


def _parts(path: Path, look: Look) -> _Parts:
    home = SweepDir(path)
    document = look.sweep(home)
    if document is None:
        return _Parts({}, problem="sweep.json is missing or damaged")
    if (schema := whole(document.get("schema_version"))) is not None and schema > sweepdir.SCHEMA_VERSION:
        return _Parts(document, problem=NEWER.format(schema))
    points = document.get("points")
    if not isinstance(points, list) or not points:
        return _Parts(document, problem="sweep.json names no points")
    runs = tuple(home.point(number).path for number in range(len(points)))
    shares = sorted({sweepdir.share_of(home.point(number), document) for number in range(len(points))})
    parts = _Parts(document, tuple(home.shared(number).path for number in shares), runs)
    look.add(home.own, document)
    for part in (*parts.shares, *parts.points):
        look.at(part)
    return parts


def _status(path: Path, parts: _Parts, look: Look, asked: scheduler.Asked) -> SweepStatus:
    document = parts.document
    sweep_id = text(document.get("sweep_id")) or path.name
    if parts.problem is not None:
        return SweepStatus(sweep_id, path, "UNKNOWN", {}, (), (), reason=parts.problem, document=document)
    shares = tuple(look.status(share, asked) for share in parts.shares)
    shared = [job for share in shares for job in share.jobs]
    runs = [look.status(point, asked) for point in parts.points]
    own = look.status(path, asked).jobs
    states = [
        *((job.state, unix(job.finished)) for job in shared),
        *((run.state, ended(run)) for run in runs),
        *((job.state, unix(job.finished)) for job in own),
    ]
    counted = Counter(run.state for run in runs)
    return SweepStatus(
        sweep_id=sweep_id,
        path=path,
        state=rules.run_state(states),
        counts={state: counted[state] for state in ORDER if counted[state]},
        jobs=(*shared, *own),
        runs=tuple(runs),
        created=moment(document.get("created")),
        name=text(document.get("name")),
        document=document,
        shares=shares,
    )
