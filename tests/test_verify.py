"""The independent reader sees lies, and so does pkuslurm; and a test that was told one fails."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm.read import status
from tests import standin_run, verify
from tests.read.fake_run import edit
from tests.standin_run import Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run = standin_run.make(tmp_path_factory.mktemp("verify"))
    assert run.ended.code == 0, run.ended.err
    return run


def another_hash(run: Path) -> None:
    marker = json.loads((run / "done" / "train.json").read_bytes())
    marker["artifacts"][0]["sha256"] = "0" * 64
    edit(run / "done" / "train.json", artifacts=marker["artifacts"])


def truncated(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def same_size(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def gone(run: Path) -> None:
    (run / "adapter" / "trainer_state.json").unlink()


def of_another_run(run: Path) -> None:
    edit(run / "done" / "train.json", kind="merge")


def torn(run: Path) -> None:
    file = run / "done" / "train.json"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("lie", [another_hash, truncated, same_size, gone, of_another_run, torn])
def test_a_lie_is_seen_by_both(made: Made, tmp_path: Path, lie: Callable[[Path], None]) -> None:
    run = made.copied(tmp_path)
    for file in (run / "jobs").glob("*.json"):
        edit(file, run_dir=str(run))
    assert verify.problems(run) == []
    lie(run)
    assert verify.problems(run)
    now = status.read(run)
    assert now.state == "FAILED" and {job.state for job in now.jobs} == {"COMPLETED", "FAILED"}
    assert now.jobs[1].state == "FAILED" and now.jobs[1].reason
    ended = made.verb("merge", run, "--force")
    assert ended.code == 2 and "merge needs train, which is not complete" in ended.err


def signed(run: Path, kind: str, name: str, content: bytes) -> None:
    """An artifact of the hash that its marker says, and of no use."""
    (run / name).write_bytes(content)
    marker = json.loads((run / "done" / f"{kind}.json").read_bytes())
    for entry in marker["artifacts"]:
        if entry["path"] == name:
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    edit(run / "done" / f"{kind}.json", artifacts=marker["artifacts"])


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("train", "adapter/trainer_state.json", b'{"global_step": 2, "max_steps": 3}'),
        ("train", "adapter/adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
        ("merge", "merged/model.safetensors", b""),
        ("infer", "answers.jsonl", b'{"prompt": "a", "tuned": "b"}\n'),
        ("prepare", "data/train/state.json", b'{"_data_files": []}'),
    ],
)
def test_what_is_half_made_is_seen_though_its_hash_agrees(
    made: Made, tmp_path: Path, kind: str, name: str, content: bytes
) -> None:
    run = made.copied(tmp_path)
    signed(run, kind, name, content)
    assert verify.problems(run), "a worker that marks such a thing would be found out"


def test_a_folder_in_which_nothing_is_proved_is_no_good_one(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = subprocess.run([sys.executable, verify.__file__, folder], capture_output=True, text=True)
        assert done.returncode == 1 and "no job of it has a marker" in done.stdout, done


def test_what_tests_are_told_is_looked_into(made: Made, tmp_path: Path) -> None:
    """By the commands' JSON, by launch's 0, and by a verdict in this process."""
    run = made.copied(tmp_path)
    told = status.read(run).to_json()
    truncated(run)
    for words, code, out in (
        (["pkuslurm", "status", "--json"], 0, json.dumps(told)),
        (["pkuslurm.launch", "nodes=2"], 0, f"…\n{run}\n"),
    ):
        before = verify.counted["verdicts"]
        verify.heard(words, code, out)
        assert verify.counted["verdicts"] == before + 5
        assert verify.false and all("adapter_model" in one for one in verify.false)
        verify.false.clear()  # else this test would fail for it
    edit(run / "run.json", executor="slurm")
    verify.heard(["pkuslurm.launch"], 0, str(run))
    assert verify.false == [], "only submitted"
    verify.heard(
        ["pkuslurm", "status", "--json"], 0, json.dumps(told | {"jobs": [told["jobs"][0] | {"state": "FAILED"}]})
    )
    assert "and its prepare is FAILED" in verify.false.pop()
