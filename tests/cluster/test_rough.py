"""What users and chance do to a run on a real Slurm: two commands at once, Ctrl-C, kill, a moved folder, odd names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from tests.cluster.fixture import Cluster
from tests.cluster.people import identity
from tests.cluster.process import command_line, of_user, pids
from tests.cluster.runs import (
    command,
    ended,
    job,
    jobs_of,
    launch,
    launched,
    queued,
    running,
    sent,
    shim,
    standin,
    states,
    status,
    verb,
)
from tests.faults.recorder import Row

pytestmark = pytest.mark.usefixtures("nothing_is_left")

TRAIN = ("prepare", "train")


@pytest.mark.row("38", "two retries of one run at once", "one submits, the other says why not", repeated=1)
def test_two_retries_at_once_submit_once(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_PREPARE=fail")
    ended(slurm, run)
    both = [slurm.start("pkalice", [str(slurm.python), "-m", "pkuslurm", "retry", str(run)]) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    ended(slurm, run)
    assert sent(slurm, run) == ["prepare", "prepare-r1", "train", "train-r1"]
    assert any("another command is submitting" in words or "still waits or runs" in words for words in said), said
    row.final("one job each")


def test_ctrl_c_while_sbatch_works(slurm: Cluster) -> None:
    """It stops the launch, and sbatch is left to end: the job whose reply was not awaited is found by its key."""
    path = shim(
        slurm, slurm.shared("common") / "shim-slow", "sbatch", 'sleep 1; "$REAL" "$@"; code=$?; sleep 1; exit $code'
    )
    before = set((slurm.shared("pkalice") / "runs").glob("*/run.json"))
    started = command(slurm, "pipeline=train")
    process = slurm.start("pkalice", started, env=path)
    deadline = time.monotonic() + 30
    while not (new := set((slurm.shared("pkalice") / "runs").glob("*/run.json")) - before):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3 and "interrupted" in err and "pkuslurm retry" in err, err
    run = new.pop().parent
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == dict.fromkeys(TRAIN, "COMPLETED")
    assert sent(slurm, run) == ["prepare", "train"]


def test_a_merge_that_slurm_refuses_takes_nothing_away(slurm: Cluster) -> None:
    run = launched(slurm, "pipeline=train_merge")
    before = ended(slurm, run)
    text = (run / "jobs" / "merge.json").read_text(encoding="utf-8")
    asked = json.loads(text)
    asked["request"]["options"]["qos"] = "nosuch"
    (run / "jobs" / "merge.json").write_text(json.dumps(asked), encoding="utf-8")
    done = verb(slurm, "merge", run, "--force")
    assert done.returncode == 2 and "Invalid qos" in done.stderr, done.stderr
    assert status(slurm, run) == before


def test_a_moved_run_is_not_gone_on_with(slurm: Cluster) -> None:
    run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=fail")
    ended(slurm, run)
    slurm.wait_idle()  # the second node's last words are still written
    moved = run.with_name(f"{run.name}-moved")
    shutil.move(run, moved)
    done = verb(slurm, "retry", moved)
    assert done.returncode == 2 and "moved here from" in done.stderr and not run.exists(), done.stderr


def test_a_killed_worker_and_a_job_cancelled_by_hand(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    slurm.run("pkalice", ["scancel", str(jobs_of(run)["merge"]["job_id"])])
    time.sleep(1)
    mine = of_user(identity("pkalice").uid)
    workers = [pid for pid in pids() if mine(pid) and f"pkuslurm.worker {run}/jobs/train.json" in command_line(pid)]
    os.kill([pid for pid in workers if not command_line(pid).startswith("srun")][-1], signal.SIGKILL)
    found = ended(slurm, run)
    assert job(found, "train")["state"] == "FAILED" and "signal 15" not in job(found, "train")["reason"], found
    later = dict.fromkeys(("merge", "infer", "report"), "CANCELLED")
    assert states(found) == dict.fromkeys(TRAIN, "COMPLETED") | {"train": "FAILED"} | later, found


def test_names_that_a_shell_would_read(slurm: Cluster) -> None:
    root = slurm.shared("pkalice") / 'a b\'c "q" $(touch x) 北大 -z;&'
    run = launched(slurm, f"run_root={json.dumps(str(root), ensure_ascii=False)}", "cluster.setup=['# nothing']")
    assert run.parent == root
    assert set(states(ended(slurm, run)).values()) == {"COMPLETED"}
    assert sorted(file.name.split("-")[0] for file in (run / "logs").glob("*.log")) == [
        *("infer", "merge", "prepare", "report", "train", "train"),
    ]
    refused = launch(slurm, f"run_root={slurm.shared('pkalice')}/a\\\\b")
    assert refused.returncode == 2 and "choose another" in refused.stderr and queued(slurm) == []


def test_by_hand_out_of_a_training_platforms_shell(slurm: Cluster) -> None:
    """NODE_RANK and its like would make every node the first one."""
    folder = slurm.shared("pkalice") / "by hand"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier session's, where the cluster outlived it
    slurm.run("pkalice", ["mkdir", "-p", str(folder)])
    (folder / "my own.yaml").write_text("output_dir: out 1\nuse_cpu: true\n", encoding="utf-8")
    program = slurm.shared("common") / "trainer"
    ours = f'case "$*" in *pkuslurm.byhand*|*pkuslurm.worker*) exec {slurm.python} "$@";; esac'
    # the stand-in, but for the folder: the link to it is there already
    program.write_text(f'#!/bin/bash\n{ours}\nmkdir -p "$PWD/out 1"; exec {standin(slurm)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    env = {"PKUSLURM_PYTHON": str(program), "NODE_RANK": "0", "RANK": "3", "WORLD_SIZE": "9", "MASTER_ADDR": "10.9.9.9"}
    script = str(slurm.source / "sbatch" / "train.sbatch")

    def submit(yaml: str) -> tuple[int, str]:
        done = slurm.run("pkalice", ["sbatch", "--wait", "--nodes=2", script, yaml], cwd=folder, env=env)
        return done.returncode, (folder / f"train-{done.stdout.split()[-1]}.log").read_text(encoding="utf-8")

    code, said = submit("my own.yaml")
    assert code == 0 and "node 1 of 2" in said and "10.9.9.9" not in said, said
    code, said = submit("my own.yaml")
    assert code == 0 and "complete already" in said, said
    code, said = submit("nothing.yaml")
    assert code == 2 and "nothing.yaml: it cannot be read" in said, said
