"""Reading a sweep: its points, what they share, its own jobs; on one screen at any size."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import find, logs, present, present_sweep, script_log, status, sweep
from pkuslurm.read.text import width
from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row
from pkuslurm.sweepdir import SweepDir
from tests.read import fake_points, fake_run
from tests.read.fake_points import IDS, KINDS, REPORT, SWEEP_ID, complete, key, make, prepared, state
from tests.read.fake_run import edit


class Slurm:
    """Its two answers, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: dict[str, Row] = {}
        self.accounting: dict[str, Row] = {}
        self.asked: list[tuple[str, list[str]]] = []
        monkeypatch.setattr(commands, "_run", self._forbidden)
        monkeypatch.setattr(commands, "queue", lambda ids: self._answer("queue", ids))
        monkeypatch.setattr(commands, "accounting", lambda ids: self._answer("accounting", ids))

    def _forbidden(self, *_: Any) -> None:
        raise AssertionError("another question")

    def _answer(self, name: str, ids: list[str]) -> Answer:
        if ids:
            self.asked.append((name, ids))
        return Answer(self.queue if name == "queue" else self.accounting, True)

    def says(self, kind: str, number: int | None, word: str, reason: str = "", **more: Any) -> None:
        job_id = REPORT if number is None else f"{IDS[kind]}_{number}"
        self.queue[job_id] = Row(job_id, key(kind), word, word, reason=reason, **more)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(monkeypatch)


def waiting(slurm: Slurm, count: int) -> None:
    """All of it is in the queue."""
    slurm.says("prepare", 0, "PENDING", "Priority")
    slurm.says("report", None, "PENDING", "Dependency")
    for number in range(count):
        for kind in KINDS[1:]:
            slurm.says(kind, number, "PENDING", "Dependency")


def screen(now: sweep.SweepStatus) -> str:
    out = io.StringIO()
    present_sweep.show_sweep(now, out)
    return out.getvalue()


def test_nothing_has_begun(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 3, "slurm")
    waiting(slurm, 3)
    now = sweep.read(home.path)
    assert (now.state, now.counts) == ("PENDING", {"PENDING": 3})
    assert [(job.kind, job.job_id, job.state) for job in now.jobs] == [
        ("prepare", "100_0", "PENDING"),
        ("report", REPORT, "PENDING"),
    ]
    assert [job.job_id for job in now.runs[2].jobs] == ["100_0", "101_2", "102_2", "103_2"]
    assert len(slurm.asked) == 1 and len(set(slurm.asked[0][1])) == len(slurm.asked[0][1]) == 11


def test_the_shape_is_the_contracts(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 2, "slurm")
    waiting(slurm, 2)
    found = sweep.read(home.path).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["sweep_id", "path", "state", "counts", "jobs", "runs"]
    assert (found["sweep_id"], found["path"], found["counts"]) == (SWEEP_ID, str(home.path), {"PENDING": 2})
    assert [run["run_id"] for run in found["runs"]] == [f"{SWEEP_ID}/0", f"{SWEEP_ID}/1"]
    assert [list(run) for run in found["runs"]] == [["run_id", "path", "state", "passed", "jobs"]] * 2
    assert found["runs"][1] == status.read(home.point(1).path).to_json()


def test_what_all_share_makes_no_point_begin(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 3, "slurm")
    waiting(slurm, 3)
    fake_points.state(home.shared(0), "prepare", "RUNNING")
    slurm.says("prepare", 0, "RUNNING")
    now = sweep.read(home.path)
    assert (now.state, now.counts) == ("RUNNING", {"PENDING": 3})
    prepared(home)
    state(home.point(1), "train", "RUNNING", job_id="101_1")
    slurm.says("train", 1, "RUNNING")
    now = sweep.read(home.path)
    assert (now.state, now.counts) == ("RUNNING", {"RUNNING": 1, "PENDING": 2})
    assert [job.state for job in now.runs[0].jobs] == ["COMPLETED", "PENDING", "PENDING", "PENDING"]


