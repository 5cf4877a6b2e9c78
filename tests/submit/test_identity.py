"""A job id alone is no identity: what is not under its key is let alone, and what is lost is said."""

from __future__ import annotations

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.retry import _orphans
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row
from pkuslurm.submit import identity, refusals

ENTRIES = [{"job_id": "7", "key": "run-prepare"}, {"job_id": "8", "key": "run-train"}, {"job_id": None, "key": "x"}]


def row(job_id: str, name: str, state: str = "PENDING", reason: str = "") -> Row:
    return Row(job_id, name, state, state, reason=reason)


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What scancel is called with, where Slurm has 7 as it should, and 8 is an array of somebody else."""
    rows = [row("7", "run-prepare"), row("8_0", "another"), row("8_1", "another")]
    monkeypatch.setattr(commands, "queue", lambda ids: Answer({one.job_id: one for one in rows}, True))
    done: list[str] = []
    monkeypatch.setattr(commands, "cancel", done.extend)
    return done


def test_only_what_is_under_its_key_is_taken_back(cancelled: list[str]) -> None:
    assert identity.take_back(ENTRIES) and cancelled == ["7"]


def test_what_the_controller_has_forgotten_is_said(cancelled: list[str]) -> None:
    with pytest.raises(PkuslurmError, match="has lost run-train: its controller was started anew"):
        identity.check_there(ENTRIES)
    identity.check_there(ENTRIES[:1])


def test_what_waits_for_a_job_that_is_no_more_is_an_orphan() -> None:
    order = ("prepare", "train", "merge", "infer")
    jobs = {kind: {"asked": "then", "parents": order[at - 1 : at] if at else ()} for at, kind in enumerate(order)}
    there = {kind: row(str(at), kind) for at, kind in enumerate(order)}
    assert _orphans(jobs, order[1:], there, ()) == []
    del there["train"]
    assert _orphans(jobs, order[1:], there, ()) == ["merge", "infer"]
    jobs["train"]["asked"] = ""  # never submitted: what waits for it cannot be there, or is another matter
    assert _orphans(jobs, order[1:], there, ()) == []


def test_a_parent_that_is_no_more_is_no_refusal() -> None:
    """A refusal takes the whole run back; this one can be gone on with."""
    assert refusals.parent_gone("sbatch: error: Batch job submission failed: Job dependency problem")
    assert not refusals.parent_gone("sbatch: error: Batch job submission failed: Invalid qos specification")
