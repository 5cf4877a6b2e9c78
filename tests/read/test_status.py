"""Reading run directories: markers, processes, several nodes, damage of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.read import report, status
from pkuslurm.read.rules import GONE, STATES
from pkuslurm.rundir import write_json, write_text
from tests.read import fake_run
from tests.read.fake_run import KINDS, complete, edit, finished, make, state


def states(path: Path) -> list[str]:
    return [job.state for job in status.read(path).jobs]


def test_the_shape_is_the_contracts(weird: Path) -> None:
    run = finished(weird)
    found = status.read(run.path).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["run_id", "path", "state", "passed", "jobs"]
    assert (found["run_id"], found["path"]) == (run.run_id, str(run.path))
    assert [job["kind"] for job in found["jobs"]] == list(KINDS)
    for job in found["jobs"]:
        assert list(job) == [
            "kind", "job_id", "state", "attempt", "nodes", "num_nodes",
            "started", "finished", "exit_code", "reason", "progress",
        ]  # fmt: skip
        assert job["state"] in STATES and job["exit_code"] == 0 and job["reason"] is None
        assert datetime.fromisoformat(job["started"]).tzinfo and datetime.fromisoformat(job["finished"]).tzinfo
    train = found["jobs"][1]
    assert train["nodes"] == ["node01", "node02"] and train["num_nodes"] == 2
    assert train["progress"] == {
        "step": 60,
        "total_steps": 60,
        "loss": pytest.approx(0.04, abs=0.1),
        "eta_seconds": None,
    }
    assert found["jobs"][0]["progress"] is None


@pytest.mark.parametrize(
    ("verdicts", "passed"),
    [([True, None], True), ([True, False], False), ([None, None], None), (["yes", 1], None), ([], None)],
)
def test_passed(tmp_path: Path, verdicts: list[object], passed: bool | None) -> None:
    run = finished(tmp_path)
    write_text(run.answers, "".join(json.dumps({"prompt": "a", "passed": one}) + "\n" for one in verdicts) or "\n")
    fake_run.mark(run, "infer", run.answers)
    now = status.read(run.path)
    assert (now.state, now.passed) == ("COMPLETED", passed)
    run.done("infer").unlink()
    assert status.read(run.path).passed is None


def test_a_marker_is_checked(tmp_path: Path) -> None:
    run = finished(tmp_path)
    weights = run.merged / "model.safetensors"
    original = weights.read_bytes()
    for content, word in ((original + b"x", "bytes"), (original[:-1] + b"x", "changed")):
        weights.write_bytes(content)
        job = status.read(run.path).job("merge")
        assert job is not None and job.state == "FAILED" and word in (job.reason or "")
    weights.unlink()
    assert states(run.path)[2] == "FAILED"
    weights.write_bytes(original)
    assert states(run.path) == ["COMPLETED"] * 5
    edit(run.done("merge"), run_id="another")
    assert states(run.path)[2] == "FAILED"


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/x", "merged", "a\0b"])
def test_a_marker_leads_nowhere_outside(tmp_path: Path, name: str) -> None:
    run = finished(tmp_path)
    edit(run.done("merge"), artifacts=[{"path": name, "bytes": 1, "sha256": ""}])
    assert states(run.path)[2] == "FAILED"


def test_a_report_written_anew_stays_complete(tmp_path: Path) -> None:
    run = finished(tmp_path)
    report.write(run.path)
    assert status.read(run.path).state == "COMPLETED"
    run.report.unlink()
    assert states(run.path)[4] == "FAILED"


def test_a_real_process_and_its_end(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        text = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8")
        start = int(text.rpartition(")")[2].split()[19])
        state(run, "train", "RUNNING", pid=worker.pid, pid_start=start)
        edit(run.run_json, launcher=fake_run.alive())
        assert states(run.path)[1:] == ["RUNNING", "PENDING", "PENDING", "PENDING"]
        edit(run.run_json, launcher=fake_run.gone())
        state(run, "train", "RUNNING", pid=worker.pid, pid_start=start + 1)
        assert states(run.path)[1] == "FAILED", "another process has that number now"
        state(run, "train", "RUNNING", pid=worker.pid, pid_start=start)
        worker.kill()
    found = status.read(run.path)
    assert [job.state for job in found.jobs] == ["COMPLETED", "FAILED", "SKIPPED", "SKIPPED", "SKIPPED"]
    assert found.jobs[1].reason == GONE and found.state == "FAILED"
    edit(run.run_json, launcher=fake_run.alive())
    assert states(run.path)[1:] == ["RUNNING", "PENDING", "PENDING", "PENDING"]


def test_on_another_host_nothing_is_known(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "RUNNING", host="elsewhere")
    edit(run.run_json, launcher=fake_run.gone() | {"host": "elsewhere"})
    found = status.read(run.path)
    assert [job.state for job in found.jobs] == ["COMPLETED", *["UNKNOWN"] * 4]
    assert found.state == "UNKNOWN" and "this machine" in (found.jobs[1].reason or "")


def test_before_the_launcher_has_said_who_it_is(tmp_path: Path) -> None:
    run = make(tmp_path, created=datetime.now().astimezone().isoformat())
    edit(run.run_json, launcher=None)
    assert status.read(run.path).state == "PENDING"
    edit(run.run_json, created="2026-01-01T00:00:00+08:00")
    assert status.read(run.path).state == "FAILED"


def test_what_a_cancelled_run_never_started_is_cancelled(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "CANCELLED", reason="got signal 15")
    edit(run.run_json, launcher=None)
    assert states(run.path) == ["COMPLETED", *["CANCELLED"] * 4]
    assert status.read(run.path).state == "CANCELLED"


def test_an_earlier_attempts_state_does_not_count(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "FAILED", reason="old")
    document = json.loads(run.run_json.read_text(encoding="utf-8"))
    document["jobs"]["train"]["first_attempt"] = 2
    document["launcher"] = fake_run.alive()
    write_json(run.run_json, document)
    job = status.read(run.path).job("train")
    assert job is not None and (job.state, job.attempt, job.reason, job.finished) == ("PENDING", 2, None, None)


def test_the_cause_is_shown_not_what_the_first_node_felt(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "FAILED", reason="rank 0: RuntimeError: Connection closed by peer")
    state(run, "train", "FAILED", rank=1, reason="rank 1: ValueError: bad row")
    assert (status.read(run.path).job("train") or fail()).reason == "rank 1: ValueError: bad row"
    state(run, "train", "FAILED", rank=1, reason="rank 1: ValueError: bad row", attempt=7)
    assert "Connection closed" in ((status.read(run.path).job("train") or fail()).reason or "")
    failure = {"rank": 1, "time": 1.0, "type": "MemoryError", "message": "no room"}
    write_json(run.failures / "train-1-1.json", failure)
    assert (status.read(run.path).job("train") or fail()).reason == "rank 1: MemoryError: no room"
    state(run, "train", "RUNNING")
    assert (status.read(run.path).job("train") or fail()).reason == "rank 1: MemoryError: no room"


def fail() -> Any:
    raise AssertionError("no such job")


def test_progress(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    edit(run.run_json, launcher=fake_run.alive())
    state(run, "train", "RUNNING", **fake_run.alive())
    edit(run.progress("train"), step=12, total_steps=60, loss=float("nan"), eta_seconds=34.5, time="x")
    job = status.read(run.path).job("train") or fail()
    assert job.progress == {"step": 12, "total_steps": 60, "loss": None, "eta_seconds": 34.5}
    assert job.finished is None
    assert status.read(run.path).state == "RUNNING"
    json.dumps(status.read(run.path).to_json(), allow_nan=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"jobs": 3}', '{"jobs": {"train": null}}', "\0\xff"])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    run = make(tmp_path)
    run.run_json.write_bytes(content.encode("latin-1"))
    assert status.read(run.path).state in ("UNKNOWN", "FAILED")
    json.dumps(status.read(run.path).to_json())
    report.build(run.path)


def test_no_directory_at_all(tmp_path: Path) -> None:
    assert status.read(tmp_path / "nothing").state == "UNKNOWN"
    assert "UNKNOWN" in report.build(tmp_path / "nothing")


def test_a_kind_is_no_path(tmp_path: Path) -> None:
    run = make(tmp_path)
    edit(run.run_json, jobs={"../../x": {}, "*": {}})
    assert states(run.path) == ["UNKNOWN", "UNKNOWN"]


FILES = ["run.json", "results/infer.json", "answers.jsonl", "adapter/trainer_log.jsonl"]
FILES += [f"{folder}/{kind}.json" for folder in ("state", "done", "jobs") for kind in KINDS]


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(FILES), part=st.floats(0, 0.999), junk=st.binary(max_size=3))
def test_torn_files_never_raise_and_prove_nothing(name: str, part: float, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = finished(Path(folder))
        file = run.path / name
        whole = file.read_bytes()
        # what is cut off must be more than the last newline, else it is whole
        file.write_bytes(whole[: int(len(whole.rstrip()) * part)] + junk)
        now = status.read(run.path)
        json.dumps(now.to_json(), allow_nan=False)
        if name == "run.json" or name.startswith("done/") or name == "answers.jsonl":
            assert now.state != "COMPLETED"
        assert report.build(run.path).endswith("</html>\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_odd_values_never_raise(data: st.DataObject) -> None:
    """Any key of any file with any JSON value in it."""
    with tempfile.TemporaryDirectory() as folder:
        run = finished(Path(folder))
        names = [name for name in FILES if name.endswith(".json")]
        file = run.path / data.draw(st.sampled_from([*names, "results/prepare.json", "results/merge.json"]))
        value = json.loads(file.read_text(encoding="utf-8"))
        if not value:
            return
        key = data.draw(st.sampled_from(sorted(value)))
        value[key] = data.draw(JSON)
        file.write_text(json.dumps(value), encoding="utf-8")
        json.dumps(status.read(run.path).to_json(), allow_nan=False)
        report.build(run.path)
