from __future__ import annotations
from pathlib import Path
from typing import Any
import pytest
from pkuslurm.read import sweep
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from tests.read.fake_points import *
from tests.read.test_sweep import Slurm, waiting

def test_what_ends_while_we_look_is_not_taken_for_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(monkeypatch)
    home = make(tmp_path, 3, executor='slurm')
    prepared(home)
    waiting(slurm, 3)
    for k in KINDS[1:]: slurm.says(k, 1, "COMPLETED")
    slurm.says("prepare", 0, "COMPLETED")
    def queue(ids: list[str]) -> Answer:
        for k in KINDS[1:]:
            complete(home.point(1))
        return Answer(slurm.queue, True)
    monkeypatch.setattr(commands, "queue", queue)
    now = sweep.read(home.path)
    print([ (j.kind, j.state, j.reason) for j in now.runs[1].jobs])
    assert now.runs[1].state == "COMPLETED"
