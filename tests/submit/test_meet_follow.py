"""The part of a node that is not node 0, by what node 0's file says."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.read.closing import show_model
from pkuslurm.read.status import RunStatus
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit import local, meet
from pkuslurm.submit.local import Cancel
from pkuslurm.submit.meet_where import Role
from pkuslurm.submit.meeting import Guest
from pkuslurm.worker import beats, processes


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setattr(processes, "become_subreaper", lambda: None)
    monkeypatch.setattr(local, "end_leftovers", lambda: None)
    monkeypatch.setattr(beats, "LOOK_SECONDS", 0.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Guest(
        beats.Watch(tmp_path / "meeting.json"),
        beats.Post(tmp_path / "meeting.x.y.json", {"nonce": "y", "cancel": False}),
        1,
        "x",
    )
    found.post.begin()
    yield found
    found.post.close()


def says(guest: Guest, **said: Any) -> None:
    value = {"nonce": "x", "nodes": 2, "host": "first", "beat": time.monotonic(), **said}
    guest.host.path.write_text(json.dumps(value), encoding="utf-8")
    guest.host.look()


def a_run(folder: Path) -> RunDir:
    run = RunDir(folder / "20260101-000000-x-0000")
    jobs = {kind: {"job_id": "local-1", "first_attempt": 1} for kind in ("train", "merge")}
    document = {"schema_version": 1, "run_id": run.run_id, "executor": "meet", "pipeline": list(jobs), "jobs": jobs}
    write_json(run.run_json, document | {"launcher": {"host": "first", "meeting": "/m", "nonce": "x"}})
    return run


@pytest.mark.parametrize("code", [0, 3, 130])
def test_a_run_that_begins_and_ends_between_two_looks(
    guest: Guest, tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    run = a_run(tmp_path)
    write_json(run.run_json, (read_json(run.run_json) or {}) | {"launcher": None})
    says(guest, state="ended", run=str(run.path), code=code, words="so it was")
    assert meet.follow(guest, Cancel()) == code
    out, err = capfd.readouterr()
    assert out == f"{run.path}\n" and "so it was" in err
    says(guest, state="ended", code=code, words="refused")
    assert meet.follow(guest, Cancel()) == code and "first: refused" in capfd.readouterr().err


def test_while_the_run_is_not_seen_here_ctrl_c_is_heard(
    guest: Guest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    says(guest, state="running", run=str(tmp_path / "not-yet"))

    def first() -> None:
        while not (beats.read(guest.post.path) or {}).get("cancel"):
            time.sleep(0.05)
        says(guest, state="ended", code=130, words=None)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    assert meet.follow(guest, Cancel(signal.SIGINT)) == 130
    thread.join()
    assert capfd.readouterr().err.count("cancelled by Ctrl-C: the run ends on all nodes") == 1


def test_a_silent_node_0_keeps_its_name_in_the_run(guest: Guest, tmp_path: Path) -> None:
    """It may live: whoever wants the run next listens for it."""
    run = a_run(tmp_path)
    says(guest, state="running", run=str(run.path))
    code, words = meet._abandoned(guest, run)
    assert code == 1 and words is not None and f"-m pkuslurm retry {run.path}" in words
    assert [(read_json(run.state(kind)) or {})["state"] for kind in ("train", "merge")] == ["FAILED", "SKIPPED"]
    assert (read_json(run.run_json) or {})["launcher"]["nonce"] == "x"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(PkuslurmError, match="No such file or directory"):
        meet.together(tmp_path / "no" / "no" / "m.json", Role(), 2, (), "again", 5.0, lambda nodes: 0)


def test_the_form_for_a_model_that_was_fine_tuned_whole(tmp_path: Path) -> None:
    run, stream = a_run(tmp_path), io.StringIO()
    run.adapter.mkdir()
    (run.adapter / "config.json").touch()
    now = RunStatus(run.run_id, run.path, "COMPLETED", None, (), document=read_json(run.run_json) or {})
    show_model(run, now, stream)
    assert f"NextChat 挂载点 {run.adapter} " in stream.getvalue()
