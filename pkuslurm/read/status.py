"""From a run directory to what is going on: files in, states out. Reads only; torn or missing files never raise."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pkuslurm.read import proof, rules
from pkuslurm.read.rules import Evidence, Said
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.worker import failures, processes

# launch writes run.json a moment before it says who runs it
BEGINNING_SECONDS = 30.0
_KIND = re.compile(r"[a-z][a-z0-9_]{0,30}")


@dataclass(frozen=True)
class JobStatus:
    """One job; times are ISO 8601 with zone, ``nodes`` are hosts in rank order."""

    kind: str
    job_id: str | None
    state: str
    attempt: int
    nodes: tuple[str, ...] = ()
    num_nodes: int = 1
    started: str | None = None
    finished: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    progress: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "job_id": self.job_id,
            "state": self.state,
            "attempt": self.attempt,
            "nodes": list(self.nodes),
            "num_nodes": self.num_nodes,
            "started": self.started,
            "finished": self.finished,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "progress": dict(self.progress) if self.progress else None,
        }


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
    """What the files of the run at ``path`` prove. Without a readable run.json the state is UNKNOWN."""
    run = RunDir(path)
    document = read_json(run.run_json)
    if document is None:
        return RunStatus(run.run_id, path, "UNKNOWN", None, (), reason="run.json is missing or damaged")
    described = document.get("jobs")
    reader = _Reader(run, document, socket.gethostname())
    jobs = reader.jobs(described if isinstance(described, dict) else {})
    return RunStatus(
        run_id=reader.run_id,
        path=path,
        state=rules.run_state([(job.state, unix(job.finished)) for job in jobs]),
        passed=passed(run, jobs),
        jobs=tuple(jobs),
        created=_moment(document.get("created")),
        name=_text(document.get("name")),
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
    found = [read_json(file) or {} for file in (run.state(kind), run.done(kind))]
    return max(1, _whole(job.get("first_attempt")) or 1, *(_whole(value.get("attempt")) or 1 for value in found))


class _Reader:
    """One look at a run: what all its jobs have in common is asked once."""

    def __init__(self, run: RunDir, document: Mapping[str, Any], host: str) -> None:
        self.run = run
        self.run_id = _text(document.get("run_id")) or run.run_id
        self.host = host
        self.launcher = _launcher_lives(document, host)

    def jobs(self, described: Mapping[str, Any]) -> list[JobStatus]:
        found: list[JobStatus] = []
        # a kind becomes a file name, and the directory may be another user's
        named = {kind: value for kind, value in described.items() if _KIND.fullmatch(kind)}
        known = {kind: value if isinstance(value, dict) else {} for kind, value in named.items()}
        states = {kind: self._state(kind, value) for kind, value in known.items()}
        cancelled = any(state.get("state") == "CANCELLED" for state in states.values())
        for kind, value in known.items():
            names = value.get("parents")
            parents = [job for job in found if isinstance(names, list) and job.kind in names]
            found.append(self._job(kind, value, states[kind], parents, cancelled))
        odd = [kind for kind in described if kind not in known]
        return found + [JobStatus(kind, None, "UNKNOWN", 1, reason="that is no kind of job") for kind in odd]

    def _state(self, kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """The state file, unless it is of an attempt before the one that was asked for last."""
        state = read_json(self.run.state(kind)) or {}
        attempt = _whole(state.get("attempt"))
        stale = attempt is not None and attempt < (_whole(known.get("first_attempt")) or 1)
        return {} if stale else state

    def _job(
        self,
        kind: str,
        known: Mapping[str, Any],
        state: Mapping[str, Any],
        parents: Sequence[JobStatus],
        cancelled: bool,
    ) -> JobStatus:
        first = _whole(known.get("first_attempt")) or 1
        attempt = _whole(state.get("attempt")) or first
        marker, doubt = proof.marker_of(self.run, self.run_id, kind)
        marked = None if marker is None else _whole(marker.get("attempt"))
        if marker is not None and marked is None:
            doubt = f"its marker done/{kind}.json names no attempt"
        seen = _text(state.get("state"))
        verdict, reason = rules.job_state(
            Evidence(
                seen=seen,
                attempt=attempt,
                reason=self._reason(kind, attempt, state),
                damaged=seen is None and self._damaged(kind),
                marked=marked,
                doubt=doubt,
                worker=_lives(state, self.host),
                launcher=self.launcher,
                cancelled=cancelled,
                parents=tuple((job.kind, job.state) for job in parents),
            )
        )
        done = marker if verdict == "COMPLETED" and marker is not None else {}
        nodes = state.get("nodes")
        return JobStatus(
            kind=kind,
            job_id=_text(state.get("job_id")) or _text(known.get("job_id")) or _text(done.get("job_id")),
            state=verdict,
            attempt=attempt,
            nodes=tuple(str(node) for node in nodes) if isinstance(nodes, list) else (),
            num_nodes=_whole(known.get("num_nodes")) or 1,
            started=_moment(state.get("started")),
            finished=None if verdict == "RUNNING" else _moment(state.get("finished")) or _moment(done.get("finished")),
            exit_code=_whole(state.get("exit_code")),
            reason=reason,
            progress=progress(self.run, kind),
        )

    def _damaged(self, kind: str) -> bool:
        """Whether there is a state file that says nothing. One of an earlier attempt is not damaged."""
        path = self.run.state(kind)
        value = read_json(path)
        if value is not None:
            return _text(value.get("state")) is None
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _reason(self, kind: str, attempt: int, state: Mapping[str, Any]) -> str | None:
        """Why it ended: node 0's words, unless they only tell of another's end and that one's own are known."""
        own = _text(state.get("reason"))
        if _text(state.get("state")) not in (*rules.BROKEN, "RUNNING"):
            return own
        if own is not None and not rules.is_symptom(own):
            return own
        said = [] if own is None else [Said(own, unix(state.get("finished")) or math.inf)]
        first = failures.first(failures.read(self.run, kind, attempt))
        if first is not None:
            said.append(Said(str(first), first.time))
        for rank, other in self._others(kind):
            words = _text(other.get("reason"))
            if words and _whole(other.get("attempt")) == attempt and other.get("state") in rules.BROKEN:
                said.append(Said(words, unix(other.get("finished")) or math.inf, rank))
        return rules.first_reason(said)

    def _others(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """The state files of the nodes other than 0."""
        found = []
        for path in self.run.state(kind).parent.glob(f"{kind}.*.json"):
            rank = path.name.split(".")[-2]
            if rank.isdecimal() and (value := read_json(path)):
                found.append((int(rank), value))
        return sorted(found, key=lambda pair: pair[0])


def _lives(process: object, host: str) -> bool | None:
    """Whether the process that ``process`` (host, pid, pid_start) names runs; None where this host cannot know."""
    if not isinstance(process, Mapping) or process.get("host") != host:
        return None
    pid, start = _whole(process.get("pid")), _whole(process.get("pid_start"))
    if pid is None or start is None:
        return None
    return processes.alive(pid, start)


def _launcher_lives(document: Mapping[str, Any], host: str) -> bool | None:
    """Whether the process that runs the jobs is there. It takes its name out of run.json when it has ended."""
    launcher = document.get("launcher")
    if launcher is not None:
        return _lives(launcher, host)
    jobs = document.get("jobs")
    known = jobs.values() if isinstance(jobs, dict) else ()
    if any(isinstance(job, dict) and job.get("job_id") for job in known):
        return False
    age = time.time() - (unix(document.get("created")) or 0.0)
    return age < BEGINNING_SECONDS


def progress(run: RunDir, kind: str) -> dict[str, Any] | None:
    """The contract's four numbers, from the trainer's progress file or, without it, its log."""
    found = read_json(run.progress(kind))
    if found is None and kind == "train":
        last: dict[str, Any] = {}
        for row in read_jsonl(run.adapter / "trainer_log.jsonl"):
            last |= {name: value for name, value in row.items() if value is not None}
        if "current_steps" in last:
            found = {
                "step": last["current_steps"],
                "total_steps": last.get("total_steps"),
                "loss": last.get("loss"),
            }
    if not found:
        return None
    return {
        "step": _whole(found.get("step")),
        "total_steps": _whole(found.get("total_steps")),
        "loss": number(found.get("loss")),
        "eta_seconds": number(found.get("eta_seconds")),
    }


def passed(run: RunDir, jobs: Sequence[JobStatus]) -> bool | None:
    """None until infer is complete, or without an expectation; else whether every expectation was met."""
    if not any(job.kind == "infer" and job.state == "COMPLETED" for job in jobs):
        return None
    known = [row["passed"] for row in read_jsonl(run.answers) if isinstance(row.get("passed"), bool)]
    return all(known) if known else None


def unix(moment: object) -> float | None:
    """Unix time of an ISO 8601 time; None for anything else."""
    try:
        return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def number(value: object) -> float | int | None:
    """A finite number; JSON has no word for others (a loss that became NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _moment(value: object) -> str | None:
    """ISO 8601 with zone: a time that lacks one is taken for this machine's."""
    if not isinstance(value, str) or unix(value) is None:
        return None
    parsed = datetime.fromisoformat(value)
    return value if parsed.tzinfo else parsed.astimezone().isoformat()


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
