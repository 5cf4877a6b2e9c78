"""Everything that the report tells, read from the run directory once; whatever is damaged is as if absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pkuslurm.read import disk, status, values
from pkuslurm.rundir import KINDS, RunDir, read_json, read_jsonl

Json = Mapping[str, Any]
# (step, loss) or (step, eval loss)
Point = tuple[int, float]


@dataclass(frozen=True)
class Facts:
    """One run. ``results`` and ``jobs`` by kind; ``sizes``: bytes by part of the directory, largest first."""

    run: RunDir
    now: status.RunStatus
    state: str
    results: Mapping[str, Json]
    jobs: Mapping[str, Json]
    answers: tuple[Json, ...]
    losses: tuple[Point, ...]
    evals: tuple[Point, ...]
    not_finite: int
    sizes: tuple[tuple[str, int], ...]

    def completed(self, kind: str) -> bool:
        job = self.now.job(kind)
        return job is not None and job.state == "COMPLETED"

    def payload(self, kind: str) -> Json:
        return objekt(self.jobs.get(kind), "payload")

    def result(self, kind: str) -> Json:
        """What the job's payload found out; of an earlier attempt's leftovers nothing is told."""
        return self.results.get(kind, {}) if self.completed(kind) else {}


def gather(run_dir: Path, now: status.RunStatus | None = None) -> Facts:
    """Read it (``now``: how it stands, where that is known). Never raises on damaged or missing files."""
    run = RunDir(run_dir)
    now = now or status.read(run_dir)
    now = replace(now, jobs=now.pipeline_jobs)
    losses, evals, not_finite = curves(run)
    return Facts(
        run=run,
        now=now,
        state=_state(now),
        results={kind: read_json(run.result(kind)) or {} for kind in KINDS},
        jobs={kind: read_json(run.job(kind)) or {} for kind in KINDS},
        answers=tuple(read_jsonl(run.answers)),
        losses=losses,
        evals=evals,
        not_finite=not_finite,
        # its own size is not known before it is written
        sizes=disk.parts(run_dir, without=("report.html", "report-export.html")),
    )


def objekt(value: object, *names: str) -> Json:
    """The object at ``names`` below ``value``; empty if anything on the way is something else."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number(value: object, *names: str) -> float | None:
    """The finite number at ``names`` below ``value``."""
    *path, last = names
    return values.number(objekt(value, *path).get(last))


def word(value: object, *names: str) -> str | None:
    """The text at ``names`` below ``value``."""
    *path, last = names
    found = objekt(value, *path).get(last)
    return found if isinstance(found, str) and found else None


def share(value: object, name: str) -> tuple[int, int] | None:
    """``[k, n]``: k of n."""
    found = objekt(value).get(name)
    if not isinstance(found, list) or len(found) != 2 or not all(type(one) is int for one in found):
        return None
    return found[0], found[1]


def _state(now: status.RunStatus) -> str:
    """The run's state without the job that writes this very page."""
    own = now.job("report")
    if own is None or own.state not in ("RUNNING", "PENDING") or len(now.jobs) == 1:
        return now.state
    return status.run_state([job for job in now.jobs if job is not own])


def curves(run: RunDir) -> tuple[tuple[Point, ...], tuple[Point, ...], int]:
    """The curves by step; where a resumed training went over a step again, its last word counts."""
    losses: dict[int, float] = {}
    evals: dict[int, float] = {}
    odd: set[int] = set()
    for row in read_jsonl(run.adapter / "trainer_log.jsonl"):
        step = row.get("current_steps")
        if type(step) is not int:
            continue
        for name, curve in (("loss", losses), ("eval_loss", evals)):
            value = row.get(name)
            if (finite := values.number(value)) is not None:
                curve[step] = float(finite)
                odd.discard(step)
            elif isinstance(value, float):
                odd.add(step)
    return tuple(sorted(losses.items())), tuple(sorted(evals.items())), len(odd)
