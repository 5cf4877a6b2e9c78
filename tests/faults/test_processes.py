"""Processes that die in the middle, or say that all is well when it is not; and jobs that come after what failed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.fixture import Cluster
from tests.cluster.people import identity
from tests.cluster.process import command_line, in_netns, of_user, pids, wait_for
from tests.cluster.runs import ALL, KINDS, command, ended, job, jobs_of, launched, running, sent, shim, states, verb
from tests.faults.recorder import Row
from tests.faults.test_nodes import failed, mend

pytestmark = pytest.mark.usefixtures("healed")
slow = pytest.mark.faults


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
    assert states(found) == ALL | {"merge": "FAILED", "infer": "SKIPPED", "report": "SKIPPED"}, found
    assert "model.safetensors" in job(found, "merge")["reason"], found
    row.final(found["state"])
    row.work(run, begun=KINDS[:3])


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
    row.final(found["state"])
    row.work(run, begun=KINDS[:2])


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
    assert states(found) == failed("FAILED"), found
    assert "DependencyNeverSatisfied" in slurm.ask("squeue", "-h", "-u", "pkalice", "-o", "%r")
    mend(run)
    done = verb(slurm, "retry", run)
    assert done.returncode == 0, done.stderr
    found = ended(slurm, run)
    assert states(found) == ALL, found
    row.final("FAILED; COMPLETED by retry")


KILLS = {
    "before": 'kill -9 $PPID; exec "$REAL" "$@"',  # Slurm takes a job that nobody waits for
    "instead of": "kill -9 $PPID $$",
    "after": '"$REAL" "$@"; kill -9 $PPID; exit 0',  # and the launcher has not read its number
}


@slow
@pytest.mark.row(
    "E1",
    "launchers are killed at random moments from run.json to the last sbatch, twelve of them",
    "`retry`: every run completes, exactly one job each",
)
def test_launchers_killed_at_random(slurm: Cluster, row: Row) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"SEED={seed}")
    moments = random.Random(seed)
    runs = slurm.shared("pkalice") / "runs"
    killed: Counter[str] = Counter()
    cut: list[Path] = []
    for number in range(12):
        before = set(runs.glob("*/run.json"))
        how, which = moments.choice(["on its way", *KILLS]), moments.randint(1, 5)
        killed[how] += 1
        env = None if how == "on its way" else nth(slurm, number, which, KILLS[how])
        process = slurm.start("pkalice", command(slurm), env=env)
        if env is None:
            wait_for(lambda before=before: bool(set(runs.glob("*/run.json")) - before), 60, "the run", every=0.01)  # type: ignore[misc]
            time.sleep(moments.random() * 0.5)
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"SEED={seed}: it had ended by itself"
        cut += [file.parent for file in set(runs.glob("*/run.json")) - before]
    assert len(cut) == 12, f"SEED={seed}"
    known = [sum(entry.get("job_id") is not None for entry in jobs_of(run).values()) for run in cut]
    assert min(known) < len(KINDS), "all were submitted: the test shows nothing"
    for run in cut:
        done = verb(slurm, "retry", run)
        assert done.returncode == 0, (f"SEED={seed}", done.stderr)
    for run in cut:
        assert states(ended(slurm, run)) == ALL, f"SEED={seed}"
        assert sent(slurm, run) == sorted(KINDS), f"exactly one job each; SEED={seed}"
        row.work(run)
    ways = ", ".join(f"{count} {how}" + (" an sbatch" if how in KILLS else "") for how, count in killed.items())
    row.final(f"COMPLETED by retry; killed: {ways}")


def nth(slurm: Cluster, number: int, which: int, text: str) -> dict[str, str]:
    """Of launcher ``number`` the sbatch ``which`` is ``text``, those before it are as ever."""
    count = slurm.shared("pkalice") / f"killed-{number}"
    count.unlink(missing_ok=True)
    whole = f'echo >> {count}\n[ "$(wc -l < {count})" = {which} ] || exec "$REAL" "$@"\n{text}'
    return shim(slurm, slurm.shared("common") / f"shim-killed-{number}", "sbatch", whole)
