"""What the screen says while a run works here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm.rundir import write_text
from pkuslurm.screen import Screen, _fact
from tests.read.fake_run import KINDS, edit, make


def test_a_model_in_the_making_is_said_until_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pkuslurm.screen.PLAIN_SECONDS", -1.0)
    run, model = make(tmp_path), tmp_path / "models" / "tiny-1"
    edit(run.job("prepare"), payload={"make": "tiny", "model_path": str(model)})
    screen = Screen(run, KINDS)
    screen.started("prepare")
    words = "making the tiny model, once, about a minute"
    screen.tick("prepare")
    assert f"prepare: {words}; 0 s so far\n" in capsys.readouterr().err
    screen.tick("train")
    write_text(model / "config.json", "{}")
    screen.tick("prepare")
    edit(run.job("prepare"), payload={"make": None, "model_path": "/missing"})
    screen.tick("prepare")
    err = capsys.readouterr().err
    assert words not in err and err.count("prepare: 0 s\n") == 2


@pytest.mark.parametrize(
    ("kind", "result", "words"),
    [
        ("infer", {"prompts": 1, "passed": 1}, "; 1 question, 1 passed"),
        ("infer", {"prompts": 2, "passed": None}, "; 2 questions"),
        ("train", {"global_step": 1}, "; 1 step"),
        ("merge", {"tensors": 1, "equal": 1}, "; 1 of 1 tensor proved"),
        (
            "prepare",
            {"dataset": {"kept": 1, "rows": 1, "tokens": 1}, "steps": {"total": 1, "effective_batch": 8}},
            "; 1 of 1 row, 1 token; 1 step of 8 rows",
        ),
        (
            "prepare",
            {
                "dataset": {"kept": 20, "rows": 20, "blocks": 4, "block": 64, "tokens": 256},
                "steps": {"total": 1, "effective_batch": 8},
            },
            "; 20 of 20 rows packed into 4 blocks of up to 64 tokens, 256 tokens; 1 step of 8 blocks",
        ),
    ],
)
def test_one_is_no_plural(kind: str, result: dict[str, object], words: str) -> None:
    assert _fact(kind, result) == words


def test_what_launch_has_warned_of_is_not_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    edit(run.result("prepare"), dataset={"kept": 1, "rows": 1, "tokens": 1}, warnings=["1 step is few", "1 row is cut"])
    for told in ((), ("warning: 1 step is few",)):
        Screen(run, KINDS, told).ended("prepare", "COMPLETED", None)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("; 1 step is few; 1 row is cut")
    assert second.endswith("1 token; 1 row is cut")
