"""One question to Slurm: which of its two answers counts."""

from __future__ import annotations

import pytest

from pkuslurm.read import scheduler
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row


def row(state: str) -> dict[str, Row]:
    return {"7": Row("7", "key", state, state)}


@pytest.mark.parametrize(
    ("controller", "accounting", "state", "knows"),
    [
        (Answer({}, True), Answer(row("COMPLETED"), True), "COMPLETED", True),
        (Answer({}, True), Answer(row("RUNNING"), True), None, True),  # its end was lost on the way to the database
        (Answer({}, False, "timed out"), Answer(row("RUNNING"), True), "RUNNING", True),
        (Answer({}, False, "timed out"), Answer({}, False, "refused"), None, False),
        (Answer({}, True), Answer({}, False, "refused"), None, True),
        (Answer(row("RUNNING"), True), Answer(row("COMPLETED"), True), "RUNNING", True),
    ],
)
def test_accounting_tells_how_a_job_ended_never_that_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, controller: Answer, accounting: Answer, state: str | None, knows: bool
) -> None:
    monkeypatch.setattr(commands, "queue", lambda _: controller)
    monkeypatch.setattr(commands, "accounting", lambda _: accounting)
    asked = scheduler.ask(["7"])
    found = asked.row("7", "key")
    assert (None if found is None else found.state) == state
    assert asked.knows("7") is knows
