"""What goes wrong while a run is submitted: each of its jobs is sent, once, or the launch says what to do."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
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
    shim,
    states,
    status,
    verb,
)
from tests.faults.recorder import Row
from tests.faults.watch import Watch

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("healed")]


def runs(slurm: Cluster) -> set[Path]:
    return {file.parent for file in (slurm.shared("pkalice") / "runs").glob("*/run.json")}


def flagged(slurm: Cluster, name: str, text: str) -> tuple[dict[str, str], Path]:
    """A shim of sbatch, and the file by which it and the test tell each other how far they are."""
    flag = slurm.shared("pkalice") / name
    for file in flag.parent.glob(f"{name}*"):
        file.unlink()
    return shim(slurm, slurm.shared("common") / f"shim-{name}", "sbatch", text.replace("FLAG", str(flag))), flag


def just_saved(slurm: Cluster) -> None:
    """slurmctld writes its state down at most every five seconds: what comes next it knows by heart alone."""
    slurm.run("pkbob", ["sbatch", "--wrap", "true", "-o", "/dev/null"])
    time.sleep(0.3)


def names(slurm: Cluster, run: Path) -> set[str]:
    """The keys of its jobs that the controller knows."""
    return {name for name in slurm.ask("squeue", "-h", "-t", "all", "-o", "%j").split() if name.startswith(run.name)}


def forgotten_in_part(slurm: Cluster, *overrides: str) -> tuple[Path, set[str]]:
    """A run, and the keys of its jobs that a killed controller has forgotten."""
    for _ in range(4):  # it may have been saved in between, on a slow machine
        just_saved(slurm)
        run = launched(slurm, *overrides)
        before = names(slurm, run)
        restart(slurm)
        if lost := before - names(slurm, run):
            return run, lost
        verb(slurm, "cancel", run)
    raise AssertionError("the controller has forgotten nothing: the test shows nothing")


def complete_by_retry(slurm: Cluster, run: Path, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while (found := status(slurm, run))["state"] != "COMPLETED":
        assert time.monotonic() < deadline, found
        faults.undrain(slurm.layout)  # Slurm gives an id anew whose first job still runs, and drains the node for it
        verb(slurm, "retry", run)  # refused where all goes its way
        time.sleep(2)


def restart(slurm: Cluster) -> None:
    faults.kill(slurm.layout, "slurmctld")
    faults.start(slurm.layout, "slurmctld")


@pytest.mark.row("2", "slurmctld is killed between two submissions and forgets what it had taken", "exit 3; `retry`")
def test_jobs_that_are_lost_during_the_launch(slurm: Cluster, row: Row) -> None:
    """The reply to the last sbatch is there, the others' jobs are gone, and their ids are given away anew."""
    text = '"$REAL" "$@" || exit $?\necho >> FLAG\n[ "$(wc -l < FLAG)" = 5 ] || exit 0\n'
    text += "while [ ! -e FLAG-on ]; do sleep 0.1; done"
    path, flag = flagged(slurm, "lost", text)
    before = runs(slurm)
    just_saved(slurm)
    launcher = slurm.start("pkalice", command(slurm), env=path)
    wait_for(lambda: flag.exists() and flag.read_text().count("\n") == 5, 60, "five submissions")
    faults.kill(slurm.layout, "slurmctld")
    row.happened()
    faults.start(slurm.layout, "slurmctld")
    there = slurm.ask("squeue", "-h", "-u", "pkalice", "-o", "%j").split()
    slurm.run("pkalice", ["sbatch", "-n1", "--array=0-9", "--wrap", "sleep 3", "-o", "/dev/null", "-J", "another"])
    (flag.parent / "lost-on").touch()
    _, err = launcher.communicate(timeout=120)
    (run,) = runs(slurm) - before
    assert len(there) < 5, "it has forgotten nothing: the test shows nothing"
    assert launcher.returncode == 3 and "Slurm has lost" in err and "pkuslurm retry" in err, err
    row.told()
    assert verb(slurm, "retry", run).returncode == 0
    found = ended(slurm, run)
    assert states(found) == ALL, found
    names = [name for name in slurm.ask("squeue", "-h", "-t", "all", "-o", "%j %T").splitlines() if "another" in name]
    assert names and not any("CANCELLED" in name for name in names), "another's job is let alone"
    row.final("exit 3; COMPLETED by retry")
    row.work(run)


