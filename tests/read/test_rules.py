"""The rules for states, as tables: evidence in, verdict out."""

from __future__ import annotations

from typing import Any

import pytest

from pkuslurm.read.rules import (
    CANCELLED_BEFORE,
    GONE,
    NEVER_STARTED,
    Evidence,
    Said,
    first_reason,
    job_state,
    run_state,
)

DOUBT = "a.bin has 3 bytes, its marker says 4"


@pytest.mark.parametrize(
    ("evidence", "state", "reason"),
    [
        # a checked marker of the latest attempt beats whatever else is said
        ({"seen": "FAILED", "marked": 1}, "COMPLETED", None),
        ({"seen": "CANCELLED", "marked": 1}, "COMPLETED", None),
        ({"seen": "RUNNING", "marked": 1, "worker": True}, "COMPLETED", None),
        ({"seen": None, "marked": 1}, "COMPLETED", None),
        ({"seen": None, "marked": 1, "damaged": True}, "COMPLETED", None),
        ({"seen": "COMPLETED", "marked": 1, "attempt": 2}, "COMPLETED", None),
        # of an earlier attempt it does not hide what the later one says, unless that one merely died
        ({"seen": "FAILED", "marked": 1, "attempt": 2, "reason": "why"}, "FAILED", "why"),
        ({"seen": "RUNNING", "marked": 1, "attempt": 2, "worker": True}, "RUNNING", None),
        ({"seen": "RUNNING", "marked": 1, "attempt": 2, "worker": False}, "COMPLETED", None),
        # without one, nothing is complete
        ({"seen": "COMPLETED", "doubt": DOUBT}, "FAILED", f"no proof that it is complete: {DOUBT}"),
        # running needs a process
        ({"seen": "RUNNING", "worker": True}, "RUNNING", None),
        ({"seen": "RUNNING", "worker": False, "launcher": True}, "RUNNING", None),
        ({"seen": "RUNNING", "worker": False}, "FAILED", GONE),
        ({"seen": "RUNNING", "worker": False, "reason": "rank 1: ValueError"}, "FAILED", "rank 1: ValueError"),
        ({"seen": "RUNNING", "worker": None}, "UNKNOWN", "whether it still runs cannot be told from this machine"),
        ({"seen": "RUNNING", "worker": False, "launcher": None}, "UNKNOWN", ...),
        # what has not started
        ({"launcher": True}, "PENDING", None),
        ({"launcher": None}, "UNKNOWN", ...),
        ({"launcher": False}, "FAILED", NEVER_STARTED),
        ({"launcher": False, "cancelled": True}, "CANCELLED", CANCELLED_BEFORE),
        ({"parents": (("train", "FAILED"),)}, "SKIPPED", "train did not complete"),
        ({"parents": (("train", "TIMEOUT"),), "launcher": True}, "SKIPPED", "train did not complete"),
        ({"parents": (("train", "SKIPPED"),)}, "SKIPPED", "train did not complete"),
        ({"parents": (("train", "CANCELLED"),), "launcher": True}, "CANCELLED", CANCELLED_BEFORE),
        ({"parents": (("train", "COMPLETED"),), "launcher": True}, "PENDING", None),
        ({"seen": "PENDING", "launcher": False}, "FAILED", NEVER_STARTED),
        # what cannot be read
        ({"damaged": True}, "UNKNOWN", "its state file is damaged"),
        ({"seen": "DONE?!"}, "UNKNOWN", "its state file says 'DONE?!'"),
        # words that stand
        ({"seen": "FAILED", "reason": "why"}, "FAILED", "why"),
        ({"seen": "CANCELLED", "reason": "Ctrl-C", "launcher": True}, "CANCELLED", "Ctrl-C"),
        ({"seen": "SKIPPED", "reason": "train did not complete"}, "SKIPPED", "train did not complete"),
        ({"seen": "TIMEOUT"}, "TIMEOUT", None),
    ],
)
def test_a_job(evidence: dict[str, Any], state: str, reason: object) -> None:
    found = job_state(Evidence(**{"seen": None} | evidence))
    assert found[0] == state
    assert reason is ... or found[1] == reason


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        ([], "UNKNOWN"),
        (["COMPLETED", "COMPLETED"], "COMPLETED"),
        (["PENDING", "PENDING"], "PENDING"),
        (["COMPLETED", "PENDING"], "RUNNING"),
        (["COMPLETED", "RUNNING", "PENDING"], "RUNNING"),
        (["FAILED", "RUNNING"], "RUNNING"),
        (["COMPLETED", "FAILED", "SKIPPED"], "FAILED"),
        (["COMPLETED", "CANCELLED", "CANCELLED"], "CANCELLED"),
        (["FAILED", "UNKNOWN"], "UNKNOWN"),
        (["RUNNING", "UNKNOWN"], "UNKNOWN"),
        (["SKIPPED", "SKIPPED"], "UNKNOWN"),
        (["COMPLETED", "SKIPPED"], "UNKNOWN"),
        (["COMPLETED", "???"], "UNKNOWN"),
        (["TIMEOUT", "SKIPPED"], "TIMEOUT"),
    ],
)
def test_a_run(jobs: list[str], state: str) -> None:
    assert run_state([(job, None) for job in jobs]) == state


def test_what_failed_first_decides() -> None:
    assert run_state([("FAILED", 20.0), ("TIMEOUT", 10.0)]) == "TIMEOUT"
    assert run_state([("FAILED", None), ("TIMEOUT", 10.0)]) == "TIMEOUT"
    assert run_state([("FAILED", 10.0), ("TIMEOUT", 10.0)]) == "FAILED"


@pytest.mark.parametrize(
    "symptom",
    [
        "Connection closed by peer [127.0.0.1]:4711",
        "rank 0: RuntimeError: [../gloo/transport/tcp/pair.cc] Connection reset by peer",
        "another node failed",
        "rank 0 was killed by signal 15 (SIGTERM)",
    ],
)
def test_a_symptom_loses_to_a_cause_that_came_later(symptom: str) -> None:
    said = [Said(symptom, 1.0, 0), Said("rank 1: OutOfMemoryError", 2.0, 1), Said("rank 2: later", 3.0, 2)]
    assert first_reason(said) == "rank 1: OutOfMemoryError"
    assert first_reason(said[:1]) == symptom
    assert first_reason([]) is None
