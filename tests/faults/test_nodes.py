"""Nodes, time limits, preemption, requeues: each waits for Slurm's own time-outs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.runs import ALL, KINDS, ended, job, jobs_of, launched, running, states, status, until, verb
from tests.faults.recorder import Row
from tests.faults.watch import Watch

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("healed")]
NEVER_ENDED = {"PENDING", "RUNNING", "REQUEUED", "UNKNOWN", "COMPLETED"}


def mend(run: Path) -> None:
    """The stand-in's orders are taken back."""
    for file in (run / "jobs").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"sleep"', '""').replace('"fail"', '""'), encoding="utf-8")


def failed(state: str) -> dict[str, str]:
    return {"prepare": "COMPLETED", "train": state} | dict.fromkeys(KINDS[2:], "SKIPPED")


def attempts(run: Path) -> list[int]:
    """Which attempt did each step, in the order in which they were done."""
    log = run / "views" / "steps.0"
    return [int(line.split()[0]) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def another(kind: str) -> Callable[[dict[str, Any]], bool]:
    """Slurm runs the job elsewhere, or is about to."""
    return lambda found: job(found, kind)["attempt"] == 2 or job(found, kind)["state"] == "PENDING"


@pytest.mark.row(
    "16", "a node dies", "Slurm notices, and starts the job again under its id, without it", within=60, repeated=1
)
@pytest.mark.parametrize("kind", ["prepare", "train", "merge"])
def test_a_node_that_dies(slurm: Cluster, row: Row, kind: str) -> None:
    """The head of each kind of job."""
    run = launched(slurm, f"cluster.env.STANDIN_{kind.upper()}=sleep")
    running(slurm, run, kind)
    head = job(status(slurm, run), kind)["nodes"][0]
    faults.node_kill(slurm.layout, head)
    row.happened()
    mend(run)
    until(slurm, run, another(kind), "pkalice", 90)
    row.told()
    found = ended(slurm, run, seconds=180)
    assert states(found) == ALL, found
    assert job(found, kind)["attempt"] == 2 and head not in job(found, kind)["nodes"]
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "16",
    "the cable of a node is pulled",
    "started again elsewhere; what was cut off finds the newer attempt on the shared disk, and ends before that one's "
    "first step",
    within=150,
    # it saves every five steps, and goes on (four steps a second) until it sees the next one, which has chosen by then
    repeated=20,
)
def test_a_cable_that_is_pulled(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:400", "nodes=1")
    running(slurm, run, "train")
    head = job(status(slurm, run), "train")["nodes"][0]
    faults.link_down(slurm.layout, head)
    row.happened()
    until(slurm, run, lambda _: attempts(run)[-1:] == [2], "pkalice", 150)
    row.told()
    time.sleep(5)
    found = attempts(run)
    assert found == sorted(found), "once the second attempt does steps the first does none"
    assert found.count(1) > 80, "it went on long after the cable was pulled"
    assert "attempt 2 has taken over" in (run / "logs" / f"train-{jobs_of(run)['train']['job_id']}_0.log").read_text()
    faults.link_up(slurm.layout, head)  # its srun speaks to Slurm again
    last = ended(slurm, run, seconds=150)
    assert states(last) == ALL
    assert attempts(run) == sorted(attempts(run))
    row.final(last["state"])
    row.work(run, 400)


@pytest.mark.row("23", "the time limit of a job that cannot stop", "TIMEOUT, and which setting to raise", repeated=1)
def test_a_time_limit(slurm: Cluster, row: Row) -> None:
    """One that can stop goes on (test_resume.py)."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep", "cluster.jobs.train.time=1")
    running(slurm, run, "train")
    row.happened(ago=-60)
    found = ended(slurm, run, seconds=150)
    row.told()
    assert states(found) == failed("TIMEOUT"), found
    assert "cluster.time" in job(found, "train")["reason"]
    mend(run)
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL
    row.final("TIMEOUT; COMPLETED by retry")
    row.work(run)


@pytest.mark.row("16", "preemption before the first step", "Slurm starts it again", repeated=1)
def test_preempted_before_there_is_anything_to_save(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep", "cluster.partition=low", "cluster.exclusive=true")
    running(slurm, run, "train")
    mend(run)
    slurm.run("pkbob", ["sbatch", "-N4", "--exclusive", "--wrap", "sleep 5"])
    row.happened()
    until(slurm, run, another("train"), "pkalice", 90)
    row.told()
    found = ended(slurm, run, seconds=180)
    assert states(found) == ALL, found
    assert job(found, "train")["attempt"] == 2
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "14",
    "requeue: the same id, PENDING, ExitCode 0:0",
    "never shown as ended; the last attempt's word counts",
    repeated=1,
)
def test_a_requeue_in_the_middle(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    mend(run)
    with Watch(slurm, run) as watch:
        slurm.run("pkalice", ["scontrol", "requeue", str(jobs_of(run)["train"]["job_id"])])
        row.happened()
        until(slurm, run, another("train"), "pkalice", 60)
        row.told()
        found = ended(slurm, run)
    assert {*watch.states("train"), *watch.states("merge")} <= NEVER_ENDED, watch.states("train")
    assert states(found) == ALL and job(found, "train")["attempt"] == 2, found
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "15", "Slurm holds a requeued job for 120 s (cred_expire=120)", "`status` lifts it", within=40, repeated=1
)
def test_the_two_minutes_after_a_requeue(slurm: Cluster, row: Row) -> None:
    line = f"AuthInfo=socket={slurm.base}/munge/socket,cred_expire=120"
    with faults.configured(slurm.layout, line):
        run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
        running(slurm, run, "train")
        mend(run)
        slurm.run("pkalice", ["scontrol", "requeue", str(jobs_of(run)["train"]["job_id"])])
        row.happened()
        until(
            slurm, run, lambda found: (again := job(found, "train"))["attempt"] == 2 and again["nodes"], "pkalice", 130
        )
        row.told()
        found = ended(slurm, run)
    assert states(found) == ALL, found
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "17",
    "one bad node: its prolog fails",
    "Slurm drains it; what it holds is said, and `retry` goes on elsewhere",
    within=60,
)
def test_one_bad_node(slurm: Cluster, row: Row) -> None:
    """By default Slurm holds the job after that, for an administrator."""
    bad = slurm.nodes[0]
    prolog = slurm.shared("common") / "prolog"
    prolog.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" != {bad} ]\n', encoding="utf-8")
    prolog.chmod(0o755)
    with faults.configured(slurm.layout, f"Prolog={prolog}"):
        row.happened()
        run = launched(slurm, "pipeline=train")
        found = until(slurm, run, lambda found: "eld" in str(job(found, "prepare")["reason"]), "pkalice", 60)
        row.told()
        assert job(found, "prepare")["state"] == "PENDING", found
        done = verb(slurm, "retry", run)
        assert done.returncode == 0, (done.stderr, found)
        found = ended(slurm, run)
        assert states(found) == {"prepare": "COMPLETED", "train": "COMPLETED"}, found
        assert bad not in job(found, "train")["nodes"]
    row.final(found["state"])
    row.work(run)