@pytest.mark.row(
    "2", "slurmctld is killed right after the launch; its ids are given to other jobs", "never shown as theirs; `retry`"
)
def test_jobs_that_are_lost_after_the_launch(slurm: Cluster, row: Row) -> None:
    run, lost = forgotten_in_part(slurm)
    slurm.run(
        "pkalice", ["sbatch", "-n1", "--array=0-4", "--wrap", "sleep 4; false", "-o", "/dev/null", "-J", "another"]
    )
    with Watch(slurm, run) as watch:
        time.sleep(8)
    for kind in KINDS:  # whatever is there of it may go on; what is lost is unknown
        assert {*watch.states(kind)} <= {"PENDING", "RUNNING", "COMPLETED", "UNKNOWN", "SKIPPED"}, watch.states(kind)
    assert "UNKNOWN" in watch.states(next(kind for kind in KINDS if f"{run.name}-{kind}" in lost)), lost
    complete_by_retry(slurm, run)
    assert states(status(slurm, run)) == ALL
    row.final(f"{len(lost)} of 5 forgotten: {', '.join(watch.of_run())}; COMPLETED by retry")
    row.work(run)


@pytest.mark.row(
    "2", "slurmctld is killed right after a sweep was submitted", "UNKNOWN or waiting; `retry`, every training once"
)
def test_arrays_that_are_lost(slurm: Cluster, row: Row) -> None:
    sweep, lost = forgotten_in_part(slurm, "-m", "train.learning_rate=1e-5,5e-5,1e-4", "nodes=1")
    slurm.run("pkalice", ["sbatch", "-n1", "--array=0-4", "--wrap", "sleep 4", "-o", "/dev/null", "-J", "another"])
    with Watch(slurm, sweep) as watch:
        time.sleep(6)
    assert {*watch.of_run()} <= {"PENDING", "RUNNING", "UNKNOWN", "COMPLETED"}, watch.of_run()
    complete_by_retry(slurm, sweep)
    for point in range(3):
        row.work(sweep / str(point))
    row.final(f"{len(lost)} forgotten: {', '.join(watch.of_run())}; COMPLETED by retry")


@pytest.mark.row("3", "the client dies between send and reply (SIGHUP)", "`retry` finds the job by its key", repeated=0)
def test_a_client_that_dies_before_the_reply(slurm: Cluster, row: Row) -> None:
    path, flag = flagged(slurm, "hup", 'touch FLAG; exec "$REAL" "$@"')
    before = runs(slurm)
    launcher = slurm.start("pkalice", command(slurm), env=path)
    wait_for(lambda: bool(runs(slurm) - before), 60, "the run", every=0.01)
    faults.pause(slurm.layout, "slurmctld")
    wait_for(flag.exists, 30, "sbatch to be called")
    time.sleep(1)
    os.killpg(launcher.pid, signal.SIGHUP)
    launcher.communicate(timeout=30)
    faults.resume(slurm.layout, "slurmctld")
    row.happened()
    (run,) = runs(slurm) - before
    wait_for(lambda: bool(queued(slurm)), 20, "the job that nobody has heard of")
    shown = status(slurm, run)
    row.told()
    assert {*states(shown).values()} == {"PENDING"}, shown
    assert all(entry.get("job_id") is None for entry in jobs_of(run).values())
    assert verb(slurm, "retry", run).returncode == 0
    found = all_complete(slurm, run)
    row.final(found["state"])
    row.work(run)


