"""The rules for states, pure: evidence in, verdict out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "SKIPPED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
STATES = (*ENDED, "RUNNING", "PENDING", "UNKNOWN", "PREEMPTED", "REQUEUED")
# Ended, neither well nor because somebody wished it nor because of somebody else's end.
BROKEN = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

GONE = "its process is gone (killed, or the machine restarted)"
NEVER_STARTED = "the launcher is gone before this job started"
CANCELLED_BEFORE = "the run was cancelled before this job started"

# What a node says when *another* one went away: it may be the first to say so, and is not the cause.
_SYMPTOM = re.compile(
    r"connection (closed|reset|refused|aborted)|connection was likely closed|broken pipe|remote process exited"
    r"|received signal|signalexception|sigterm|another node|node \d+ (on \S+ )?(failed|ended|is gone|was cancelled)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Said:
    """What one node gives as its reason; ``moment`` is Unix time, ``rank`` the node's."""

    reason: str
    moment: float
    rank: int = 0


@dataclass(frozen=True)
class Evidence:
    """All that is known of one job.

    ``seen``: the state that its latest attempt wrote, None: it wrote none. ``damaged``: there is a state file and
    it cannot be read. ``marked``: attempt of the checked marker, None: there is none, for which ``doubt`` says why.
    ``worker``, ``launcher``: whether that process lives; None: cannot be known here. ``pending_retry``: what is on
    disk is of an earlier attempt than the one that was asked for last.
    """

    seen: str | None
    attempt: int = 1
    reason: str | None = None
    damaged: bool = False
    marked: int | None = None
    doubt: str = ""
    worker: bool | None = None
    launcher: bool | None = False
    cancelled: bool = False
    parents: tuple[tuple[str, str], ...] = ()


def first_reason(said: Sequence[Said]) -> str | None:
    """Of what the nodes say, the cause: the earliest, but what befalls a node because of another loses."""
    ordered = sorted(said, key=lambda one: (bool(_SYMPTOM.search(one.reason)), one.moment, one.rank))
    return ordered[0].reason if ordered else None


def is_symptom(reason: str) -> bool:
    """Whether ``reason`` only tells of another node's or rank's end."""
    return bool(_SYMPTOM.search(reason))


def job_state(evidence: Evidence) -> tuple[str, str | None]:
    """State and reason of one job. Nothing ends without positive proof."""
    seen = evidence.seen
    if evidence.marked is not None:
        latest = evidence.marked >= evidence.attempt or seen is None or seen == "COMPLETED"
        # a requeued attempt that died does not undo what an earlier one has proved
        if latest or (seen == "RUNNING" and evidence.worker is False and not evidence.launcher):
            return "COMPLETED", None
    if evidence.damaged:
        return "UNKNOWN", "its state file is damaged"
    if seen == "COMPLETED":
        return "FAILED", f"no proof that it is complete: {evidence.doubt}"
    if seen == "RUNNING":
        return _running(evidence)
    if seen is None:
        return _not_started(evidence)
    if seen not in STATES:
        return "UNKNOWN", f"its state file says {seen!r}"
    if seen in ("PENDING", "REQUEUED", "PREEMPTED") and evidence.launcher is False:
        return _not_started(evidence)
    return seen, evidence.reason


def _running(evidence: Evidence) -> tuple[str, str | None]:
    if evidence.worker or evidence.launcher:
        # with a living launcher a dead worker's verdict is being written
        return "RUNNING", None
    if evidence.worker is None or evidence.launcher is None:
        return "UNKNOWN", "whether it still runs cannot be told from this machine"
    return "FAILED", evidence.reason or GONE


def _not_started(evidence: Evidence) -> tuple[str, str | None]:
    for kind, state in evidence.parents:
        if state == "CANCELLED":
            return "CANCELLED", CANCELLED_BEFORE
        if state in BROKEN or state == "SKIPPED":
            return "SKIPPED", f"{kind} did not complete"
    if evidence.launcher:
        return "PENDING", None
    if evidence.launcher is None:
        return "UNKNOWN", "whether its launcher still runs cannot be told from this machine"
    if evidence.cancelled:
        return "CANCELLED", CANCELLED_BEFORE
    return "FAILED", NEVER_STARTED


def run_state(jobs: Sequence[tuple[str, float | None]]) -> str:
    """A run's state from its jobs' states and the Unix times of their ends, in the order of the plan."""
    states = [state for state, _ in jobs if state != "SKIPPED"]
    if not states or "UNKNOWN" in states or any(state not in STATES for state in states):
        return "UNKNOWN"
    waiting = [state for state in states if state not in ENDED and state != "RUNNING"]
    if "RUNNING" in states or 0 < len(waiting) < len(states):
        return "RUNNING"
    if waiting:
        return "PENDING"
    if all(state == "COMPLETED" for state, _ in jobs):
        return "COMPLETED"
    bad = [(end, state) for state, end in jobs if state not in ("COMPLETED", "SKIPPED")]
    if not bad:
        return "UNKNOWN"  # a job was skipped and nothing says for what
    # without a time of its end a job comes last; of equals the first in the plan
    return min(bad, key=lambda pair: float("inf") if pair[0] is None else pair[0])[1]
