"""One run's jobs: the files and Slurm's word in, a verdict on each out. Torn or missing files never raise."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import living, proof, pruned, rules, script_log, slurm_rules
from pkuslurm.read.rules import Evidence, Said
from pkuslurm.read.scheduler import Asked
from pkuslurm.read.slurm_rules import SlurmEvidence
from pkuslurm.read.values import moment, number, text, unix, whole
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.slurm.parse import ALIVE, Row
from pkuslurm.worker import failures, hostlist

# What a worker has written down as its end. CANCELLED may have been the time limit: Slurm is asked.
TOLD = ("FAILED", "SKIPPED", "TIMEOUT", "NODE_FAIL")
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


class Reader:
    """One look at a run: what all its jobs have in common is asked once.

    ``shared`` reads what a sweep's point has in common with others, its prepare: once for all of them.
    """

    def __init__(self, run: RunDir, document: Mapping[str, Any], host: str, shared: Reader | None = None) -> None:
        self.run = run
        self.document = document
        self.run_id = text(document.get("run_id")) or run.run_id
        self.host = host
        self.launcher = living.launcher(document, host)
        self.shared = shared
        # of a thousand points that wait, each missing file that is asked for is a question to the file server
        self.begun = any(os.path.isdir(run.path / name) for name in ("state", "done"))
        self.pruned = pruned.read(run) if self.begun else {}
        self.on_slurm = document.get("executor") == "slurm"
        jobs = document.get("jobs")
        self.described: dict[str, Any] = jobs if isinstance(jobs, dict) else {}
        # a kind becomes a file name, and the directory may be another user's
        named = {kind: value for kind, value in self.described.items() if _KIND.fullmatch(kind)}
        self.known = {kind: value if isinstance(value, dict) else {} for kind, value in named.items()}
        self.own = [kind for kind in self.known if shared is None or kind not in shared.known]
        self.states = {kind: self._state(kind, self.known[kind]) for kind in self.own}
        self.markers = {kind: self._marker(kind) for kind in self.own}
        self._told: list[JobStatus] | None = None

    def open_ids(self) -> list[str]:
        """The Slurm jobs of which the files alone do not tell how they stand."""
        return [str(self.known[kind]["job_id"]) for kind in self.open_kinds()]

    def open_kinds(self) -> list[str]:
        if not self.on_slurm:
            return []
        return [
            kind
            for kind in self.own
            if self.known[kind].get("job_id")
            and self.marked(kind) is None
            and self.states[kind].get("state") not in TOLD
        ]

    def jobs(self, asked: Asked) -> list[JobStatus]:
        """All of them; what Slurm said (``asked``) is looked at the first time."""
        if self._told is None:
            self._told = self._tell(asked)
        return self._told

    def _tell(self, asked: Asked) -> list[JobStatus]:
        self._again(asked)
        elsewhere = {job.kind: job for job in self.shared.jobs(asked)} if self.shared else {}
        found: list[JobStatus] = []
        for kind, value in self.known.items():
            names = value.get("parents")
            parents = [job for job in found if isinstance(names, list) and job.kind in names]
            found.append(self._job(kind, value, parents, asked) if kind in self.states else elsewhere[kind])
        odd = [kind for kind in self.described if kind not in self.known]
        return found + [JobStatus(kind, None, "UNKNOWN", 1, reason="that is no kind of job") for kind in odd]

    def _again(self, asked: Asked) -> None:
        """What ended after its files were read and before Slurm answered has said its last word by now."""
        for kind in self.open_kinds():
            row = asked.row(text(self.known[kind].get("job_id")), text(self.known[kind].get("key")))
            if row is not None and row.state not in ALIVE:
                self.begun = True
                self.states[kind] = self._state(kind, self.known[kind])
                self.markers[kind] = self._marker(kind)

    def _marker(self, kind: str) -> tuple[dict[str, Any] | None, str]:
        if self._written(kind):
            return proof.marker_of(self.run, self.run_id, kind, self.pruned)
        return None, f"there is no marker done/{kind}.json"

    def _state(self, kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """The state file, unless it is of an attempt before the one that was asked for last."""
        if not self._written(kind):
            return {}
        state = read_json(self.run.state(kind)) or {}
        attempt = whole(state.get("attempt"))
        stale = attempt is not None and attempt < (whole(known.get("first_attempt")) or 1)
        return {} if stale else state

    def marked(self, kind: str) -> int | None:
        """The attempt of the checked marker, if it is not of one before the one that was asked for last."""
        marker, _ = self.markers[kind]
        attempt = None if marker is None else whole(marker.get("attempt"))
        return attempt if attempt is not None and attempt >= self._attempt(kind) else None

    def _attempt(self, kind: str) -> int:
        return whole(self.states[kind].get("attempt")) or whole(self.known[kind].get("first_attempt")) or 1

    def _job(self, kind: str, known: Mapping[str, Any], parents: Sequence[JobStatus], asked: Asked) -> JobStatus:
        state, (marker, doubt) = self.states[kind], self.markers[kind]
        attempt = self._attempt(kind)
        marked = None if marker is None else whole(marker.get("attempt"))
        if marker is not None and marked is None:
            doubt = f"its marker done/{kind}.json names no attempt"
        row = asked.row(text(known.get("job_id")), text(known.get("key"))) if self.on_slurm else None
        family = tuple((job.kind, job.state) for job in parents)
        verdict, reason = self._verdict(kind, known, attempt, marked, doubt, row, asked, family)
        if verdict == "PENDING" and state.get("state") and state.get("job_id") == known.get("job_id"):
            attempt += 1  # it waits for that one
        begun = verdict not in ("PENDING", "SKIPPED")  # of others Slurm tells when they may, or would have
        done = marker if verdict == "COMPLETED" and marker is not None else {}
        if done and (part := pruned.part_of(self.run, kind, done, self.pruned)):
            reason = pruned.WORDS[part]
        return JobStatus(
            kind=kind,
            job_id=text(state.get("job_id")) or text(known.get("job_id")) or text(done.get("job_id")),
            state=verdict,
            attempt=attempt,
            nodes=_hosts(state.get("nodes"), row),
            num_nodes=whole(known.get("num_nodes")) or 1,
            started=moment(state.get("started")) or (row.started if row and begun else None),
            finished=None if verdict in ("RUNNING", "PENDING") else self._finished(kind, done, row),
            exit_code=whole(state.get("exit_code")) if row is None or state else row.exit_code,
            reason=reason,
            progress=progress(self.run, kind) if self._written(kind) else None,
        )

    def _written(self, kind: str) -> bool:
        """Whether there can be a word of a worker."""
        return self.begun or self.run.home(kind) != self.run

    def _finished(self, kind: str, done: Mapping[str, Any], row: Row | None) -> str | None:
        known = moment(self.states[kind].get("finished")) or moment(done.get("finished"))
        return known or (row.finished if row else None)

    def _verdict(
        self,
        kind: str,
        known: Mapping[str, Any],
        attempt: int,
        marked: int | None,
        doubt: str,
        row: Row | None,
        asked: Asked,
        parents: tuple[tuple[str, str], ...],
    ) -> tuple[str, str | None]:
        state = self.states[kind]
        seen, reason = text(state.get("state")), self._reason(kind, attempt, state)
        if self.on_slurm:
            job_id = text(known.get("job_id"))
            failed = row is not None and row.state == "FAILED"
            script = script_log.find(self.run, kind, job_id) if failed else None
            if script and reason is None and (words := script_log.last_words(script)):
                reason = f"{words}; see {script}"
            return slurm_rules.job_state(
                SlurmEvidence(
                    job_id=job_id,
                    row=row,
                    asked=asked.knows(job_id),
                    problem=asked.problem,
                    seen=seen,
                    reason=reason,
                    attempt=attempt,
                    marked=marked,
                    doubt=doubt,
                    cancelled=bool(self.document.get("cancelled")),
                    parents=parents,
                    packed=self._packed(str(known.get("key", ""))),
                    script=str(script or SlurmEvidence.script),
                )
            )
        return rules.job_state(
            Evidence(
                seen=seen,
                attempt=attempt,
                reason=reason,
                damaged=seen is None and self._damaged(kind),
                marked=marked,
                doubt=doubt,
                worker=living.worker(state, self.document, self.launcher, self.host),
                launcher=self.launcher,
                cancelled=bool(self.document.get("cancelled"))
                or any(other.get("state") == "CANCELLED" for other in self.states.values()),
                parents=parents,
            )
        )

    def _packed(self, key: str) -> bool:
        sweep = text(self.document.get("sweep"))
        return key.startswith(tuple(f"{name}-pack" for name in (self.run_id, sweep) if name))

    def _damaged(self, kind: str) -> bool:
        """Whether there is a state file that says nothing. One of an earlier attempt is not damaged."""
        if not self._written(kind):
            return False
        path = self.run.state(kind)
        value = read_json(path)
        if value is not None:
            return text(value.get("state")) is None
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _reason(self, kind: str, attempt: int, state: Mapping[str, Any]) -> str | None:
        """Why it ended: node 0's words, unless they only tell of another's end and that one's own are known."""
        own = text(state.get("reason"))
        if text(state.get("state")) not in (*rules.BROKEN, "RUNNING"):
            return own
        if own is not None and not rules.is_symptom(own):
            return own
        said = [] if own is None else [Said(own, unix(state.get("finished")) or math.inf)]
        first = failures.first(failures.read(self.run, kind, attempt))
        if first is not None:
            said.append(Said(str(first), first.time))
        for rank, other in self._others(kind):
            words = text(other.get("reason"))
            if words and whole(other.get("attempt")) == attempt and other.get("state") in rules.BROKEN:
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


def _hosts(written: object, row: Row | None) -> tuple[str, ...]:
    """In rank order: what the workers wrote, else Slurm's list."""
    if isinstance(written, list) and written:
        return tuple(str(node) for node in written)
    try:
        return tuple(hostlist.expand(row.nodes)) if row and row.nodes else ()
    except PkuslurmError:
        return ()


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
        "step": whole(found.get("step")),
        "total_steps": whole(found.get("total_steps")),
        "loss": number(found.get("loss")),
        "eta_seconds": number(found.get("eta_seconds")),
    }
