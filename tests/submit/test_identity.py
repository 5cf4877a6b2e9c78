"""A job id alone is no identity: what is not under its key is let alone, and what is lost is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.retry import retry
from pkuslurm.rundir import read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row
from pkuslurm.submit import identity, refusals
from pkuslurm.submit.queue import adopt, orphans
from pkuslurm.worker import marker
from tests.submit.test_local import OK, make_run

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
    assert orphans(jobs, order[1:], there, ()) == []
    del there["train"]
    assert orphans(jobs, order[1:], there, ()) == ["merge", "infer"]
    jobs["train"]["asked"] = ""  # never submitted: what waits for it cannot be there, or is another matter
    assert orphans(jobs, order[1:], there, ()) == []


def test_what_ends_while_slurm_is_asked_is_not_lost(
    weird: Path, monkeypatch: pytest.MonkeyPatch, cancelled: list[str]
) -> None:
    run = make_run(weird, infer=OK, report=OK)
    document = read_json(run.run_json) or {}
    for number, entry in enumerate(document["jobs"].values()):
        entry.update(job_id=str(7 + number), asked="then")
    write_json(run.run_json, document | {"executor": "slurm"})

    def queue(ids: Sequence[str]) -> Answer:
        run.answers.write_text("{}\n", encoding="utf-8")
        marker.write(run, run.run_id, "infer", 1, "7", [run.answers])
        return Answer({"8": row("8", f"{run.run_id}-report")}, True)

    monkeypatch.setattr(commands, "queue", queue)
    with pytest.raises(PkuslurmError, match=r"report \(8\) still waits or runs"):
        retry(run)
    assert cancelled == []


def test_what_was_taken_back_before_it_began_is_not_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later submission of the same name is."""
    rows = [row("7", "run-train", "CANCELLED"), row("9_0", "run-train"), row("9_1", "run-train")]
    monkeypatch.setattr(commands, "by_name", lambda name: Answer({one.job_id: one for one in rows}, True))
    jobs = {"train": {"asked": "then", "job_id": None, "key": "run-train"}}
    adopt({"jobs": jobs})
    assert jobs["train"]["job_id"] == "9"
    rows, jobs["train"]["job_id"] = rows[:1], None
    adopt({"jobs": jobs})
    assert jobs["train"]["job_id"] is None


def test_a_parent_that_is_no_more_is_no_refusal() -> None:
    """A refusal takes the whole run back; this one can be gone on with."""
    assert refusals.parent_gone("sbatch: error: Batch job submission failed: Job dependency problem")
    assert not refusals.parent_gone("sbatch: error: Batch job submission failed: Invalid qos specification")
