"""Sweeps on the real LLaMA-Factory, run here: the better learning rate wins, and Ctrl-C costs what was running."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.rundir import RunDir, read_json
from tests import conftest
from tests.conftest import Demo, environment, run, start
from tests.e2e import models

pytestmark = pytest.mark.real
# a learning rate that learns within twenty steps, and one that does not
GOOD, BAD = "5e-3", "1e-8"
# a validation set and a strategy: LLaMA-Factory logs eval_loss then
EVALUATED = ["train.val_size=0.2", "train.eval_strategy=steps", "train.eval_steps=10"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Demo:
    """2 learning rates × 2 ranks, two at a time."""
    folder = tmp_path_factory.mktemp("sweep") / conftest.WEIRD
    folder.mkdir()
    env = environment(folder, PKUSLURM_CACHE=str(cache))
    wanted = ["-m", f"train.learning_rate={BAD},{GOOD}", "train.lora_rank=4,8", "pipeline=train"]
    more = ["train.max_steps=20", "train.logging_steps=5", "cluster.array_parallelism=2", "name=学习率 sweep"]
    ended = run([*wanted, *more, *EVALUATED], folder, env)
    assert ended.code == 0, ended.err
    return Demo(Path(ended.last), ended, folder, env)


def board(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "leaderboard.csv").open(encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_the_better_learning_rate_wins(swept: Demo) -> None:
    rows = board(swept.path)
    assert [row["train.learning_rate"] for row in rows] == [GOOD, GOOD, BAD, BAD], rows
    losses = [float(row["eval_loss"]) for row in rows]
    assert losses == sorted(losses) and losses[1] < losses[2] - 0.3, losses
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]


def test_losses_are_what_the_trainers_logged(swept: Demo) -> None:
    for row in board(swept.path):
        file = Path(row["path"]) / "adapter" / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        logged = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
        assert float(row["eval_loss"]) == pytest.approx(logged[-1], rel=1e-3)


def test_what_points_share_is_prepared_once(swept: Demo) -> None:
    assert [path.name for path in (swept.path / "shared").iterdir() if path.is_dir()] == ["0"]
    proofs = {RunDir(swept.path / str(n)).done("prepare").resolve() for n in range(4)}
    assert len(proofs) == 1
    marker = read_json(proofs.pop()) or {}
    assert marker["attempt"] == 1


def test_a_line_for_each_point_the_best_and_what_next(swept: Demo) -> None:
    screen = swept.ended.err
    assert "4 points, 1 to prepare" in screen and "Traceback" not in screen
    for number in range(1, 5):
        assert screen.count(f"[{number}/4] ") == 1
    assert f"best     {swept.path.name}/" in screen and f"lr={GOOD}" in screen.split("best     ")[1].splitlines()[0]
    assert str(swept.path / "report.html") in screen
    assert swept.ended.out == f"{swept.path}\n"


def test_it_is_read_as_a_sweep(swept: Demo) -> None:
    status = json.loads(swept.verb("status", "--json").out)
    assert (status["state"], status["counts"]) == ("COMPLETED", {"COMPLETED": 4})
    page = (swept.path / "report.html").read_text(encoding="utf-8")
    assert page.count(GOOD) >= 2 and "<svg" in page
    again = swept.verb("retry", swept.path.name)
    assert again.code == 0 and "nothing to do" in again.err, again


def test_it_is_extended_by_what_is_not_there(swept: Demo) -> None:
    """Last: it adds a point."""
    wanted = ["-m", f"train.learning_rate={GOOD}", "train.lora_rank=4,8,2", "pipeline=train"]
    more = ["train.max_steps=20", "train.logging_steps=5", f"sweep.extend={swept.path.name}", *EVALUATED]
    before = {n: (swept.path / str(n) / "done" / "train.json").stat().st_mtime_ns for n in range(4)}
    ended = run([*wanted, *more], swept.cwd, swept.env)
    assert ended.code == 0 and "2 of 3 points are there already" in ended.err, ended
    assert {n: (swept.path / str(n) / "done" / "train.json").stat().st_mtime_ns for n in range(4)} == before
    assert len(board(swept.path)) == 5 and not (swept.path / "shared" / "1").exists()


def until(condition: Any, process: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_leaves_the_finished_one_finished_and_retry_goes_on(weird: Path, cache: Path) -> None:
    models.qwen(weird / "qwen")
    models.alpaca_without_input(weird / "rows.jsonl")
    token = {"PKUSLURM_TEST_TOKEN": str(weird)}
    env = environment(weird, PKUSLURM_CACHE=str(cache), **token)
    own = ["model.path=qwen", "model.template=qwen", "dataset.path=rows.jsonl", "train.cutoff_len=64"]
    process = start(
        ["-m", "train.max_steps=1,40", "train.per_device_train_batch_size=1", "pipeline=train", *own], weird, env
    )
    until(lambda: list((weird / "runs").glob("2*/sweep.json")), process)
    (found,) = (weird / "runs").glob("2*")
    first, second = RunDir(found / "0"), RunDir(found / "1")
    until(lambda: (read_json(second.progress("train")) or {}).get("step", 0) >= 1, process)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "1 of 2 points are complete" in err, err
    assert conftest.left_running(f"PKUSLURM_TEST_TOKEN={weird}") == []
    assert first.done("train").exists() and (read_json(second.state("train")) or {})["state"] == "CANCELLED"
    done = first.done("train").stat().st_mtime_ns
    again = run(["retry", found.name], weird, env, module="pkuslurm")
    assert again.code == 0 and again.last == str(found), again
    assert first.done("train").stat().st_mtime_ns == done and second.done("train").exists()
    assert len(board(found)) == 2
