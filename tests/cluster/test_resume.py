"""A training that is stopped goes on by itself: a real Slurm, and a stand-in that does steps and writes checkpoints."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.process import in_netns, pids, wait_for
from tests.cluster.runs import (
    ALL,
    KINDS,
    command,
    ended,
    job,
    jobs_of,
    launched,
    sent,
    shim,
    states,
    status,
    until,
    verb,
)
from tests.faults.recorder import Row

TOTAL = 120
LONG = 360  # a quarter of a second each: more than two attempts of 45 s can do
STEPS = f"cluster.env.STANDIN_TRAIN=steps:{TOTAL}:quick"
LAUNCHERS = ("cluster.launcher=prefork", "cluster.launcher=torchrun")
BOTH = pytest.mark.parametrize("launcher", LAUNCHERS)
# the other one with `make test-faults`
EITHER = pytest.mark.parametrize("launcher", [LAUNCHERS[0], pytest.param(LAUNCHERS[1], marks=pytest.mark.faults)])


@pytest.fixture(autouse=True)
def nothing_is_left(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.clear()


def at_step(slurm: Cluster, run: Path, step: int, attempt: int = 1, seconds: float = 60) -> dict[str, Any]:
    """The status, once the training has come so far in that attempt."""

    def there() -> bool:
        return any(number == attempt and done >= step for number, done in steps(run))

    wait_for(there, seconds, f"step {step} of attempt {attempt}")
    return status(slurm, run)


def steps(run: Path, rank: int = 0) -> list[tuple[int, int]]:
    """(attempt, step) of all that were done, in order."""
    log = run / "views" / f"steps.{rank}"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def once_each(run: Path, total: int = TOTAL) -> None:
    for rank in (0, 1):
        assert [step for _, step in steps(run, rank)] == list(range(1, total + 1)), steps(run, rank)


def train_id(run: Path) -> str:
    return str(jobs_of(run)["train"]["job_id"])


def newest(slurm: Cluster, user: str = "pkalice") -> Path:
    """The run of a launcher that has just been started (its imports alone take longer than this), once submitted."""
    before, runs = time.time(), slurm.shared(user) / "runs"
    known = set(runs.glob("*/run.json"))  # the run of the test before may be written to this second
    while True:
        found = sorted(set(runs.glob("*/run.json")) - known)
        if found and all(one.get("job_id") for one in jobs_of(found[-1].parent).values()):
            return found[-1].parent
        assert time.time() - before < 30
        time.sleep(0.2)


def train_log(run: Path) -> str:
    return (run / "logs" / f"train-{train_id(run)}_0.log").read_text(encoding="utf-8")


def without_scontrol(slurm: Cluster) -> str:
    """An override: on the nodes where train runs it is not to be had."""
    path = shim(slurm, slurm.shared("common") / "no-scontrol", "scontrol", "echo 'not for you' >&2; exit 1")["PATH"]
    return f"cluster.jobs.train.setup=['export PATH={path}']"


def decision(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "state" / "train.attempt.json").read_text(encoding="utf-8"))
    return found


def ranks(slurm: Cluster, node: str) -> list[int]:
    """The stand-in's ranks on a node: below what plays torchrun by their environment, below prefork by their names."""
    there, found = in_netns(slurm.layout.netns(node)), []
    for pid in filter(there, pids()):
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
        if name.startswith("pku-rank-") or b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
            found.append(pid)
    return found


@pytest.mark.row(
    "23", "the time limit, again and again", "saves at a step that all ranks agree on, and goes on by itself"
)
def test_warned_before_its_time_limit_again_and_again(slurm: Cluster, row: Row) -> None:
    """Slurm's own warning, real limits; the job's id stays, the dependents wait, each step is done once."""
    # Slurm looks twice a minute whom to warn in the half minute to come: 15 to 45 s after the attempt's begin
    short = ("cluster.jobs.train.time=1", "resume.signal_seconds=15")
    run = launched(slurm, f"cluster.env.STANDIN_TRAIN=steps:{LONG}", *short)
    first = train_id(run)
    found = ended(slurm, run, seconds=300)
    assert states(found) == ALL, found
    train = job(found, "train")
    assert train["job_id"] == first and train["attempt"] >= 3, found
    once_each(run, LONG)
    row.final(found["state"])
    row.work(run, LONG)
    assert len(sent(slurm, run)) == 5
    assert [one["attempt"] for one in decision(run)["history"]] == list(range(1, train["attempt"] + 1))


