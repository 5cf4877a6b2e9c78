"""From a run directory to what is going on: files in, states out. Reads only; torn or missing files never raise."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.read import rules, scheduler
from pkuslurm.read.job import JobStatus, Reader
from pkuslurm.read.values import moment, text, unix, whole
from pkuslurm.rundir import RunDir, read_json, read_jsonl

# of run.json; what a newer pkuslurm writes may mean something else
SCHEMA_VERSION = 1
NEWER = "run.json has schema_version {}: a newer pkuslurm wrote it, this one reads 1"


@dataclass(frozen=True)
class RunStatus:
    """One run. ``document`` is run.json as it stands; ``reason`` says why an UNKNOWN run has no jobs."""

    run_id: str
    path: Path
    state: str
    passed: bool | None
    jobs: tuple[JobStatus, ...]
    created: str | None = None
    name: str | None = None
    reason: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def job(self, kind: str) -> JobStatus | None:
        return next((job for job in self.jobs if job.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "path": str(self.path),
            "state": self.state,
            "passed": self.passed,
            "jobs": [job.to_json() for job in self.jobs],
        }


def read(path: Path) -> RunStatus:
    """What the files of the run at ``path`` prove, and Slurm. Without a readable run.json the state is UNKNOWN."""
    return read_many([path])[0]


def read_many(paths: Sequence[Path]) -> list[RunStatus]:
    """The same for several runs, in their order: Slurm is asked once for all of them, or not at all."""
    host = socket.gethostname()
    readers: list[Reader | str] = [_reader(RunDir(path), host) for path in paths]
    asked = scheduler.ask([job_id for one in readers if isinstance(one, Reader) for job_id in one.open_ids()])
    return [_status(path, one, asked) for path, one in zip(paths, readers, strict=True)]


def _reader(run: RunDir, host: str) -> Reader | str:
    """A reader, or why there can be none."""
    document = read_json(run.run_json)
    if document is None:
        return "run.json is missing or damaged"
    if (schema := whole(document.get("schema_version"))) is not None and schema > SCHEMA_VERSION:
        return NEWER.format(schema)
    return Reader(run, document, host)


def _status(path: Path, reader: Reader | str, asked: scheduler.Asked) -> RunStatus:
    run = RunDir(path)
    if isinstance(reader, str):
        return RunStatus(run.run_id, path, "UNKNOWN", None, (), reason=reader)
    jobs, document = reader.jobs(asked), reader.document
    return RunStatus(
        run_id=reader.run_id,
        path=path,
        state=rules.run_state([(job.state, unix(job.finished)) for job in jobs]),
        passed=passed(run, jobs),
        jobs=tuple(jobs),
        created=moment(document.get("created")),
        name=text(document.get("name")),
        reason=None if jobs else "run.json names no jobs",
        document=document,
    )


def run_state(jobs: Sequence[JobStatus]) -> str:
    """The contract's rule over ``jobs``: UNKNOWN, RUNNING, PENDING, COMPLETED, else what failed first."""
    return rules.run_state([(job.state, unix(job.finished)) for job in jobs])


def last_attempt(path: Path, kind: str) -> int:
    """The number of the last attempt that anything is known of."""
    run = RunDir(path)
    job = read_json(run.job(kind)) or {}
    found = [read_json(file) or {} for file in (run.state(kind), run.done(kind), run.attempt(kind))]
    return max(1, whole(job.get("first_attempt")) or 1, *(whole(value.get("attempt")) or 1 for value in found))


def passed(run: RunDir, jobs: Sequence[JobStatus]) -> bool | None:
    """None until infer is complete, or without an expectation; else whether every expectation was met."""
    if not any(job.kind == "infer" and job.state == "COMPLETED" for job in jobs):
        return None
    known = [row["passed"] for row in read_jsonl(run.answers) if isinstance(row.get("passed"), bool)]
    return all(known) if known else None
