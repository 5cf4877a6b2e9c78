"""The rules for a Slurm job's state, pure: what the files say and what Slurm says in, verdict out.

A checked marker outweighs Slurm; Slurm's COMPLETED without one is no proof; and where Slurm does not answer, only what
the worker itself has written down counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkuslurm.read.rules import BROKEN, CANCELLED_BEFORE, ENDED
from pkuslurm.slurm.parse import LAUNCH_FAILED, Row

# In words, where Slurm's own say little to somebody who is new to it.
WAITING = {
    "Priority": "others are before it in the queue",
    "Resources": "waiting for free nodes",
    "Dependency": "waiting for the job before it",
    "JobHeldUser": "held until the whole chain is submitted; `pkuslurm retry` goes on",
    LAUNCH_FAILED: "its node could not start it, and Slurm holds it; `pkuslurm retry` goes on",
    "BeginTime": "Slurm starts it again soon",
    "PartitionTimeLimit": "cluster.time is more than the partition allows: it will never start; cancel it",
    "PartitionNodeLimit": "more nodes than the partition has: it will never start; cancel it",
    "PartitionConfig": "the partition does not allow what it asks for: it will never start; cancel it",
    "QOSMaxWallDurationPerJobLimit": "cluster.time is more than its QOS allows: it will never start; cancel it",
    "ReqNodeNotAvail": "a node that it asks for is down or reserved",
}
ENDS = {
    "TIMEOUT": "its time limit ran out; `pkuslurm retry` goes on, or give it more by cluster.time",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "a node's memory ran out; ask for more by cluster.mem",
    "PREEMPTED": "it was preempted by a job of higher priority",
}


@dataclass(frozen=True)
class SlurmEvidence:
    """All that is known of one Slurm job.

    ``row``: what Slurm says, None: nothing; then ``asked`` tells whether Slurm has answered at all, and ``problem``
    why it has not. The rest is as in ``rules.Evidence``.
    """

    job_id: str | None
    row: Row | None = None
    asked: bool = False
    problem: str = ""
    seen: str | None = None
    reason: str | None = None
    attempt: int = 1
    marked: int | None = None
    doubt: str = ""
    cancelled: bool = False
    parents: tuple[tuple[str, str], ...] = ()
    packed: bool = False  # one Slurm job for the whole chain: that it runs says nothing of this one
    script: str = "logs/.slurm"  # where Slurm's and the job script's words are


def job_state(evidence: SlurmEvidence) -> tuple[str, str | None]:
    """State and reason of one Slurm job."""
    if evidence.marked is not None and evidence.marked >= evidence.attempt:
        return "COMPLETED", None
    if evidence.job_id is None:
        return _before(evidence) or ("PENDING", "not submitted yet; `pkuslurm retry` goes on")
    row = evidence.row
    if row is None:
        return _without_slurm(evidence)
    if evidence.packed and evidence.seen is None and (verdict := _packed(evidence, row)) is not None:
        return verdict
    if row.state == "PENDING":
        if "DependencyNeverSatisfied" in row.reason:
            return _before(evidence) or ("SKIPPED", "the job before it did not complete")
        # where Slurm leaves an orphan in the queue, what comes after that one waits for ever
        if row.reason.startswith("Dependency") and any(state == "SKIPPED" for _, state in evidence.parents):
            return _before(evidence) or ("SKIPPED", "the job before it did not complete")
        if row.reason.startswith("Dependency") and evidence.parents and _complete(evidence):
            # for a moment; or for ever, where Slurm has not heard of that end, and wants to start that one again
            return "PENDING", "Dependency: the job before it is complete; if it does not start soon: `pkuslurm retry`"
        return "PENDING", _waiting(row)
    if row.state == "COMPLETED":
        return "FAILED", f"no proof that it is complete: {evidence.doubt}"
    if row.state == "CANCELLED":
        return _cancelled(evidence, row)
    if row.state == "FAILED":
        if evidence.seen == "SKIPPED":
            return "SKIPPED", evidence.reason
        if evidence.seen in ("TIMEOUT", "NODE_FAIL"):  # stopped, and nobody there could have it started again
            return evidence.seen, evidence.reason
        code = "" if row.exit_code is None else f" (exit code {row.exit_code})"
        if evidence.seen == "CANCELLED":  # its words are "got signal 15", which srun sends on after another's death
            return (
                "FAILED",
                f"not cancelled: its worker on another node, or srun, was killed{code}; see {evidence.script}",
            )
        silent = f"its job ended before the worker could say why{code}; see {evidence.script}"
        return "FAILED", evidence.reason or silent
    if row.state in ENDS:
        return row.state, ENDS[row.state]
    if row.state in ("RUNNING", "REQUEUED"):
        return row.state, None
    return "UNKNOWN", f"Slurm says {row.said}"


def _complete(evidence: SlurmEvidence) -> bool:
    return all(state == "COMPLETED" for _, state in evidence.parents)


def _before(evidence: SlurmEvidence) -> tuple[str, str] | None:
    """What became of a job that never ran."""
    if evidence.cancelled or any(state == "CANCELLED" for _, state in evidence.parents):
        return "CANCELLED", CANCELLED_BEFORE
    for kind, state in evidence.parents:
        if state in BROKEN or state in ("SKIPPED", "PREEMPTED"):
            return "SKIPPED", f"{kind} did not complete"
    return None


def _packed(evidence: SlurmEvidence, row: Row) -> tuple[str, str] | None:
    """Of a job in a common allocation that has not begun: only the ones before it are told by Slurm."""
    if (verdict := _before(evidence)) is not None:
        return verdict
    if row.state == "RUNNING" and any(state != "COMPLETED" for _, state in evidence.parents):
        return "PENDING", "waiting for the job before it"
    return None


def _cancelled(evidence: SlurmEvidence, row: Row) -> tuple[str, str | None]:
    if evidence.seen == "SKIPPED":
        return "SKIPPED", evidence.reason
    if evidence.seen is None and (row.orphaned or evidence.cancelled) and (verdict := _before(evidence)) is not None:
        return verdict
    by = row.said.partition(" by ")[2]
    if evidence.seen == "REQUEUED":  # of its last attempt; it was cancelled before the next
        return "CANCELLED", "cancelled" + (f" by user {by}" if by else "")
    return "CANCELLED", evidence.reason or ("cancelled" + (f" by user {by}" if by else ""))


def _without_slurm(evidence: SlurmEvidence) -> tuple[str, str | None]:
    if evidence.seen in ENDED and evidence.seen != "COMPLETED":
        return evidence.seen, evidence.reason
    if not evidence.asked:
        return "UNKNOWN", f"Slurm does not answer ({evidence.problem})"
    if evidence.seen == "COMPLETED":
        return "FAILED", f"no proof that it is complete: {evidence.doubt}"
    if evidence.seen is None and (verdict := _before(evidence)) is not None:
        return verdict
    lost = f"Slurm no longer knows job {evidence.job_id}, and its files do not say how it ended"
    return "UNKNOWN", f"{lost}; `pkuslurm retry` sends it again"


def _waiting(row: Row) -> str | None:
    first = row.reason.split(",")[0].strip()
    if not first:
        return None
    words = WAITING.get(first)
    text = f"{first}: {words}" if words else row.reason
    return f"{text}; expected to start {row.started[:16].replace('T', ' ')}" if row.started and not row.held else text