def test_one_point_fails_in_train_and_costs_only_its_own(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 3, "slurm")
    prepared(home)
    for number in (0, 2):
        complete(home.point(number))
    state(home.point(1), "train", "FAILED", reason="rank 0: ValueError: no", job_id="101_1")
    slurm.says("train", 1, "FAILED")
    for kind in ("merge", "infer"):
        slurm.says(kind, 1, "CANCELLED", "DependencyNeverSatisfied", user="a")
    slurm.says("report", None, "RUNNING")
    now = sweep.read(home.path)
    assert (now.state, now.counts) == ("RUNNING", {"COMPLETED": 2, "FAILED": 1})
    assert [job.state for job in now.runs[1].jobs] == ["COMPLETED", "FAILED", "SKIPPED", "SKIPPED"]
    _report(home)
    now = sweep.read(home.path)
    assert now.state == "FAILED"
    # squeue is asked for what is open alone, and never again for what has ended
    assert [name for name, _ in slurm.asked] == ["queue", "queue"]
    assert slurm.asked[-1][1] == ["102_1", "103_1"]


def test_what_ends_while_it_is_looked_at_is_not_taken_for_failed(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are read first, and Slurm says that it has ended."""
    home = make(tmp_path, 3, "slurm")
    prepared(home)
    waiting(slurm, 3)
    for kind in KINDS[1:]:
        slurm.says(kind, 1, "COMPLETED")

    def asked(ids: list[str]) -> Answer:
        complete(home.point(1))
        return Answer(slurm.queue, True)

    monkeypatch.setattr(commands, "queue", asked)
    now = sweep.read(home.path)
    assert [run.state for run in now.runs] == ["PENDING", "COMPLETED", "PENDING"]


def _report(home: SweepDir) -> None:
    write_text(home.own.report, "<html></html>")
    fake_run.mark(home.own, "report", home.own.report)
    fake_run.state(home.own, "report", "COMPLETED")


def test_all_complete_and_slurm_is_not_asked(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 2, "slurm")
    prepared(home)
    complete(home.point(0))
    complete(home.point(1), passed=False)
    _report(home)
    now = sweep.read(home.path)
    assert (now.state, now.counts, slurm.asked) == ("COMPLETED", {"COMPLETED": 2}, [])
    assert [run.passed for run in now.runs] == [True, False]
    assert "; an expectation was NOT met in 1\n" in screen(now)


def test_a_share_that_fails_takes_its_own_points_along(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 4, "slurm", shares=2)
    prepared(home, 0)
    fake_run.state(home.shared(1), "prepare", "FAILED", reason="dataset.path=/x: no rows", job_id="100_1")
    waiting(slurm, 4)
    for number in (1, 3):
        for kind in KINDS[1:]:
            slurm.says(kind, number, "CANCELLED", "DependencyNeverSatisfied", user="a")
    now = sweep.read(home.path)
    assert now.counts == {"PENDING": 2, "FAILED": 2}
    assert [job.state for job in now.runs[3].jobs] == ["FAILED", "SKIPPED", "SKIPPED", "SKIPPED"]
    assert [job.job_id for job in now.jobs if job.kind == "prepare"] == ["local-1", "100_1"]


def test_accounting_is_asked_for_what_is_gone_and_corrects_nothing_else(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 2, "slurm")
    prepared(home)
    waiting(slurm, 2)
    slurm.says("train", 0, "RUNNING")
    state(home.point(0), "train", "RUNNING", job_id="101_0")
    state(home.point(1), "train", "RUNNING", job_id="101_1")
    del slurm.queue["101_1"]
    for number in (0, 1):
        slurm.accounting[f"101_{number}"] = Row(f"101_{number}", key("train"), "TIMEOUT", "TIMEOUT")
    now = sweep.read(home.path)
    assert slurm.asked[-1] == ("accounting", ["101_1"])
    assert [run.jobs[1].state for run in now.runs] == ["RUNNING", "TIMEOUT"]


@pytest.mark.parametrize(
    ("launcher", "cancelled", "state"),
    [("alive", None, "PENDING"), ("gone", None, "FAILED"), (None, "x", "CANCELLED"), ("gone", "x", "CANCELLED")],
)
def test_a_local_point_that_never_started(
    tmp_path: Path, launcher: str | None, cancelled: str | None, state: str
) -> None:
    process = {"alive": fake_run.alive(), "gone": fake_run.gone(), None: None}[launcher]
    home = make(tmp_path, 2, launcher=process, cancelled=cancelled)
    prepared(home)
    complete(home.point(0))
    now = sweep.read(home.path)
    assert [run.state for run in now.runs] == ["COMPLETED", state]
    assert status.read(home.point(1).path).state == state
    assert now.state == ("RUNNING" if state == "PENDING" else state)


def test_a_cancelled_sweep_that_is_new(tmp_path: Path) -> None:
    created = fake_run.datetime.now().astimezone().isoformat()
    home = make(tmp_path, 2, created=created, cancelled=created)
    assert sweep.read(home.path).counts == {"CANCELLED": 2}


def test_a_point_that_waits_costs_few_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make(tmp_path, 5, launcher=fake_run.alive())
    read: list[Path] = []
    original = os.open

    def counted(path: Any, *args: Any, **more: Any) -> int:
        read.append(Path(path))
        return original(path, *args, **more)

    monkeypatch.setattr(os, "open", counted)
    sweep.read(home.path)
    assert {path.name for path in read if path.parent == home.point(4).path} == {"run.json"}
    assert not [path for path in read if home.point(4).path in path.parents and path.name != "run.json"]
    assert sum(path == home.sweep_json for path in read) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"points": 3}', '{"points": []}', '{"schema_version": 9}'])
def test_a_damaged_sweep_json(tmp_path: Path, content: str) -> None:
    home = make(tmp_path, 2)
    home.sweep_json.write_text(content, encoding="utf-8")
    now = sweep.read(home.path)
    assert (now.state, now.runs) == ("UNKNOWN", ()) and now.reason
    json.dumps(now.to_json())
    assert screen(now).startswith(f"{SWEEP_ID}: UNKNOWN ({now.reason})\n")
    with pytest.raises(PkuslurmError, match="has none of its own yet"):
        logs.show_sweep_logs(home.path, io.StringIO())


def test_a_point_that_is_not_there(tmp_path: Path) -> None:
    home = make(tmp_path, 2, launcher=fake_run.alive())
    home.point(1).run_json.unlink()
    now = sweep.read(home.path)
    assert (now.state, now.counts) == ("UNKNOWN", {"PENDING": 1, "UNKNOWN": 1})
    assert "run.json is missing or damaged" in screen(now)


# --- which one is meant


def test_a_sweep_and_its_points_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make(tmp_path, 11)
    old = fake_run.make(tmp_path, "20261123-000000-tiny-0001", created="2026-11-23T00:00:00+08:00")
    assert find.find(None, [tmp_path]) == home.path
    assert find.find("20261124", [tmp_path]) == find.find(str(home.path), []) == home.path
    assert find.find(str(home.sweep_json), []) == home.path
    for name in (f"{SWEEP_ID}/10", "20261124/10", f"{home.path}/10", "20261124/10/", "20261124/010"):
        assert find.find(name, [tmp_path]) == home.point(10).path
    monkeypatch.chdir(home.path)
    assert find.find("3", []) == find.find("./3", []) == home.point(3).path
    assert find.runs([tmp_path]) == [*(home.point(number).path for number in range(11)), old.path]
    find.check(home.path)
    find.check(home.point(3).path)


def test_a_point_by_another_name_is_the_point(tmp_path: Path) -> None:
    home = make(tmp_path, 2)
    prepared(home)
    (tmp_path / "best").symlink_to(home.point(1).path)
    assert find.find(str(tmp_path / "best"), []) == home.point(1).path
    assert find.find(str(home.point(1).path / "shared"), []) == home.shared(0).path


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    home = make(tmp_path, 2)
    old = fake_run.make(tmp_path, "20261123-000000-tiny-0001")
    with pytest.raises(PkuslurmError, match="no point 2; it has 2, from "):
        find.find("20261124/2", [tmp_path])
    with pytest.raises(PkuslurmError, match="is no sweep"):
        find.find(f"{old.path.name}/0", [tmp_path])
    with pytest.raises(PkuslurmError, match="no such run; looked in"):
        find.find("1999/0", [tmp_path])
    edit(home.sweep_json, schema_version=2)
    with pytest.raises(PkuslurmError, match=r"sweep\.json has schema_version 2: a newer pkuslurm.*upgrade"):
        find.check(home.path)
    home.sweep_json.write_text("{", encoding="utf-8")
    with pytest.raises(PkuslurmError, match=r"sweep\.json is damaged"):
        find.check(home.path)


def test_runs_have_a_line_for_a_sweep_and_slurm_one_question(tmp_path: Path, slurm: Slurm) -> None:
    for number, sweep_id in enumerate(("20261124-a", "20261125-b")):
        make(tmp_path, 2, "slurm", sweep_id=sweep_id, created=f"2026-11-2{4 + number}T00:00:00+08:00")
    fake_run.finished(tmp_path, run_id="20261123-c", created="2026-11-23T00:00:00+08:00")
    found = find.list_runs([tmp_path])
    assert [item.run_id for item in found] == ["20261125-b", "20261124-a", "20261123-c"]
    assert [list(item.to_json()) for item in found] == [["run_id", "path", "created", "state", "name"]] * 3
    assert [name for name, _ in slurm.asked] == ["queue", "accounting"]
    out = io.StringIO()
    present.show_runs(found, out)
    assert "sweep of 2" in out.getvalue() and "3 runs, " in out.getvalue()


# --- for people


def failing(home: SweepDir, numbers: range, reason: str) -> None:
    for number in numbers:
        state(home.point(number), "train", "FAILED", reason=reason.format(number, path=home.point(number).path))


def big(root: Path) -> SweepDir:
    home = make(root, 1000, launcher=fake_run.alive(), shares=4)
    for share in range(4):
        prepared(home, share)
    failing(home, range(3, 15), "rank {0}: OutOfMemoryError: no room; see {path}/logs/train-local-1_0.log")
    for number in range(20, 40):
        failing(home, range(number, number + 1), f"ValueError: cause {number} " + "x" * 200)
    for number in range(100, 120):
        state(home.point(number), "train", "RUNNING", **fake_run.alive())
        edit(home.point(number).progress("train"), step=12, total_steps=60, loss=1.5, eta_seconds=75)
    complete(home.point(999))
    return home


def test_a_thousand_points_are_one_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = sweep.read(big(tmp_path).path)
    text = screen(now)
    lines = text.splitlines()
    assert len(lines) <= 23 and now.state == "RUNNING"
    assert lines[0] == f"{SWEEP_ID}: RUNNING, 1000 points: 1 COMPLETED, 20 RUNNING, 947 PENDING, 32 FAILED"
    assert lines[1] == str(now.path)
    assert "prepare  4 COMPLETED" in lines
    assert "100  lr=100e-5  train  step 12/60, loss 1.5000, 1 min 15 s left" in lines and "and 17 more" in lines
    assert any(
        line.startswith("12 points (3, 4, 5, 6, …): FAILED train: rank 3: OutOfMemoryError: no") for line in lines
    )
    assert any(line.startswith("20 lr=20e-5: FAILED train: ValueError: cause 20 xxx") for line in lines)
    assert "x" * 200 in text, "cut without a terminal"
    assert f"and 14 more: {command('status', SWEEP_ID, '--json')}" in lines
    assert any(line.endswith(f"-m pkuslurm logs {SWEEP_ID}/3") for line in lines)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    present_sweep.show_sweep(now, out)
    assert len(out.getvalue().splitlines()) == len(lines) and max(map(width, out.getvalue().splitlines())) == 80


def test_few_points_have_a_line_each(tmp_path: Path) -> None:
    home = make(tmp_path, 4, launcher=fake_run.alive())
    prepared(home)
    complete(home.point(0), loss=0.25)
    failing(home, range(1, 2), "ValueError: \x1b[31mno")
    state(home.point(2), "train", "RUNNING", **fake_run.alive())
    edit(home.point(2).progress("train"), step=12, total_steps=60, loss=1.5, eta_seconds=75)
    text = screen(sweep.read(home.path))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isdecimal() and " lr=" in line}
    assert rows["0"] == ["0", "lr=0e-5", "COMPLETED", "-", "0.2500"]
    assert rows["1"] == ["1", "lr=1e-5", "FAILED", "train", "-", "ValueError:", "\\x1b[31mno"]
    assert rows["2"][:8] == ["2", "lr=2e-5", "RUNNING", "train", "1.5000", "step", "12/60,", "loss"]
    assert rows["3"][:5] == ["3", "lr=3e-5", "PENDING", "train", "-"]
    assert len(text.splitlines()) <= 23
    assert "eval_loss" not in text


def test_a_few_points_show_what_they_are_ranked_by(tmp_path: Path) -> None:
    home = make(tmp_path, 3, launcher=fake_run.alive(), metric="eval_loss")
    prepared(home)
    for number, evaluated in ((0, 0.7), (1, 0.3)):
        run = home.point(number)
        complete(run, loss=0.25)
        rows = [{"current_steps": 9, "loss": 0.25}, {"current_steps": 9, "eval_loss": evaluated}]
        write_text(run.adapter / "trainer_log.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    lines = screen(sweep.read(home.path)).splitlines()
    head, *rows_of = [line.split() for line in lines[lines.index("") + 1 :]][:4]
    assert head == ["point", "state", "job", "loss", "eval_loss"]
    assert [row[4:6] for row in rows_of] == [["0.2500", "0.7000"], ["0.2500", "0.3000"], ["-", "-"]]


def test_what_to_do_next(tmp_path: Path) -> None:
    home = make(tmp_path, 2, launcher=fake_run.gone())
    text = screen(sweep.read(home.path))
    assert f"-m pkuslurm retry {SWEEP_ID}\n" in text and "pkuslurm report" not in text
    prepared(home)
    for number in range(2):
        complete(home.point(number))
    _report(home)
    text = screen(sweep.read(home.path))
    assert text.endswith(f"-m pkuslurm report {SWEEP_ID}\n") and "retry" not in text


# --- logs


def test_logs_of_a_point_are_in_three_places(tmp_path: Path, slurm: Slurm) -> None:
    home = make(tmp_path, 12, "slurm")
    point = home.point(7)
    fake_points.unpack(point)
    write_text(home.shared(0).log("prepare", "100_0", 0), "rows\n")
    write_text(point.log("train", "101_7", 0), "steps\n")
    scripts = home.own.logs / ".slurm"
    write_text(scripts / "train-101_7.out", "slurmstepd: error: Killed\n")
    write_text(scripts / "train-101_8.out", "another's\n")
    slurm.says("train", 7, "FAILED", exit_code=1)
    assert script_log.find(point, "train", "101_7") == scripts / "train-101_7.out"
    assert script_log.find(home.shared(0), "prepare", "100_0") is None
    now = status.read(point.path)
    train = now.job("train")
    assert train is not None and (train.reason or "").startswith("slurmstepd: error: Killed; see ")
    names = [file.name for file in logs.log_files(point, now)]
    assert names == ["train-101_7_0.log", "train-101_7.out", "prepare-100_0_0.log"]
    out = io.StringIO()
    logs.show_logs(point.path, out, kind="train")
    assert "==> train-101_7_0.log <==\nsteps\n" in out.getvalue()


def test_logs_of_a_sweep(tmp_path: Path) -> None:
    home = make(tmp_path, 20, launcher=fake_run.alive())
    with pytest.raises(PkuslurmError, match=f"none of its own yet; of one point: .*-m pkuslurm logs {SWEEP_ID}/0"):
        logs.show_sweep_logs(home.path, io.StringIO())
    prepared(home)
    write_text(home.shared(0).log("prepare", "local-1", 0), "rows\n")
    out = io.StringIO()
    logs.show_sweep_logs(home.path, out)
    assert out.getvalue() == (
        f"no point has failed; of one: {command('logs', f'{SWEEP_ID}/0')}\n\n"
        "==> shared/0/logs/prepare-local-1_0.log <==\nrows\n"
    )
    failing(home, range(3, 15), "no")
    edit(home.point(9).state("train"), finished=fake_run.at(20))  # the first in time
    for number in (3, 9):
        write_text(home.point(number).log("train", "local-1", 0), f"of {number}\n")
    write_text(home.own.log("report", "local-1", 0), "page\n")
    out = io.StringIO()
    logs.show_sweep_logs(home.path, out)
    assert out.getvalue().startswith(
        f"12 of 20 points did not complete: 3, 4, 5, 6, 7, 8, 9, 10, …; of one: {command('logs', f'{SWEEP_ID}/3')}\n\n"
    )
    heads = [line[4:-4] for line in out.getvalue().splitlines() if line.startswith("==>")]
    assert heads == [
        *("9/logs/train-local-1_0.log", "9/shared/logs/prepare-local-1_0.log", "logs/report-local-1_0.log"),
    ]
    assert "of 3" not in out.getvalue()
    out = io.StringIO()
    logs.show_sweep_logs(home.path, out, kind="report")
    assert "page\n" in out.getvalue() and "rows" not in out.getvalue()


def test_a_points_own_submission_outlives_the_array(tmp_path: Path, slurm: Slurm) -> None:
    """A retry of one point has an id of its own; its script's words are in its own folder."""
    home = make(tmp_path, 2, "slurm")
    prepared(home)
    document = read_json(home.point(0).run_json) or {}
    document["jobs"]["train"] |= {"job_id": "200", "key": "k", "after_group": 1}
    write_json(home.point(0).run_json, document)
    slurm.queue["200"] = Row("200", "k", "FAILED", "FAILED", exit_code=1)
    file = RunDir(home.point(0).path).logs / ".slurm" / "train-200.out"
    write_text(file, "pkuslurm: cluster.setup failed: x\n")
    train = sweep.read(home.path).runs[0].job("train")
    assert train is not None and (train.job_id, train.state) == ("200", "FAILED")
    assert train.reason == f"cluster.setup failed: x; see {file}"
