"""From a run directory to what is going on: files in, states out. Reads only; torn or missing files never raise."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm import sweepdir
from pkuslurm.read import rules, scheduler
from pkuslurm.read.job import JobStatus, Reader
from pkuslurm.read.values import moment, text, unix, whole
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.sweepdir import SweepDir

# of run.json; what a newer pkuslurm writes may mean something else
SCHEMA_VERSION = 1
# of a shared job: a point's own state does not depend on it
_HARMLESS = ("COMPLETED", "RUNNING", "PENDING", "REQUEUED", "PREEMPTED")
NEWER = "run.json has schema_version {}: a newer pkuslurm wrote it, this one reads 1"


@dataclass(frozen=True)
class RunStatus:
    """One run. ``document`` is run.json, of a sweep's point with what its sweep knows (sweepdir.document).

    ``reason`` says why an UNKNOWN run has no jobs.
    """

    run_id: str
    path: Path
    state: str
    passed: bool | None
    jobs: tuple[JobStatus, ...]
    created: str | None = None
    name: str | None = None
    reason: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pipeline_jobs(self) -> tuple[JobStatus, ...]:
        """Without ``serve``, which answers with what they have made, and is no part of that."""
        return tuple(job for job in self.jobs if job.kind != "serve")

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
    look = Look()
    for path in paths:
        look.at(path)
    asked = look.ask()
    return [look.status(path, asked) for path in paths]


class Look:
    """One look at many runs: what several have in common (sweep.json, a share's prepare) is read once."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self._sweeps: dict[Path, dict[str, Any] | None] = {}
        self._readers: dict[Path, Reader | str] = {}
        self.asked = scheduler.Asked()

    def sweep(self, home: SweepDir) -> dict[str, Any] | None:
        if home.path not in self._sweeps:
            self._sweeps[home.path] = sweepdir.load(home)
        return self._sweeps[home.path]

    def add(self, run: RunDir, document: Mapping[str, Any]) -> Reader:
        """Look at a run whose description the caller has."""
        reader = self._readers[run.path] = Reader(run, document, self.host)
        return reader

    def at(self, path: Path) -> Reader | str:
        """A reader of the run at ``path``, or why there can be none."""
        if path not in self._readers:
            self._readers[path] = self._reader(RunDir(path))
        return self._readers[path]

    def _reader(self, run: RunDir) -> Reader | str:
        home = sweepdir.sweep_of(run)
        sweep = None if home is None else self.sweep(home)
        document = sweepdir.document(run, sweep)
        if document is None:
            return "run.json is missing or damaged"
        if (schema := whole(document.get("schema_version"))) is not None and schema > SCHEMA_VERSION:
            return NEWER.format(schema)
        shared = None
        if home is not None and sweep is not None and run.is_point:
            share = self.at(home.shared(sweepdir.share_of(run, sweep)).path)
            shared = share if isinstance(share, Reader) else None
        return Reader(run, document, self.host, shared)

    def ask(self) -> scheduler.Asked:
        """One question to Slurm about all that has been looked at."""
        readers = (one for one in self._readers.values() if isinstance(one, Reader))
        self.asked = scheduler.ask([job_id for one in readers for job_id in one.open_ids()])
        return self.asked

    def status(self, path: Path, asked: scheduler.Asked) -> RunStatus:
        return _status(path, self.at(path), asked)


def _status(path: Path, reader: Reader | str, asked: scheduler.Asked) -> RunStatus:
    run = RunDir(path)
    if isinstance(reader, str):
        return RunStatus(run.run_id, path, "UNKNOWN", None, (), reason=reader)
    jobs, document = reader.jobs(asked), reader.document
    return RunStatus(
        run_id=reader.run_id,
        path=path,
        state=run_state(_deciding(jobs, reader)),
        passed=passed(run, jobs),
        jobs=tuple(jobs),
        created=moment(document.get("created")),
        name=text(document.get("name")),
        reason=None if jobs else "run.json names no jobs",
        document=document,
    )


def _deciding(jobs: Sequence[JobStatus], reader: Reader) -> Sequence[JobStatus]:
    """The jobs by which a run's state goes: that what all points share works or is done makes none of them begin, and
    that it is served, or no longer, changes nothing about it."""
    jobs = [job for job in jobs if job.kind != "serve"]
    own = [job for job in jobs if job.kind in reader.own]
    shared = [job.state for job in jobs if job.kind not in reader.own]
    return own if own and all(state in _HARMLESS for state in shared) else jobs


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