@EITHER
def test_a_warning_where_nothing_can_be_requeued(slurm: Cluster, launcher: str) -> None:
    """No scontrol on the nodes: TIMEOUT, with the line to type; retry goes on."""
    run = launched(slurm, STEPS, launcher, without_scontrol(slurm))
    at_step(slurm, run, 7)
    slurm.run("pkalice", ["scancel", "-s", "USR2", train_id(run)])
    found = ended(slurm, run)
    assert states(found) == {"prepare": "COMPLETED", "train": "TIMEOUT"} | dict.fromkeys(KINDS[2:], "SKIPPED"), found
    reason = job(found, "train")["reason"]
    assert "before its time limit" in reason and f"pkuslurm retry {run.name}" in reason, reason
    assert found["state"] == "TIMEOUT"
    done = verb(slurm, "retry", run)
    assert done.returncode == 0, done.stderr
    assert states(ended(slurm, run)) == ALL
    once_each(run)


@EITHER
def test_who_waits_goes_on_by_itself(slurm: Cluster, launcher: str) -> None:
    arguments = command(slurm, STEPS, launcher, without_scontrol(slurm), "wait=true", "cluster.poll_seconds=1")
    launcher = slurm.start("pkalice", arguments)
    run = newest(slurm)
    at_step(slurm, run, 7)
    slurm.run("pkalice", ["scancel", "-s", "USR2", train_id(run)])
    out, err = launcher.communicate(timeout=90)
    assert launcher.returncode == 0, err
    assert states(status(slurm, run)) == ALL
    assert out.splitlines() == [str(run)]
    once_each(run)


@EITHER
def test_preempted_within_a_short_grace(slurm: Cluster, launcher: str) -> None:
    """Slurm starts it again by itself, if it has not ended by itself before."""
    run = launched(slurm, STEPS, launcher, "cluster.jobs.train={partition: low, exclusive: true}")
    at_step(slurm, run, 7)
    slurm.run("pkbob", ["sbatch", "-N4", "--exclusive", "--wrap", "sleep 3"])
    found = ended(slurm, run, seconds=120)
    assert states(found) == ALL, found
    assert job(found, "train")["attempt"] == 2
    once_each(run)


@BOTH
def test_scancel_keeps_what_was_done(slurm: Cluster, launcher: str) -> None:
    run = launched(slurm, STEPS, launcher)
    at_step(slurm, run, 7)
    began = time.monotonic()
    slurm.run("pkalice", ["scancel", train_id(run)])
    found = ended(slurm, run)
    assert time.monotonic() - began < 20
    assert job(found, "train")["state"] == "CANCELLED" and "is kept" in job(found, "train")["reason"], found
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL
    once_each(run)


@EITHER
@pytest.mark.row("17", "a rank hangs (SIGSTOP)", "named, and gone on with without its node", within=60, repeated=9)
def test_a_rank_that_hangs_is_named_and_gone_on_without(slurm: Cluster, row: Row, launcher: str) -> None:
    run = launched(slurm, STEPS, launcher, "resume.hang_minutes=0.1")
    at_step(slurm, run, 12)
    second = job(status(slurm, run), "train")["nodes"][1]
    (rank,) = ranks(slurm, second)
    os.kill(rank, signal.SIGSTOP)
    row.happened()
    until(slurm, run, lambda found: job(found, "train")["state"] != "RUNNING", "pkalice", 60)
    row.told()
    found = ended(slurm, run, seconds=120)
    row.final(found["state"])
    row.work(run, TOTAL)
    assert states(found) == ALL, found
    assert job(found, "train")["attempt"] == 2
    assert decision(run)["bad_nodes"] == [second]
    assert second not in job(found, "train")["nodes"]
    words = train_log(run)
    assert f"rank 2 on {second} hangs: its process is stopped (SIGSTOP)" in words, words
    done = [step for _, step in steps(run)]
    assert done[-1] == TOTAL and sorted(set(done)) == list(range(1, TOTAL + 1))


