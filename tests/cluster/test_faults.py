"""The long fault rows: `make test-faults`. Each waits for Slurm's own time-outs; results in docs/reliability.md."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.process import wait_for
from tests.cluster.runs import (
    command,
    ended,
    job,
    jobs_of,
    launched,
    running,
    sent,
    states,
    status,
    until,
    verb,
)

pytestmark = pytest.mark.faults
KINDS = ("prepare", "train", "merge", "infer", "report")
ALL = dict.fromkeys(KINDS, "COMPLETED")


@pytest.fixture(autouse=True)
def healed(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.clear()
    # what a pulled cable has cut off hears of its end when the cable is back
    wait_for(lambda: not slurm.processes("pkalice"), 60, "an end of every process")


def mend(run: Path) -> None:
    """The stand-in's orders are taken back."""
    for file in (run / "jobs").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"sleep"', '""').replace('"fail"', '""'), encoding="utf-8")


def failed(state: str) -> dict[str, str]:
    return {"prepare": "COMPLETED", "train": state} | dict.fromkeys(KINDS[2:], "SKIPPED")


@pytest.mark.parametrize("kind", ["prepare", "train", "merge"])
def test_a_node_that_dies(slurm: Cluster, kind: str) -> None:
    """The head of each kind of job; Slurm notices, and starts the job again without it."""
    run = launched(slurm, f"cluster.env.STANDIN_{kind.upper()}=sleep")
    running(slurm, run, kind)
    head = job(status(slurm, run), kind)["nodes"][0]
    faults.node_kill(slurm.layout, head)
    mend(run)
    found = ended(slurm, run, seconds=180)
    assert states(found) == ALL, found
    assert job(found, kind)["attempt"] == 2 and head not in job(found, kind)["nodes"]


def test_a_cable_that_is_pulled(slurm: Cluster) -> None:
    """What it cut off goes on writing to the shared disk, until it finds the next attempt there."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:400", "nodes=1")
    running(slurm, run, "train")
    head = job(status(slurm, run), "train")["nodes"][0]
    faults.link_down(slurm.layout, head)
    until(slurm, run, lambda _: attempts(run)[-1:] == [2], "pkalice", 150)
    time.sleep(5)
    found = attempts(run)
    assert found == sorted(found), "once the second attempt does steps the first does none"
    assert found.count(1) > 80, "it went on long after the cable was pulled"
    assert "attempt 2 has taken over" in (run / "logs" / f"train-{jobs_of(run)['train']['job_id']}_0.log").read_text()
    faults.link_up(slurm.layout, head)  # its srun speaks to Slurm again
    assert states(ended(slurm, run, seconds=150)) == ALL
    assert attempts(run) == sorted(attempts(run))


def attempts(run: Path) -> list[int]:
    """Which attempt did each step, in the order in which they were done."""
    log = run / "views" / "steps.0"
    return [int(line.split()[0]) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def test_a_time_limit(slurm: Cluster) -> None:
    """Of a job that cannot stop; one that can goes on (test_resume.py)."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep", "cluster.jobs.train.time=1")
    found = ended(slurm, run, seconds=150)
    assert states(found) == failed("TIMEOUT"), found
    assert "cluster.time" in job(found, "train")["reason"]
    mend(run)
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL


