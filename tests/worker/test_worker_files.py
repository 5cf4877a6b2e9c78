"""Completion, markers, failures and job files: files in, verdicts out; no process is started."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, write_json
from pkuslurm.worker import completion, failures, marker
from pkuslurm.worker.completion import Incomplete
from pkuslurm.worker.failures import Failure
from pkuslurm.worker.job import Job, load
from pkuslurm.worker.state import save

from .conftest import Lab, adapter, safetensors


def job_of(lab: Lab, kind: str, **fields: Any) -> Job:
    return load(lab.job(kind, "", **fields))


def test_prepare_needs_data_and_model(lab: Lab) -> None:
    model = lab.run.path / "tiny"
    job = job_of(lab, "prepare", expect={"dir": str(lab.run.data), "model": str(model)})
    with pytest.raises(Incomplete, match=r"no \.arrow"):
        completion.judge(job)
    part = lab.run.data / "train"
    part.mkdir(parents=True)
    (part / "data-00000-of-00001.arrow").write_bytes(b"rows")
    write_json(part / "dataset_info.json", {})
    write_json(part / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    with pytest.raises(Incomplete, match=r"config\.json"):
        completion.judge(job)
    write_json(model / "config.json", {"model_type": "qwen2"})
    assert len(completion.judge(job)) == 3
    write_json(part / "state.json", {"_data_files": [{"filename": "gone.arrow"}]})
    with pytest.raises(Incomplete, match=r"gone\.arrow"):
        completion.judge(job)


def early(counter: int) -> dict[str, Any]:
    callback = {
        "args": {"early_stopping_patience": 3},
        "attributes": {"early_stopping_patience_counter": counter},
    }
    return {"stateful_callbacks": {"EarlyStoppingCallback": callback}}


def test_train_needs_the_last_step_and_whole_weights(lab: Lab) -> None:
    job = job_of(lab, "train")
    with pytest.raises(Incomplete, match="trainer_state"):
        completion.judge(job)
    adapter(lab.run.adapter, step=16)
    with pytest.raises(Incomplete, match="stopped at step 16 of 60"):
        completion.judge(job)
    adapter(lab.run.adapter, step=16, **early(2))
    with pytest.raises(Incomplete, match="stopped at step 16 of 60"):
        completion.judge(job)
    adapter(lab.run.adapter, step=16, **early(3))
    assert len(completion.judge(job)) == 3
    adapter(lab.run.adapter, cut=1)
    with pytest.raises(Incomplete, match="truncated"):
        completion.judge(job)
    adapter(lab.run.adapter)
    assert {path.name for path in completion.judge(job)} == {
        "trainer_state.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("damage", [b"", b"\0" * 4, b"\xff" * 64, b"\2\0\0\0\0\0\0\0{}", b"\4\0\0\0\0\0\0\0null"])
def test_damaged_weights(lab: Lab, damage: bytes) -> None:
    job = job_of(lab, "train")
    adapter(lab.run.adapter)
    (lab.run.adapter / "adapter_model.safetensors").write_bytes(damage)
    with pytest.raises(Incomplete):
        completion.judge(job)


def test_merge_needs_every_shard(lab: Lab) -> None:
    job = job_of(lab, "merge")
    write_json(lab.run.merged / "config.json", {})
    with pytest.raises(Incomplete, match=r"model\.safetensors"):
        completion.judge(job)
    write_json(
        lab.run.merged / "model.safetensors.index.json",
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}},
    )
    safetensors(lab.run.merged / "m-1.safetensors")
    with pytest.raises(Incomplete, match="m-2"):
        completion.judge(job)
    safetensors(lab.run.merged / "m-2.safetensors")
    (lab.run.merged / "tokenizer.json").write_text("{}")
    assert len(completion.judge(job)) == 5


def test_answers_are_counted_and_parsed(lab: Lab) -> None:
    job = job_of(lab, "infer")
    for text, words in (
        ("", "empty"),
        ('{"a": 1}\n{"b', "line 2"),
        ('{"a": 1}\n', "1 answers of 2"),
        ("1\n2\n", "line 1"),
    ):
        lab.run.answers.write_text(text)
        with pytest.raises(Incomplete, match=words):
            completion.judge(job)
    lab.run.answers.write_text('{"a": "你"}\n{"a": 2}\n', encoding="utf-8")
    assert completion.judge(job) == [lab.run.answers]


def test_an_artifact_outside_of_the_run_is_refused(lab: Lab) -> None:
    with pytest.raises(PkuslurmError, match="outside"):
        completion.judge(job_of(lab, "merge", expect={"dir": "/etc"}))


def mark(run: RunDir) -> None:
    run.report.write_text("whole")
    marker.write(run, run.run_id, "report", 1, "local-1", [run.report])


def test_a_marker_is_believed_only_if_its_artifacts_are_there(lab: Lab) -> None:
    run = lab.run
    assert "no marker" in str(marker.doubt(run, run.run_id, "report"))
    mark(run)
    assert marker.doubt(run, run.run_id, "report") is None
    run.report.write_text("whole!")
    assert "6 bytes, its marker says 5" in str(marker.doubt(run, run.run_id, "report"))
    run.report.write_text("whoke")
    assert "has changed" in str(marker.doubt(run, run.run_id, "report"))
    run.report.unlink()
    assert "No such file" in str(marker.doubt(run, run.run_id, "report"))


def test_only_the_size_of_large_artifacts_counts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(lab.run)
    monkeypatch.setattr(marker, "HASHED_UP_TO", 4)
    lab.run.report.write_text("whoke")
    assert marker.doubt(lab.run, lab.run.run_id, "report") is None


def test_torn_and_foreign_markers(lab: Lab) -> None:
    run = lab.run
    mark(run)
    whole = run.done("report").read_text()
    for size in range(0, len(whole) - 2, 7):
        run.done("report").write_text(whole[:size])
        assert marker.doubt(run, run.run_id, "report") is not None
    for change in (
        {"run_id": "other"},
        {"kind": "train"},
        {"schema_version": 2},
        {"artifacts": []},
        {"artifacts": [3]},
    ):
        write_json(run.done("report"), {**json.loads(whole), **change})
        assert marker.doubt(run, run.run_id, "report") is not None


def test_the_cause_outranks_what_befell_the_others() -> None:
    lost = Failure(0, 1.0, "RuntimeError", "[gloo] Connection closed by peer [10.0.0.2]:123")
    ended = Failure(2, 1.1, "signal", "", "node1", -15)
    abort = Failure(2, 1.1, "signal", "", "node1", -6)
    bare = Failure(3, 1.2, "exit", "", "node1", 1)
    killed = Failure(1, 2.0, "signal", "", "node1", -9)
    raised = Failure(1, 3.0, "ValueError", "bad rows\nmore")
    assert failures.first([lost, ended]) is lost
    assert failures.first([lost, ended, abort]) is abort
    assert failures.first([lost, ended, abort, bare]) is bare
    assert failures.first([lost, bare, raised]) is raised
    assert failures.first([raised, lost, killed]) is killed
    assert failures.first([]) is None
    assert str(killed) == "rank 1 on node1 was killed by signal 9 (SIGKILL)"
    assert str(raised) == "rank 1: ValueError: bad rows"
    assert str(bare) == "rank 3 on node1 ended with exit code 1"
    assert "SIGKILL" in failures.describe(137)


LOG = """warning: something
Traceback (most recent call last):
KeyError: 'x'
[rank2]: Traceback (most recent call last):
[rank2]:   File "a.py", line 1, in <module>
[rank2]: torch.OutOfMemoryError: NPU out of memory
[rank3]: RuntimeError: Connection closed by peer
E1124 failed (exitcode: -9) local_rank: 1 (pid: 26) of binary: /usr/bin/python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
"""


def test_a_log_is_read() -> None:
    assert failures.named_by_torchrun(LOG, 2) == (3, -9)
    assert failures.named_by_torchrun("all well", 2) is None
    assert str(failures.of_rank(2, 1, LOG, 5.0, "node1")) == (
        f"rank 2: OutOfMemoryError: NPU out of memory; {failures.LESS_MEMORY}"
    )
    assert str(failures.of_rank(3, -9, LOG, 5.0, "n")) == "rank 3 on n was killed by signal 9 (SIGKILL)"
    assert str(failures.of_rank(3, 1, LOG, 5.0, "n")) == "rank 3: KeyError: 'x'"
    refused = failures.of_rank(0, 2, "pkuslurm: old\npkuslurm: train.lr 北: no number; give one\nx\n", 5.0, "n")
    assert str(refused) == "train.lr 北: no number; give one"
    bare = failures.of_rank(None, 3, "hm\nlast words\n====\n", 5.0, "n")
    assert str(bare) == "the command on n ended with exit code 3: last words"


def test_torn_failure_files_are_left_out(lab: Lab) -> None:
    run = lab.run
    run.failures.mkdir(parents=True)
    write_json(
        run.failures / "train-1-0.json",
        {"rank": 0, "time": 1.5, "type": "ValueError", "message": "m", "log": ""},
    )
    (run.failures / "train-1-1.json").write_text('{"rank": 1, "ti')
    (run.failures / "train-2-1.json").write_text('{"rank": 1}')
    assert failures.read(run, "train", 1) == [Failure(0, 1.5, "ValueError", "m")]
    failures.record(run, "train", 1, Failure(0, 2.0, "exit", "", "n", 1), place=0)
    failures.record(run, "train", 1, Failure(1, 2.0, "exit", "", "n", 1), place=0)
    assert [failure.type for failure in failures.read(run, "train", 1)] == ["ValueError", "exit"]
    failures.forget(run, "train", 1, range(3))
    assert failures.read(run, "train", 1) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"kind": "tune"}, "kind 'tune'"),
        ({"run_dir": "a/b"}, "absolute"),
        ({"command": []}, "command is empty"),
        ({"command": "x"}, "command is 'x'"),
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": True}, "nodes is True"),
        ({"env": {"A": 1}}, "env must"),
        ({"run_id": None}, "run_id is None"),
    ],
)
def test_a_wrong_job_file_is_refused_by_field(lab: Lab, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PkuslurmError, match=words):
        path = lab.job("train", "")
        write_json(path, {**json.loads(path.read_text()), **change})
        load(path)


def test_a_torn_job_file_is_refused(lab: Lab) -> None:
    path = lab.job("train", "")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(PkuslurmError, match="no whole JSON object"):
        load(path)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "write_json", full)
    with pytest.raises(PkuslurmError, match=r"train\.json: cannot be written: No space left"):
        save(tmp_path / "train.json", {})


def test_the_last_word_on_a_full_disk_is_not_put_over_a_newer_attempt_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has come after the look at who has the run."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "train.json"
    word = {"attempt": 1, "job_id": "7", "state": "FAILED"}
    monkeypatch.setattr(rundir, "write_json", full)
    for newer in ({"attempt": 2, "job_id": "7"}, {"attempt": 1, "job_id": "8"}):
        file.write_text(json.dumps(newer))
        with pytest.raises(OSError, match="No space left"):
            rundir.write_last_word(file, word)
        assert rundir.read_json(file) == newer
    for older in ({"attempt": 0, "job_id": "6"}, {"attempt": 1, "job_id": "7"}):
        file.write_text(json.dumps(older))
        rundir.write_last_word(file, word)
        assert rundir.read_json(file) == word