@pytest.mark.row(
    "40", "a rank dies (SIGKILL)", "the whole step ends, that rank is named; `retry` goes on", within=60, repeated=5
)
@BOTH
def test_a_rank_that_dies_is_named_and_not_gone_on_with(slurm: Cluster, launcher: str, row: Row) -> None:
    run = launched(slurm, STEPS, launcher)
    found = at_step(slurm, run, 7)
    second = job(found, "train")["nodes"][1]
    (rank,) = ranks(slurm, second)
    began = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    row.happened()
    found = ended(slurm, run)
    row.told()
    assert time.monotonic() - began < 20
    assert job(found, "train")["state"] == "FAILED"
    assert job(found, "train")["reason"] == f"rank 2 on {second} was killed by signal 9 (SIGKILL)"
    last = steps(run)[-1][1]
    # a checkpoint's last file
    saved = max(int(file.parent.name.rpartition("-")[2]) for file in (run / "adapter").glob("*/trainer_state.json"))
    assert last - 5 <= saved <= last
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL
    assert decision(run)["checkpoint"].endswith(f"/checkpoint-{saved}")
    assert [step for number, step in steps(run) if number == 2] == list(range(saved + 1, TOTAL + 1))
    row.final("FAILED; COMPLETED by retry")
    row.work(run, TOTAL)


@EITHER
@pytest.mark.row(
    "16",
    "the power of one of two nodes fails in a training",
    "started again without it, from the last checkpoint",
    within=60,
    repeated=5,
)
def test_a_node_that_goes_away(slurm: Cluster, row: Row, launcher: str) -> None:
    """The power of the second node fails; the first sees its connections close and has the job started again."""
    run = launched(slurm, STEPS, launcher)
    found = at_step(slurm, run, 7)
    second = job(found, "train")["nodes"][1]
    faults.node_kill(slurm.layout, second)
    row.happened()
    until(slurm, run, lambda found: job(found, "train")["state"] != "RUNNING", "pkalice", 60)
    row.told()
    found = ended(slurm, run, seconds=150)
    assert states(found) == ALL, found
    row.final(found["state"])
    row.work(run, TOTAL)
    assert job(found, "train")["attempt"] == 2
    assert second not in job(found, "train")["nodes"]
    assert decision(run)["bad_nodes"] == [second]


@pytest.mark.row("14", "a finished job is requeued", "it says so and ends; nothing is computed again")
def test_a_finished_job_that_is_requeued(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:5")
    found = ended(slurm, run)
    assert states(found) == ALL
    before = (run / "done" / "train.json").read_bytes()
    assert slurm.run("pkalice", ["scontrol", "requeue", train_id(run)]).returncode == 0
    until(slurm, run, lambda _: "nothing to do" in train_log(run), "pkalice", 60)
    assert steps(run) == [(1, step) for step in range(1, 6)]
    assert (run / "done" / "train.json").read_bytes() == before
    assert states(status(slurm, run)) == ALL
    row.final("COMPLETED")
    row.work(run, 5)


@EITHER
def test_often_enough(slurm: Cluster, launcher: str) -> None:
    """max_attempts, and two attempts that came no further."""
    run = launched(slurm, f"cluster.env.STANDIN_TRAIN=steps:{TOTAL}", launcher, "resume.max_attempts=2")
    for attempt in (1, 2):
        at_step(slurm, run, 0, attempt)
        slurm.run("pkalice", ["scancel", "-s", "USR2", train_id(run)])
    found = ended(slurm, run)
    assert job(found, "train")["state"] == "TIMEOUT", found
    assert "resume.max_attempts=2 are used up" in job(found, "train")["reason"]


def test_no_progress(slurm: Cluster) -> None:
    """Two attempts that came no further are enough."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    for attempt in (1, 2):
        until(slurm, run, lambda _, number=attempt: begun(run, number), "pkalice", 60)
        assert slurm.run("pkalice", ["scontrol", "requeue", train_id(run)]).returncode == 0
    found = ended(slurm, run)
    assert job(found, "train")["state"] == "FAILED", found
    assert "attempts 1 and 2 were stopped before a checkpoint after step 0" in job(found, "train")["reason"]


def begun(run: Path, attempt: int) -> bool:
    file = run / "state" / "train.attempt.json"
    return file.exists() and len(decision(run)["history"]) == attempt
