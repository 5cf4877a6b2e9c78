"""Runs on a real Slurm: submitted, followed, failed, cancelled, lost and found. Training is stood in for."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.process import wait_for
from tests.cluster.runs import (
    ALL,
    KINDS,
    all_complete,
    command,
    ended,
    job,
    jobs_of,
    launch,
    launched,
    queued,
    running,
    shim,
    states,
    status,
    verb,
    views,
)
from tests.faults.recorder import Row

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_what_each_node_sees_is_what_slurm_says(slurm: Cluster) -> None:
    """Out of a hostile shell: SBATCH_* would override the script, an enclosing job's SLURM_* would kill srun."""
    hostile = {"SBATCH_PARTITION": "nosuch", "SBATCH_TIMELIMIT": "1", "SBATCH_EXPORT": "NONE", "RANK": "7"}
    hostile |= {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "1", "SLURM_MEM_PER_CPU": "1", "SQUEUE_FORMAT": "%A"}
    hostile |= {"MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "9", "MY_TOKEN": "canary-4711"}
    faults.loopback_names(slurm.layout, True)
    run = launched(slurm, "name=北大 a", "cluster.env.CANARY_TOKEN=${oc.env:MY_TOKEN}", env=hostile)
    found = ended(slurm, run)
    assert states(found) == ALL and found["state"] == "COMPLETED" and found["passed"] is True, found
    nodes = job(found, "train")["nodes"]
    seen = views(run, "train")
    assert [view["SLURMD_NODENAME"] for view in seen] == nodes and len(nodes) == 2
    assert [view["NODE_RANK"] for view in seen] == [view["SLURM_PROCID"] for view in seen] == ["0", "1"]
    assert {view["NNODES"] for view in seen} == {"2"} and {view["NPROC_PER_NODE"] for view in seen} == {"2"}
    (address,) = {view["MASTER_ADDR"] for view in seen}
    assert address in slurm.ask("scontrol", "show", "node", nodes[0]), "the head's name leads itself to 127.0.1.1"
    (port,) = {view["MASTER_PORT"] for view in seen}
    assert 10000 <= int(port) < 28000
    assert {view["GLOO_SOCKET_IFNAME"] for view in seen} == {"eth0"}
    assert {view["CANARY_TOKEN"] for view in seen} == {"canary-4711"} and {view["USER"] for view in seen} == {"pkalice"}
    written = [file for file in run.rglob("*") if file.is_file() and "views" not in file.parts]
    assert not [file for file in written if b"canary-4711" in file.read_bytes()]
    asked = ("sacct", "-X", "-n", "-P", "-o", "JobName,ReqTRES,WCKey", "-j", str(job(found, "train")["job_id"]))
    deadline = time.monotonic() + 20
    while "-train|" not in (submitted := slurm.ask(*asked)) and time.monotonic() < deadline:
        time.sleep(0.5)  # accounting lags
    assert "-train|" in submitted and "gres/npu=4" in submitted, "two on each of two nodes"
    assert "submitit" not in submitted
    assert not list(run.rglob("*.pkl"))


def test_the_printed_script_is_the_submitted_one(slurm: Cluster) -> None:
    wanted = ("cluster.time=30", "cluster.mem=500M", "cluster.cpus_per_task=2", "cluster.setup=[export A=1]")
    run = launched(slurm, *wanted, "cluster.jobs.train.time=1:00:00")
    printed = launch(slurm, *wanted, "cluster.jobs.train.time=1:00:00", "dry_run=true").stdout
    for kind, entry in jobs_of(run).items():
        text = slurm.ask("scontrol", "write", "batch_script", str(entry["job_id"]), "-")
        for other in jobs_of(run).values():
            text = text.replace(f"afterok:{other['job_id']}", "afterok:JOB_ID")
        text = text.replace(run.name, "RUN_ID")
        assert f"# sbatch script {kind}\n{text.strip()}\n" in printed, text
    assert states(ended(slurm, run)) == ALL
    assert "--wckey" not in printed and "--requeue=" not in printed and "USR2@90" not in printed


@pytest.mark.row(
    "6",
    "each kind of job fails",
    "its dependents SKIPPED, none left in the queue; `retry` does only the rest",
    repeated=1,
)
def test_a_failure_of_each_kind(slurm: Cluster, row: Row) -> None:
    runs = {kind: launched(slurm, f"cluster.env.STANDIN_{kind.upper()}=fail") for kind in KINDS[:4]}
    for kind, run in runs.items():
        found = ended(slurm, run)
        place = KINDS.index(kind)
        expected = (
            dict.fromkeys(KINDS[:place], "COMPLETED") | {kind: "FAILED"} | dict.fromkeys(KINDS[place + 1 :], "SKIPPED")
        )
        assert states(found) == expected and found["state"] == "FAILED", found
        assert "told to fail" in job(found, kind)["reason"] or "exit code 3" in job(found, kind)["reason"], found
        assert all(
            kind in job(found, later)["reason"] or "did not complete" in job(found, later)["reason"]
            for later in KINDS[place + 1 :]
        )
    wait_for(lambda: not queued(slurm), 30, "jobs whose dependency never comes true")
    last = launched(slurm)
    file = last / "jobs" / "report.json"  # no stand-in makes the report
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"command": ["false"]}), encoding="utf-8")
    assert states(ended(slurm, last)) == ALL | {"report": "FAILED"}
    # mended, and once more: what is complete is not run again
    run = runs["merge"]
    for file in (run / "jobs").glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"fail"', '""'), encoding="utf-8")
    done = verb(slurm, "retry", run)
    assert done.returncode == 0 and "merge, infer, report" in done.stderr, done.stderr
    found = ended(slurm, run)
    assert states(found) == ALL
    assert [job(found, kind)["attempt"] for kind in ("train", "merge")] == [1, 2]
    row.final("FAILED; COMPLETED by retry")
    row.work(run)
    assert jobs_of(run)["merge"]["key"].endswith("-merge-r1") and len(jobs_of(run)["merge"]["earlier"]) == 1
    assert "nothing to do" in verb(slurm, "retry", run).stderr


