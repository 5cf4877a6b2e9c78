"""sweep.keep_merged: what is not kept goes, a complete point stays complete, nothing goes that could not come again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pkuslurm import cli, keep, prune
from pkuslurm.errors import PkuslurmError
from pkuslurm.read import sweep
from pkuslurm.rundir import RunDir, write_text
from pkuslurm.sweepdir import SweepDir
from tests.read import fake_run
from tests.read.fake_run import complete, edit, mark, state
from tests.read.fake_sweep import fail, finish, make, only

POINTS = [{"train.learning_rate": rate} for rate in ("1e-5", "5e-5", "1e-4", "1e-3")]


@pytest.fixture
def home(weird: Path, monkeypatch: pytest.MonkeyPatch) -> SweepDir:
    """Three points complete, point 1 the best; one that failed in merge, and left half a model."""
    monkeypatch.setenv("HOME", str(weird))
    monkeypatch.setenv("XDG_STATE_HOME", str(weird / "state"))
    made = make(weird / "runs", POINTS)
    for n, evaluated in ((0, 0.9), (1, 0.3), (3, 0.6)):
        finish(made.point(n), loss=0.1, evaluated=evaluated)
    fail(made.point(2), "out of memory")
    write_text(made.point(2).merged / "model.safetensors", "half")
    return made


def kept(home: SweepDir) -> list[int]:
    return [n for n in range(len(POINTS)) if home.point(n).merged.is_dir()]


def look(home: SweepDir) -> sweep.SweepStatus:
    return sweep.read(home.path)


def test_all_but_the_best_go_and_their_points_stay_complete(home: SweepDir) -> None:
    before = [run.state for run in look(home).runs]
    told = keep.keep_merged(look(home))
    assert kept(home) == [1, 2], "what is not complete is left alone"
    assert [run.state for run in look(home).runs] == before == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    merge = look(home).runs[0].job("merge")
    assert merge is not None and "merged model pruned" in (merge.reason or "")
    assert len(told) == 1 and "2 merged models removed" in told[0] and f"kept: {home.sweep_id}/1" in told[0]
    assert [row.n for row in keep.leaderboard.rows(look(home))] == [1, 3, 0, 2], "the ranks are as before"
    assert keep.keep_merged(look(home)) == [], "and again there is nothing to do"


def test_none_and_all(home: SweepDir) -> None:
    edit(home.sweep_json, keep_merged="all")
    assert keep.keep_merged(look(home)) == [] and kept(home) == [0, 1, 2, 3]
    edit(home.sweep_json, keep_merged="none")
    assert "3 merged models removed" in keep.keep_merged(look(home))[0] and kept(home) == [2]
    assert home.point(1).adapter.is_dir() and home.point(1).answers.is_file()


@pytest.mark.parametrize("which", ["best", "none"])
def test_without_a_rank_all_are_kept_and_it_is_said(home: SweepDir, which: str) -> None:
    edit(home.sweep_json, metric="no_such_thing", keep_merged=which)
    told = keep.keep_merged(look(home))
    assert kept(home) == [0, 1, 2, 3]
    assert len(told) == 1 and "no_such_thing" in told[0] and "all merged models are kept" in told[0]


def test_while_points_are_to_end_nothing_goes(home: SweepDir) -> None:
    edit(home.point(2).run_json, launcher=fake_run.alive())
    state(home.point(2), "train", "RUNNING", **fake_run.alive())
    told = keep.keep_merged(look(home))
    assert kept(home) == [0, 1, 2, 3] and "1 point still to end" in told[0]


def test_what_could_not_be_made_again_stays(home: SweepDir) -> None:
    edit(home.point(0).job("merge"), payload={"base": "/models/gone"})
    told = keep.keep_merged(look(home))
    assert kept(home) == [0, 1, 2]
    assert "1 merged model removed" in told[0]
    assert told[1] == f"sweep.keep_merged=best: not removed: {home.sweep_id}/0: its base /models/gone is not here"


def test_another_users_points_stay(home: SweepDir, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    told = keep.keep_merged(look(home))
    assert kept(home) == [0, 1, 2, 3] and "it belongs to another user" in told[0]


def test_what_was_made_again_is_wanted(home: SweepDir) -> None:
    keep.keep_merged(look(home))
    run = home.point(3)
    complete(run, "merge")
    mark(run, "merge", run.merged / "model.safetensors", attempt=2)
    state(run, "merge", "COMPLETED", attempt=2)
    assert keep.keep_merged(look(home)) == [] and kept(home) == [1, 2, 3]


def test_the_best_folder(home: SweepDir) -> None:
    assert keep.best_folder(look(home)) == home.point(1).merged
    edit(home.sweep_json, keep_merged="none")
    keep.keep_merged(look(home))
    with pytest.raises(PkuslurmError, match=f"`pkuslurm merge {home.sweep_id}/1` makes it again"):
        keep.best_folder(look(home))
    edit(home.sweep_json, metric="no_such_thing")
    with pytest.raises(PkuslurmError, match="no_such_thing"):
        keep.best_folder(look(home))


def test_where_nothing_is_complete_there_is_no_best(weird: Path) -> None:
    home = make(weird, POINTS)
    with pytest.raises(PkuslurmError, match="none of its 4 points is complete"):
        keep.best_folder(look(home))
    finish(home.point(0), loss=0.1)
    only(home.point(0), "prepare", "train")
    home.point(0).merged.rename(weird / "away")
    with pytest.raises(PkuslurmError, match="it has no merged model; what it has trained is in"):
        keep.best_folder(look(home))


def test_prune_leaves_what_points_share(home: SweepDir, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (0, 1):
        write_text(home.point(n).adapter / "checkpoint-30" / "optimizer.pt", "o" * 500)
    assert cli.main(["prune", str(home.path), "--yes", "--json"]) == 0, "of a sweep what is complete"
    found = json.loads(capsys.readouterr().out)
    assert [item["run_id"] for item in found["items"]] == [f"{home.sweep_id}/{n}" for n in (0, 1)]
    assert [item["run_id"] for item in found["kept"]] == [f"{home.sweep_id}/2"]
    assert (home.shared(0).data / "state.json").is_file()
    assert [run.state for run in look(home).runs] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert cli.main(["prune", str(home.point(2).path), "--yes"]) == 2
    assert f"prune {home.sweep_id}/2: it is FAILED" in capsys.readouterr().err


def test_prune_finds_points_by_itself(home: SweepDir) -> None:
    runs = prune.find.runs([home.path.parent])
    assert [RunDir(path).run_id for path in runs] == [f"{home.sweep_id}/{n}" for n in range(4)]
    assert prune.of_runs(runs, 0.0, True)[0] == [
        ("merged model", home.point(n).merged, home.point(n).path) for n in (0, 1, 3)
    ]
