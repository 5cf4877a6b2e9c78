from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import train

MAIN = Path(train.__file__).with_name("__main__.py")


class Ranks:
    """Votes of several ranks, ended in any order: the result is the largest wish of the same round."""

    def __init__(self) -> None:
        self.rounds: list[list[bool]] = []

    def starter(self) -> Callable[[bool], Callable[[], bool]]:
        count = 0

        def start(wish: bool) -> Callable[[], bool]:
            nonlocal count
            while len(self.rounds) <= count:
                self.rounds.append([])
            votes = self.rounds[count]
            votes.append(wish)
            count += 1
            return lambda: any(votes)

        return start


@pytest.mark.parametrize("seen", [(3, 3), (2, 5), (6, 1)])
def test_all_ranks_stop_at_the_same_step(seen: tuple[int, int]) -> None:
    shared, now = Ranks(), [0, 0]
    votes = [
        train.Vote(lambda rank=rank: now[rank] >= seen[rank], shared.starter())  # type: ignore[misc]
        for rank in range(2)
    ]
    stopped: dict[int, int] = {}
    for step in range(1, 9):
        for rank, vote in enumerate(votes):
            now[rank] = step
            if rank not in stopped and vote.step():
                stopped[rank] = step
        if stopped:
            break
    assert stopped == {0: min(seen) + 1, 1: min(seen) + 1}


def test_nobody_asked_nobody_stops_and_the_last_vote_is_taken() -> None:
    ended = []

    def start(wish: bool) -> Callable[[], bool]:
        return lambda: bool(ended.append(1)) or wish  # type: ignore[func-returns-value]

    vote = train.Vote(lambda: False, start)
    assert [vote.step() for _ in range(3)] == [False] * 3
    vote.close()
    assert len(ended) == 3


def test_progress_is_written_once_a_second_and_at_both_ends(tmp_path: Path) -> None:
    clock = [100.0]
    progress = train.Progress(tmp_path / "state" / "p.json", clock=lambda: clock[0])
    progress.begin(10)
    written = []
    for step in range(11, 31):
        clock[0] += 0.25
        progress.loss = step / 10
        progress.step(step, 30)
        written.append(progress.written)
    assert sorted(set(written)) == [11, 15, 19, 23, 27, 30]
    value = json.loads((tmp_path / "state" / "p.json").read_text())
    assert value["step"] == value["total_steps"] == 30
    assert value["eta_seconds"] == 0.0 and value["loss"] == 3.0
    clock[0] += 10
    progress.step(20, 30)  # the rate is this process's own: 10 steps of its 15 seconds
    assert json.loads((tmp_path / "state" / "p.json").read_text())["eta_seconds"] == 15.0


def test_progress_survives_a_disk_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    train.Progress(tmp_path / "file" / "p.json").step(1, 2)
    assert "progress not written" in capsys.readouterr().err


def run_rank(tmp_path: Path, stub: str, rank: int = 1) -> subprocess.CompletedProcess[str]:
    """One rank, with a stand-in for LLaMA-Factory."""
    package = tmp_path / "stub" / "llamafactory" / "train"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "tuner.py").write_text(stub)
    for name, text in (("torch", "class serialization:\n    register_package = staticmethod(lambda *a: None)\n"),):
        (tmp_path / "stub" / name).mkdir()
        (tmp_path / "stub" / name / "__init__.py").write_text(text)
        (tmp_path / "stub" / name / "distributed.py").write_text("def is_available(): return False\n")
    (tmp_path / "stub" / "transformers.py").write_text("class TrainerCallback: pass\n")
    (tmp_path / "train.yaml").write_text("{}")
    payload: dict[str, Any] = {"yaml": str(tmp_path / "train.yaml"), "failures": str(tmp_path / "failures")}
    payload |= {"progress": str(tmp_path / "p.json"), "stop_file": str(tmp_path / "stop")}
    payload["result"] = str(tmp_path / "results" / "train.json")
    job = {"kind": "train", "first_attempt": 1, "payload": payload, "expect": {"dir": str(tmp_path / "adapter")}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    env = os.environ | {"PYTHONPATH": str(tmp_path / "stub"), "RANK": str(rank), "PKUSLURM_ATTEMPT": "3"}
    command = [sys.executable, str(MAIN), "train", str(tmp_path / "job.json")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_failing_rank_says_why(tmp_path: Path) -> None:
    done = run_rank(tmp_path, "def run_exp(callbacks):\n    raise ValueError('坏 learning rate')\n")
    assert done.returncode == 1
    assert "[rank1]: ValueError: 坏 learning rate" in done.stderr
    failure = json.loads((tmp_path / "failures" / "train-3-1.json").read_text())
    assert (failure["rank"], failure["type"], failure["message"]) == (1, "ValueError", "坏 learning rate")
    assert "run_exp" in failure["log"]


STEPS = """
from types import SimpleNamespace as N
def run_exp(callbacks):
    [c] = callbacks
    args, control = N(ddp_timeout=9, save_only_model=True), N(should_save=False, should_training_stop=False)
    state = N(global_step=0, max_steps={total}, log_history=[])
    c.on_train_begin(args, state, control)
    for step in range(1, {total} + 1):
        state.global_step = step
        c.on_step_end(args, state, control)
        if control.should_training_stop:
            assert control.should_save and args.save_only_model is False
            print("stopped at", step)
            break
        if step == 2: open({stop!r}, "w").close()
    c.on_train_end(args, state, control)
    print("went on")
"""


def test_a_stop_ends_with_75_before_anything_looks_finished(tmp_path: Path) -> None:
    done = run_rank(tmp_path, STEPS.format(total=9, stop=str(tmp_path / "stop")))
    assert (done.returncode, done.stdout) == (75, "stopped at 4\n"), done.stderr
    assert not (tmp_path / "failures").exists()


def test_a_stop_at_the_last_step_is_no_stop(tmp_path: Path) -> None:
    done = run_rank(tmp_path, STEPS.format(total=4, stop=str(tmp_path / "stop")))
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


MODES = """
import os
def run_exp(callbacks):
    os.makedirs({folder!r} + "/checkpoint-1")
    open({folder!r} + "/checkpoint-1/state", "w").close()
    os.close(os.open({folder!r} + "/weights", os.O_CREAT, 0o600))
"""


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize(("mode", "files"), [(0o750, {0o640}), (0o700, None)])
def test_what_is_trained_in_a_groups_run_is_the_groups(
    tmp_path: Path, umask: int, mode: int, files: set[int] | None
) -> None:
    """In a private one it is as its user's umask says: nobody else gets in."""
    tmp_path.chmod(mode)
    before = os.umask(umask)
    try:
        done = run_rank(tmp_path, MODES.format(folder=str(tmp_path / "adapter")), rank=0)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "adapter"
    found = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "checkpoint-1")}
    assert found == (files or {0o666 & ~umask, 0o600})
    assert folders == {0o750 if files else 0o777 & ~umask}