def test_one_node_fails_the_other_is_ended_and_the_first_reason_is_shown(slurm: Cluster) -> None:
    run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=fail:1")
    found = ended(slurm, run)
    assert job(found, "train")["state"] == "FAILED"
    assert slurm.processes("pkalice") == []
    logged = verb(slurm, "logs", run).stdout
    assert "told to fail" in logged


@pytest.mark.parametrize("kind", KINDS[:4])
def test_cancel_while_it_runs(slurm: Cluster, kind: str) -> None:
    run = launched(slurm, f"cluster.env.STANDIN_{kind.upper()}=sleep")
    running(slurm, run, kind)
    done = verb(slurm, "cancel", run, "--json")
    assert done.returncode == 0, done.stderr
    found = status(slurm, run)
    place = KINDS.index(kind)
    assert states(found) == dict.fromkeys(KINDS[:place], "COMPLETED") | dict.fromkeys(KINDS[place:], "CANCELLED"), found
    assert found["state"] == "CANCELLED"
    assert slurm.processes("pkalice") == [] and queued(slurm) == []


def test_cancel_by_scancel_and_before_anything_runs(slurm: Cluster) -> None:
    slurm.run("pkbob", ["sbatch", "-N4", "--exclusive", "--wrap", "sleep 20"])
    waiting = launched(slurm, "pipeline=train")
    assert set(states(status(slurm, waiting)).values()) == {"PENDING"}
    verb(slurm, "cancel", waiting)
    assert set(states(status(slurm, waiting)).values()) == {"CANCELLED"}
    slurm.run("pkbob", ["scancel", "-u", "pkbob"])
    by_hand = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, by_hand, "train")
    slurm.run("pkalice", ["scancel", str(jobs_of(by_hand)["train"]["job_id"])])
    found = ended(slurm, by_hand)
    assert states(found) == {"prepare": "COMPLETED", "train": "CANCELLED"} | dict.fromkeys(KINDS[2:], "CANCELLED"), (
        found
    )


