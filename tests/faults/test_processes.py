"""Processes that die in the middle, or say that all is well when it is not; and jobs that come after what failed."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.cluster.fixture import Cluster
from tests.cluster.people import identity
from tests.cluster.process import command_line, in_netns, of_user, pids
from tests.cluster.runs import (
    command,
    ended,
    job,
    jobs_of,
    launched,
    running,
    sent,
    shim,
    states,
    verb,
)
from tests.faults.recorder import Row
from tests.faults.test_nodes import failed, mend

pytestmark = pytest.mark.usefixtures("healed")
slow = pytest.mark.faults
KINDS = ("prepare", "train", "merge", "infer", "report")
ALL = dict.fromkeys(KINDS, "COMPLETED")


def mine(slurm: Cluster, words: str) -> list[int]:
    """pkalice's processes on this cluster's nodes whose command line begins so."""
    own, nodes = of_user(identity("pkalice").uid), [in_netns(slurm.layout.netns(name)) for name in slurm.nodes]
    there = [pid for pid in pids() if own(pid) and any(on(pid) for on in nodes)]
    return [pid for pid in there if command_line(pid).startswith(words)]


@pytest.mark.row(
    "18", "a child is killed (as by OOM), its parent exits 0, what it made is torn", "FAILED, and what is missing"
)
def test_a_child_is_killed_and_nobody_says_so(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_MERGE=torn")
    found = ended(slurm, run)
    row.happened()
    assert states(found) == ALL | {"merge": "FAILED", "infer": "SKIPPED", "report": "SKIPPED"}, found
    assert "model.safetensors" in job(found, "merge")["reason"], found
    row.final(found["state"])
    row.work(run)


@slow
@pytest.mark.row("19", "srun of the step is killed with SIGKILL", "FAILED; nothing of the step goes on")
def test_srun_is_killed(slurm: Cluster, row: Row) -> None:
    """In a script of one's own the job would be COMPLETED 0:0 (`srun false | cat`)."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    for pid in mine(slurm, "srun "):
        os.kill(pid, signal.SIGKILL)
    row.happened()
    found = ended(slurm, run)
    row.told()
    assert states(found) == failed("FAILED"), found
    mend(run)
    row.clean()
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL
    row.final("FAILED; COMPLETED by retry")


@slow
@pytest.mark.row("19", "a worker is killed with SIGKILL", "FAILED; the other node is ended", within=30)
def test_a_worker_dies_by_sigkill(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    pid = (run / "state" / "train.1.json").read_text(encoding="utf-8").split('"pid":')[1].split(",")[0]
    slurm.run("pkalice", ["kill", "-9", pid.strip()])
    row.happened()
    found = ended(slurm, run)
    row.told()
    assert states(found) == failed("FAILED"), found
    assert len(jobs_of(run)) == 5
    row.final(found["state"])
    row.work(run)


@slow
@pytest.mark.row(
    "6", "a site that leaves orphans in the queue (DependencyNeverSatisfied)", "SKIPPED; `retry` takes them away first"
)
def test_orphans_that_stay(slurm: Cluster, row: Row) -> None:
    """As without --kill-on-invalid-dep, which some sites' Slurm does not heed."""
    folder = slurm.shared("common") / "shim-orphans"
    env = shim(
        slurm, folder, "sbatch", 'for f in "$@"; do :; done; sed -i "/kill-on-invalid-dep/d" "$f"; exec "$REAL" "$@"'
    )
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=fail", env=env)
    found = ended(slurm, run)
    row.happened()
    assert states(found) == failed("FAILED"), found
    row.told()
    assert "DependencyNeverSatisfied" in slurm.ask("squeue", "-h", "-u", "pkalice", "-o", "%r")
    mend(run)
    done = verb(slurm, "retry", run)
    assert done.returncode == 0, done.stderr
    found = ended(slurm, run)
    assert states(found) == ALL, found
    row.final("FAILED; COMPLETED by retry")


@slow
@pytest.mark.row(
    "E1", "launchers are killed at random moments, twelve of them", "`retry`: every run completes, exactly one job each"
)
def test_launchers_killed_at_random(slurm: Cluster, row: Row) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    started = command(slurm)
    folder = slurm.shared("pkalice") / "runs"
    before = set(folder.glob("*"))
    for _ in range(12):
        process = slurm.start("pkalice", started)
        time.sleep(0.35 + moments.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    runs = set(folder.glob("*/run.json")) - {path / "run.json" for path in before}
    row.happened()
    for path in runs:
        verb(slurm, "retry", path.parent)
    for path in runs:
        run = path.parent
        assert states(ended(slurm, run)) == ALL, f"seed {seed}"
        assert sent(slurm, run) == sorted(KINDS), f"exactly one job each; seed {seed}"
        row.work(run)
    row.final("COMPLETED by retry")