@pytest.mark.row(
    "4",
    "the first, third, last stage cannot be submitted",
    "exit 3, the chain is held; `retry` completes it, one job each",
)
def test_a_stage_that_cannot_be_submitted(slurm: Cluster, row: Row) -> None:
    cut = []
    for number in (1, 3, 5):
        text = 'echo >> FLAG\n[ "$(wc -l < FLAG)" -lt NUMBER ] && exec "$REAL" "$@"\nkill -9 $$'
        path, _ = flagged(slurm, f"stage-{number}", text.replace("NUMBER", str(number)))
        done = launch(slurm, env=path)
        row.happened()
        assert done.returncode == 3 and "pkuslurm retry" in done.stderr, done.stderr
        run = Path(done.stdout.splitlines()[-1])
        assert [kind for kind, entry in jobs_of(run).items() if entry.get("job_id")] == list(KINDS[: number - 1])
        assert {*states(status(slurm, run)).values()} == {"PENDING"}
        row.told()
        cut.append(run)
    for run in cut:
        assert verb(slurm, "retry", run).returncode == 0
    for run in cut:
        all_complete(slurm, run)
        row.work(run)
    row.final("PENDING; COMPLETED by retry")


@pytest.mark.row(
    "7", "a QOS that takes two jobs (MaxSubmitJobs), wait=true", "what fits goes, the rest when there is room"
)
def test_a_qos_with_two_jobs(slurm: Cluster, row: Row) -> None:
    wanted = ("train.learning_rate=1e-5,5e-5", "pipeline=train", "nodes=1", "cluster.qos=tight", "cluster.time=4")
    sweep = launch(slurm, "-m", *wanted, "wait=true", "cluster.poll_seconds=1")
    assert sweep.returncode == 0, sweep.stderr
    path = Path(sweep.stdout.splitlines()[-1])
    found = status(slurm, path)
    assert found["counts"] == {"COMPLETED": 2}, found
    row.final(found["state"])
    for point in ("0", "1"):
        row.work(path / point)


@pytest.mark.row("7", "MaxArraySize=11 and a sweep of 25 points", "arrays of 11, 11, 3; every point once")
def test_arrays_of_eleven(slurm: Cluster, row: Row) -> None:
    with faults.configured(slurm.layout, "MaxArraySize=11"):
        varied = "train.warmup_steps=range(25)"
        sweep = launched(slurm, "-m", varied, "pipeline=train", "nodes=1")
        deadline = time.monotonic() + 200
        while (found := status(slurm, sweep))["state"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, found
            time.sleep(2)
    sizes = [len(json.loads(file.read_text())["members"]) for file in sorted((sweep / "groups").glob("*.json"))]
    assert sorted(sizes) == [1, 3, 11, 11] and found["counts"] == {"COMPLETED": 25}, (sizes, found)
    done = [(sweep / str(n) / "views" / "begun").read_text().splitlines() for n in range(25)]
    row.final(found["state"])
    row.counted(25 - len(done), sum(len(lines) - 1 for lines in done), "25 points")


@pytest.mark.row(
    "21", "the log folder is taken away before the job starts", "FAILED, with Slurm's reason; `retry` makes it anew"
)
def test_a_log_folder_that_is_gone(slurm: Cluster, row: Row) -> None:
    """What Slurm alone would leave: 0:53 and no log anywhere."""
    slurm.run("pkbob", ["sbatch", "-N4", "--exclusive", "--wrap", "sleep 60", "-o", "/dev/null"])
    run = launched(slurm, "pipeline=train")
    assert states(status(slurm, run))["prepare"] == "PENDING"
    (run / "logs").rename(run / "elsewhere")
    slurm.run("pkbob", ["scancel", "-u", "pkbob"])
    row.happened()
    found = ended(slurm, run)
    row.told()
    assert states(found) == {"prepare": "FAILED", "train": "SKIPPED"}, found
    assert "log" in job(found, "prepare")["reason"], found
    assert verb(slurm, "retry", run).returncode == 0
    assert {*states(ended(slurm, run)).values()} == {"COMPLETED"}
    assert (run / "logs").is_dir()
    row.final("FAILED; COMPLETED by retry")
    row.work(run)


@pytest.mark.row(
    "7", "a sweep of 1,200 points, MaxArraySize 1001", "arrays of 1,001 and 199; every point once, and no job more"
)
def test_more_points_than_an_array_can_have(slurm: Cluster, row: Row) -> None:
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
    row.final("COMPLETED")
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
    row.counted(len(wanted) - len(set(rows)), len(rows) - len(set(rows)), "1200 points")


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