def test_retry_is_refused_while_a_job_is_alive(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    done = verb(slurm, "retry", run)
    assert done.returncode == 2 and "still waits or runs" in done.stderr
    assert verb(slurm, "infer", run).returncode == 2


@pytest.mark.row("12", "no accounting", "completed, failed, skipped, cancelled are told apart all the same")
def test_without_accounting(slurm: Cluster, row: Row) -> None:
    with faults.without_accounting(slurm.layout):
        good, bad = launched(slurm), launched(slurm, "cluster.env.STANDIN_TRAIN=fail")
        stopped = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
        running(slurm, stopped, "train")
        verb(slurm, "cancel", stopped)
        assert states(ended(slurm, good)) == ALL
        expected = {"prepare": "COMPLETED", "train": "FAILED"} | dict.fromkeys(KINDS[2:], "SKIPPED")
        assert states(ended(slurm, bad)) == expected
        assert states(status(slurm, stopped)) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")
        row.final("COMPLETED, FAILED, CANCELLED")
        row.work(good)


@pytest.mark.row(
    "1",
    "sbatch gives up after 10 s (slurmctld is paused), and the job is in the queue",
    "found by its key, never sent again",
)
def test_a_controller_that_pauses_during_the_launch(slurm: Cluster, row: Row) -> None:
    """sbatch gives up after 10 s, and the job is in the queue all the same: it is found again, never sent twice."""
    process = slurm.start("pkalice", command(slurm))
    paused = False
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline and not paused:
        if queued(slurm):
            faults.pause(slurm.layout, "slurmctld")
            paused = True
        time.sleep(0.02)
    time.sleep(12 if paused else 0)
    faults.resume(slurm.layout, "slurmctld")
    row.happened()
    out, err = process.communicate(timeout=120)
    row.told()
    assert process.returncode == 0, err
    run = Path(out.splitlines()[-1])
    found = all_complete(slurm, run)
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "3",
    "the launcher is killed after each of its submissions",
    "the chain is held; `retry` sends the rest, one job each",
)
def test_a_launcher_killed_after_each_submission(slurm: Cluster, row: Row) -> None:
    runs = []
    for number in range(1, 6):
        count = slurm.shared("pkalice") / f"count-{number}"
        count.unlink(missing_ok=True)
        text = f'"$REAL" "$@" || exit $?\necho >> {count}\n[ "$(wc -l < {count})" = {number} ] && kill -9 $PPID\nexit 0'
        path = shim(slurm, slurm.shared("common") / f"shim-{number}", "sbatch", text)
        before = set((slurm.shared("pkalice") / "runs").glob("*"))
        assert launch(slurm, env=path).returncode == -signal.SIGKILL
        (run,) = set((slurm.shared("pkalice") / "runs").glob("*")) - before
        runs.append(run)
    for run in runs:
        assert set(states(status(slurm, run)).values()) == {"PENDING"}, "held until the chain is whole"
        done = verb(slurm, "retry", run)
        assert done.returncode == 0, done.stderr
    for run in runs:
        all_complete(slurm, run)
        row.work(run)
    row.final("COMPLETED by retry")


@pytest.mark.row("4", "a submit limit in the middle of the chain", "exit 3; `retry` goes on")
def test_a_chain_that_could_be_submitted_only_in_part(slurm: Cluster, row: Row) -> None:
    away = slurm.shared("pkalice") / "away"
    away.unlink(missing_ok=True)  # an earlier session's, where the cluster outlived it
    full = f'[ -e {away} ] && {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}'
    text = full + f'\n"$REAL" "$@" && touch {away}'
    path = shim(slurm, slurm.shared("common") / "shim-limit", "sbatch", text)
    done = launch(slurm, env=path)
    assert done.returncode == 3 and "pkuslurm retry" in done.stderr and done.stderr.count("\n") < 20, done.stderr
    run = Path(done.stdout.splitlines()[-1])
    assert [kind for kind, entry in jobs_of(run).items() if entry.get("job_id")] == ["prepare"]
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == ALL
    row.final("PENDING; COMPLETED by retry")
    row.work(run)