def test_preempted_before_there_is_anything_to_save(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep", "cluster.partition=low", "cluster.exclusive=true")
    running(slurm, run, "train")
    mend(run)
    slurm.run("pkbob", ["sbatch", "-N4", "--exclusive", "--wrap", "sleep 5"])
    found = ended(slurm, run, seconds=180)
    assert states(found) == ALL, found
    assert job(found, "train")["attempt"] == 2


def test_a_controller_that_is_killed_and_comes_back(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    time.sleep(10)  # Slurm has written down what it knows
    faults.kill(slurm.layout, "slurmctld")
    lost = status(slurm, run)
    assert job(lost, "train")["state"] == "RUNNING", "accounting still says so"
    faults.pause(slurm.layout, "slurmdbd")
    lost = status(slurm, run)
    faults.resume(slurm.layout, "slurmdbd")
    assert job(lost, "train")["state"] == "UNKNOWN" and "does not answer" in job(lost, "train")["reason"], lost
    assert job(lost, "prepare")["state"] == "COMPLETED" and lost["state"] == "UNKNOWN"
    assert verb(slurm, "retry", run).returncode == 2 and verb(slurm, "cancel", run).returncode == 2
    faults.start(slurm.layout, "slurmctld")
    running(slurm, run, "train")
    verb(slurm, "cancel", run)
    assert states(status(slurm, run)) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")


def test_long_after_slurm_forgot(slurm: Cluster) -> None:
    with faults.without_accounting(slurm.layout), faults.forgetful(slurm.layout, 5):
        good, bad = launched(slurm), launched(slurm, "cluster.env.STANDIN_TRAIN=fail")
        stopped = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
        ended(slurm, good), ended(slurm, bad)
        running(slurm, stopped, "train")
        verb(slurm, "cancel", stopped)
        deadline = time.monotonic() + 90
        while slurm.ask("squeue", "-h", "-t", "all", "-o", "%i") and time.monotonic() < deadline:
            time.sleep(1)
        assert states(status(slurm, good)) == ALL
        assert states(status(slurm, bad)) == failed("FAILED")
        assert states(status(slurm, stopped)) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")
        mend(bad)
        assert verb(slurm, "retry", bad).returncode == 0
        assert states(ended(slurm, bad)) == ALL


def test_accounting_that_is_away(slurm: Cluster) -> None:
    run = launched(slurm)
    faults.pause(slurm.layout, "slurmdbd")
    found = ended(slurm, run, seconds=120)
    assert states(found) == ALL
    faults.resume(slurm.layout, "slurmdbd")


def test_launchers_killed_at_random(slurm: Cluster) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    started = command(slurm)
    runs: set[Path] = set()
    folder = slurm.shared("pkalice") / "runs"
    before = set(folder.glob("*"))
    for _ in range(12):
        process = slurm.start("pkalice", started)
        time.sleep(0.35 + moments.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    runs = set(folder.glob("*/run.json")) - {path / "run.json" for path in before}
    for path in runs:
        verb(slurm, "retry", path.parent)
    for path in runs:
        run = path.parent
        assert states(ended(slurm, run)) == ALL, f"seed {seed}"
        assert sent(slurm, run) == sorted(KINDS), f"exactly one job each; seed {seed}"


def test_a_worker_that_is_killed(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    pid = (run / "state" / "train.1.json").read_text(encoding="utf-8").split('"pid":')[1].split(",")[0]
    slurm.run("pkalice", ["kill", "-9", pid.strip()])
    found = ended(slurm, run)
    assert states(found) == failed("FAILED"), found
    assert len(jobs_of(run)) == 5


def test_more_points_than_an_array_can_have(slurm: Cluster) -> None:
    """1,200 with MaxArraySize 1001: arrays of what one can have, and every point exactly once."""
    assert re.search(r"MaxArraySize\s*=\s*1001\b", slurm.ask("scontrol", "show", "config"))
    varied = ("train.learning_rate=1e-5,2e-5,5e-5,1e-4", "train.warmup_steps=range(300)")
    sweep = launched(slurm, "-m", *varied, "pipeline=train", "nodes=1")
    groups = [json.loads((sweep / "groups" / f"{n}.json").read_text(encoding="utf-8")) for n in range(3)]
    assert [len(group["members"]) for group in groups] == [1, 1001, 199]
    assert not (sweep / "groups" / "3.json").exists()
    points = {str(number) for number in range(1200)}
    assert {*groups[1]["members"], *groups[2]["members"]} == points
    deadline = time.monotonic() + 800
    while (shown := screen(slurm, sweep))[0].split(", ")[0].endswith(("PENDING", "RUNNING")):
        assert time.monotonic() < deadline, shown
        time.sleep(10)  # a look costs what three points cost
    assert shown[0].endswith(": COMPLETED, 1200 points: 1200 COMPLETED"), shown
    assert {path.parent.parent.name for path in sweep.glob("*/views/train.0.json")} == points
    attempts = Counter(
        json.loads(file.read_text(encoding="utf-8"))["attempt"] for file in sweep.glob("*/state/train.json")
    )
    assert attempts == {1: 1200}
    ids = [group["jobs"]["train"]["job_id"] for group in groups[1:]]
    wanted = {f"{ids[0]}_{n}" for n in range(1001)} | {f"{ids[1]}_{n}" for n in range(199)}
    rows = trains(slurm, sweep)
    assert len(rows) == 1200 and set(rows) == {f"{element}|COMPLETED" for element in wanted}, "no other jobs"


def screen(slurm: Cluster, sweep: Path) -> list[str]:
    """What `status` says: of however many points one screen."""
    done = verb(slurm, "status", sweep)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24, done.stdout
    return lines


def trains(slurm: Cluster, sweep: Path) -> list[str]:
    """``ELEMENT|STATE`` of every training that was ever submitted for the sweep, by accounting, which lags."""
    rows: list[str] = []
    for _ in range(30):
        told = slurm.ask("sacct", "-X", "-P", "-n", "-D", "-u", "pkalice", "-o", "JobName,JobID,State")
        rows = [line.partition("|")[2] for line in told.splitlines() if line.startswith(f"{sweep.name}-train")]
        if len(rows) >= 1200 and not any(row.endswith(("PENDING", "RUNNING")) for row in rows):
            break
        time.sleep(1)
    return rows
