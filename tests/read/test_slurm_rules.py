"""What is said of a Slurm job: the files, Slurm, and what of both counts."""

from __future__ import annotations

import pytest

from pkuslurm.read.slurm_rules import SlurmEvidence, job_state
from pkuslurm.slurm.parse import Row


def row(
    state: str, reason: str = "", started: str | None = "2026-11-24T09:00:00+08:00", said: str = "", user: str = ""
) -> Row:
    return Row("7", "key", state, said or state, started, None, "", reason, None, user)


WORKED = {"seen": "FAILED", "reason": "RuntimeError: boom"}
KNOWN = {"job_id": "7", "asked": True}
FAILED_PARENT = {"parents": (("train", "FAILED"),)}

CASES = {
    "a checked marker outweighs Slurm": ({**KNOWN, "row": row("FAILED"), "marked": 1}, "COMPLETED", None),
    "a marker of an earlier attempt does not": (
        {**KNOWN, "row": row("RUNNING"), "marked": 1, "attempt": 2},
        "RUNNING",
        None,
    ),
    "completed without a marker": ({**KNOWN, "row": row("COMPLETED"), "doubt": "no marker"}, "FAILED", "no proof"),
    "pending in words": ({**KNOWN, "row": row("PENDING", "Resources", None)}, "PENDING", "waiting for free nodes"),
    "expected start": ({**KNOWN, "row": row("PENDING", "Priority")}, "PENDING", "expected to start 2026-11-24 09:00"),
    "a reason that is not in the table": ({**KNOWN, "row": row("PENDING", "Licenses", None)}, "PENDING", "Licenses"),
    "it will never start": ({**KNOWN, "row": row("PENDING", "PartitionTimeLimit", None)}, "PENDING", "never start"),
    "the worker's reason": ({**KNOWN, "row": row("FAILED"), **WORKED}, "FAILED", "boom"),
    "no worker ever spoke": ({**KNOWN, "row": row("FAILED")}, "FAILED", "before the worker could say"),
    "the worker skipped it": ({**KNOWN, "row": row("FAILED"), "seen": "SKIPPED", "reason": "r"}, "SKIPPED", "r"),
    "the time limit, where the worker saw a TERM": (
        {**KNOWN, "row": row("TIMEOUT"), "seen": "CANCELLED", "reason": "got signal 15"},
        *("TIMEOUT", "time limit"),
    ),
    "killed for its dependency": (
        {**KNOWN, "row": row("CANCELLED", "DependencyNeverSatisfied", None), **FAILED_PARENT},
        *("SKIPPED", "train did not complete"),
    ),
    "not yet killed for its dependency": (
        {**KNOWN, "row": row("PENDING", "DependencyNeverSatisfied", None), **FAILED_PARENT},
        *("SKIPPED", "train did not complete"),
    ),
    "after an orphan that Slurm leaves in the queue": (
        {**KNOWN, "row": row("PENDING", "Dependency", None), "parents": (("merge", "SKIPPED"),)},
        *("SKIPPED", "merge did not complete"),
    ),
    "its parent has failed, and Slurm may start that one again": (
        {**KNOWN, "row": row("PENDING", "Dependency", None), **FAILED_PARENT},
        *("PENDING", "waiting for the job before it"),
    ),
    "its parent is complete, and Slurm does not know it": (
        {**KNOWN, "row": row("PENDING", "Dependency", None), "parents": (("train", "COMPLETED"),)},
        *("PENDING", "is complete; if it does not start soon: `pkuslurm retry`"),
    ),
    "a node that could not start it": (
        {**KNOWN, "row": row("PENDING", "launch failed requeued held")},
        *("PENDING", "could not start it, and Slurm holds it; `pkuslurm retry` goes on"),
    ),
    "cancelled before it started": (
        {**KNOWN, "row": row("CANCELLED", "", None, "CANCELLED by 1000"), "cancelled": True},
        *("CANCELLED", "before this job started"),
    ),
    "cancelled while it ran": (
        {**KNOWN, "row": row("CANCELLED", said="CANCELLED by 1000")},
        "CANCELLED",
        "by user 1000",
    ),
    "cancelled by hand while it waited, before its parent failed": (
        {**KNOWN, "row": row("CANCELLED", "Dependency", user="alice"), **FAILED_PARENT},
        *("CANCELLED", "cancelled"),
    ),
    "the same in accounting": (
        {**KNOWN, "row": row("CANCELLED", "Dependency", None, "CANCELLED by 1000"), **FAILED_PARENT},
        *("CANCELLED", "by user 1000"),
    ),
    "ended because another worker was killed": (
        {**KNOWN, "row": row("FAILED"), "seen": "CANCELLED", "reason": "cancelled: got signal 15"},
        *("FAILED", "its worker on another node"),
    ),
    "not submitted": ({"job_id": None}, "PENDING", "not submitted"),
    "not submitted, its parent failed": ({"job_id": None, **FAILED_PARENT}, "SKIPPED", "train did not complete"),
    "Slurm does not answer": ({"job_id": "7", "problem": "timed out"}, "UNKNOWN", "does not answer (timed out)"),
    "Slurm does not answer, the worker has spoken": ({"job_id": "7", **WORKED}, "FAILED", "boom"),
    "a squeue that fails is no death": ({"job_id": "7", "seen": "RUNNING"}, "UNKNOWN", "does not answer"),
    "Slurm has forgotten it, the files not": ({**KNOWN, **WORKED}, "FAILED", "boom"),
    "forgotten, never started, its parent failed": ({**KNOWN, **FAILED_PARENT}, "SKIPPED", "train did not complete"),
    "forgotten in the middle": ({**KNOWN, "seen": "RUNNING"}, "UNKNOWN", "no longer knows job 7"),
    "forgotten without a trace": (KNOWN, "UNKNOWN", "no longer knows job 7"),
    "a state that we do not know": ({**KNOWN, "row": row("LAUNCH_FAILED")}, "UNKNOWN", "LAUNCH_FAILED"),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    given, state, words = CASES[name]
    verdict, reason = job_state(SlurmEvidence(**given))
    assert verdict == state
    assert (reason is None) if words is None else (reason is not None and words in reason), reason