REFUSED = {
    "cluster.partition=nosuch": r"cluster\.partition=nosuch: there is no such partition; there are .*npu\*",
    "cluster.partition=short cluster.time=60": r"cluster\.time.*=60: partition short allows 2 minutes",
    "nodes=5": r"nodes=5: partition npu gives a job at most 4",
    "cluster.account=nosuch": r"Invalid account.*cluster\.account can be: ",
    "cluster.gres=gpu:1": r"cluster\.gres=gpu:1: no node of partition npu has gpu:1; they have npu:2",
    "cluster.gres=npu:9": r"cluster\.gres=npu:9: no node of partition npu has npu:9; they have npu:2",
    "cluster.gres=nosuch:1": r"[Ii]nvalid generic resource.*sinfo -o",
    "cluster.qos=nosuch": r"Invalid qos.*cluster\.qos",
    "cluster.jobs.merge.partition=nosuch": r"cluster\.jobs\.merge\.partition=nosuch: there is no such partition",
    "cluster.jobs.infer.constraint=h100": r"Slurm refuses the infer job .*Invalid feature",
    "cluster.mem=99999G": r"Slurm refuses the \w+ job .*memory",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_refused_at_once_and_nothing_is_left(slurm: Cluster, typed: str) -> None:
    there = set((slurm.shared("pkalice") / "runs").glob("*"))
    done = launch(slurm, *typed.split(" "))
    assert done.returncode == 2 and done.stdout == "", done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pkuslurm: ")]
    assert re.search(typed and REFUSED[typed], line, re.IGNORECASE), line
    assert set((slurm.shared("pkalice") / "runs").glob("*")) == there and queued(slurm) == []


@pytest.mark.row(
    "5",
    "a failed parent that Slurm has forgotten: 22.05 runs its dependents",
    "the job looks at its parent's marker itself",
)
def test_a_parent_that_slurm_has_forgotten(slurm: Cluster, row: Row) -> None:
    """22.05 runs an afterok job whose failed parent it no longer knows: the job itself looks at the marker."""
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=fail")
    ended(slurm, run)
    (script,) = (run / "logs" / ".slurm").glob(f"{jobs_of(run)['merge']['job_id']}_submission.sh")
    text = script.read_text(encoding="utf-8").replace(f"afterok:{jobs_of(run)['train']['job_id']}", "afterok:999999")
    again = run / "again.sh"
    again.write_text(text, encoding="utf-8")
    again.chmod(0o644)
    done = slurm.run("pkalice", ["sbatch", "--wait", str(again)], timeout=60)
    assert done.returncode == 1
    assert not (run / "merged").exists()
    assert job(status(slurm, run), "merge")["state"] == "SKIPPED"
    row.final("SKIPPED")
    row.work(run, begun=KINDS[:2])


def test_nothing_computes_on_a_login_node(slurm: Cluster) -> None:
    python = [str(slurm.python), "-m", "pkuslurm.launch"]
    done = slurm.run("pkalice", python)
    assert done.returncode == 2 and "login node" in done.stderr and "cluster=slurm" in done.stderr
    assert slurm.run("pkalice", [*python, "dry_run=true"]).returncode == 0


def test_following_to_the_end_and_ctrl_c(slurm: Cluster) -> None:
    done = launch(slurm, "wait=true", "cluster.poll_seconds=1", "pipeline=train")
    assert done.returncode == 0 and "COMPLETED" in done.stderr, done.stderr
    assert launch(slurm, "wait=true", "cluster.poll_seconds=1", "cluster.env.STANDIN_TRAIN=fail").returncode == 1
    started = command(slurm)
    process = slurm.start(
        "pkalice", [*started, "wait=true", "cluster.poll_seconds=1", "cluster.env.STANDIN_PREPARE=sleep"]
    )
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "the jobs go on" in err, err
    assert queued(slurm), "they do"


def test_two_users(slurm: Cluster) -> None:
    alice, bob = launched(slurm), launched(slurm, user="pkbob")
    assert states(ended(slurm, alice)) == ALL and states(ended(slurm, bob, "pkbob")) == ALL
    for arguments in (["status", alice], ["cancel", alice], ["infer", alice], ["retry", alice]):
        done = verb(slurm, *arguments, user="pkbob")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done

    assert slurm.run("pkbob", ["cat", str(alice / "run.json")]).returncode != 0
    assert states(status(slurm, alice)) == ALL


def test_one_allocation_for_the_whole_chain(slurm: Cluster) -> None:
    run = launched(slurm, "cluster.pack=true")
    bad = launched(slurm, "cluster.pack=true", "cluster.env.STANDIN_MERGE=fail")
    found = ended(slurm, run)
    assert states(found) == ALL, found
    assert len({entry["job_id"] for entry in jobs_of(run).values()}) == 1
    assert len(job(found, "train")["nodes"]) == 2 and len(job(found, "merge")["nodes"]) == 1
    expected = {
        "prepare": "COMPLETED",
        "train": "COMPLETED",
        "merge": "FAILED",
        "infer": "SKIPPED",
        "report": "SKIPPED",
    }
    assert states(ended(slurm, bad)) == expected
    stopped = launched(slurm, "cluster.pack=true", "cluster.env.STANDIN_TRAIN=sleep")
    waiting = running(slurm, stopped, "train")
    assert [job(waiting, kind)["state"] for kind in KINDS] == ["COMPLETED", "RUNNING", "PENDING", "PENDING", "PENDING"]
    verb(slurm, "cancel", stopped)
    assert states(status(slurm, stopped)) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")


@pytest.mark.row("8", "launched inside an allocation, whose SLURM_* leak", "no effect")
def test_a_launch_inside_an_allocation(slurm: Cluster, row: Row) -> None:
    """Its SLURM_* would make the inner srun a step of the outer job, or kill it."""
    inside = ["srun", "--nodes=1", "--mem=300", "--time=2", *command(slurm)]
    done = slurm.run("pkalice", inside)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.splitlines()[-1])
    found = ended(slurm, run)
    assert states(found) == ALL and len(job(found, "train")["nodes"]) == 2, found
    row.final(found["state"])
    row.work(run)
