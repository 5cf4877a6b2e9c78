"""Arrays, storms, a controller that is away, clocks and ports, on the real Slurm."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
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
    running,
    sent,
    shim,
    states,
    status,
    verb,
    views,
)
from tests.cluster.test_resume import at_step, newest
from tests.cluster.test_sweep import begun, look, over, table
from tests.faults.recorder import Row
from tests.faults.test_worker_faults import CLOCK

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("healed")]


def done_steps(run: Path) -> list[tuple[int, int]]:
    log = run / "views" / "steps.0"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


@pytest.mark.row(
    "24", "one element of an array is warned, and requeues itself", "that one alone goes on in a next attempt"
)
def test_a_requeue_of_one_element(slurm: Cluster, row: Row) -> None:
    steps = "cluster.env.STANDIN_TRAIN=steps:100"
    sweep = launched(slurm, "-m", "train.learning_rate=1e-5,5e-5,1e-4", steps, "nodes=1", "pipeline=train")
    deadline = time.monotonic() + 90
    while not all(any(step >= 7 for _, step in done_steps(sweep / str(point))) for point in range(3)):
        assert time.monotonic() < deadline, table(look(slurm, sweep))
        time.sleep(0.2)
    array = look(slurm, sweep)["runs"][1]["jobs"][-1]["job_id"]
    assert array.endswith("_1")
    slurm.run("pkalice", ["scancel", "-s", "USR2", array])
    found = over(slurm, sweep, 240)
    assert table(found) == ["CC"] * 3, found
    assert begun(sweep, "train") == {0: 1, 1: 2, 2: 1}
    for point in range(3):
        assert [step for _, step in done_steps(sweep / str(point))] == list(range(1, 101))
    row.final(found["state"])
    row.counted(0, 0, "300 steps")


@pytest.mark.row(
    "25", "an array that Slurm writes as [2-9%2]", "each point is counted, as PENDING; the end is when all have ended"
)
def test_an_array_in_brackets(slurm: Cluster, row: Row) -> None:
    rates = ",".join(f"{number}e-5" for number in range(1, 11))
    sweep = launched(
        slurm, "-m", f"train.learning_rate={rates}", "nodes=1", "pipeline=train", "cluster.array_parallelism=2"
    )
    brackets = False
    while (found := look(slurm, sweep))["state"] in ("PENDING", "RUNNING"):
        brackets = brackets or "%2]" in slurm.ask("squeue", "-h", "-o", "%i")
        trains = [run["jobs"][-1]["state"] for run in found["runs"]]
        assert len(trains) == 10 and set(trains) <= {"PENDING", "RUNNING", "COMPLETED"}
        assert sum(state == "RUNNING" for state in trains) <= 2
    assert brackets, "Slurm has never written it so"
    assert table(found) == ["CC"] * 10 and set(begun(sweep, "train").values()) == {1}
    row.final(found["state"])
    row.counted(0, 0, "10 points")


@pytest.mark.row(
    "27", "a sweep of 60 points is waited for, polled every 3 s", "a question is one call, however many points"
)
def test_a_storm_of_questions(slurm: Cluster, row: Row) -> None:
    log = slurm.shared("pkalice") / "asked"
    log.unlink(missing_ok=True)
    path = {}
    for name in ("squeue", "sacct", "scontrol", "sbatch"):
        text = f'echo "{name} ${{#*}} $*" >> {log}\nexec "$REAL" "$@"'
        path = shim(slurm, slurm.shared("common") / "shim-counting", name, text)
    varied = ("train.learning_rate=range(1,61)", "pipeline=train", "nodes=1")
    began = time.monotonic()
    words = ("-m", *varied, "cluster.array_parallelism=16", "wait=true", "cluster.poll_seconds=3")
    done = launch(slurm, *words, env=path, timeout=550)
    took = time.monotonic() - began
    assert done.returncode in (0, 1), done.stderr
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if line[0] in ("squeue", "sacct")]
    sweep = Path(done.stdout.splitlines()[-1])
    assert look(slurm, sweep)["counts"] == {"COMPLETED": 60}
    assert len([line for line in lines if line[0] == "sbatch"]) <= 4
    assert len(asked) <= 2 * took / 3 + 10, f"{len(asked)} questions in {took:.0f} s"
    assert max(sum(map(len, line)) for line in lines) < 2000
    row.final(f"{len(asked)} questions in {took:.0f} s")
    row.counted(0, 0, "60 points")


@pytest.mark.row("27", "a question about 10,000 jobs", "a few calls that a command line holds; the answer is whole")
def test_ten_thousand_ids(slurm: Cluster, row: Row) -> None:
    log = slurm.shared("pkalice") / "asked"
    log.unlink(missing_ok=True)
    path = shim(slurm, slurm.shared("common") / "shim-ids", "squeue", f'echo x >> {log}\nexec "$REAL" "$@"')
    text = "from pkuslurm.slurm import commands; print(commands.queue([str(n) for n in range(1, 10001)]).complete)"
    done = slurm.run("pkalice", [str(slurm.python), "-c", text], env=path)
    assert done.stdout == "True\n", done
    calls = len(log.read_text(encoding="utf-8").splitlines())
    assert calls <= 20
    row.final(f"{calls} calls")


@pytest.mark.row(
    "28",
    "the controller is away for a minute",
    "UNKNOWN, with the reason; what has ended stays; a launch waits, or says `retry`",
)
def test_a_controller_that_is_away(slurm: Cluster, row: Row) -> None:
    over_with = launched(slurm)
    assert states(ended(slurm, over_with)) == ALL
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:60")
    at_step(slurm, run, 2)
    faults.pause(slurm.layout, "slurmctld")
    began = time.monotonic()
    found = status(slurm, over_with)
    assert states(found) == ALL, "from the files alone"
    seen = {job(status(slurm, run), "train")["state"]}
    done = launch(slurm)
    assert done.returncode in (2, 3) and "Traceback" not in done.stderr, done
    made = Path(done.stdout.splitlines()[-1]) if done.returncode == 3 else None
    if made is not None:
        assert "retry" in done.stderr
    while time.monotonic() - began < 60:
        seen.add(job(status(slurm, run), "train")["state"])
    assert seen <= {"UNKNOWN", "RUNNING", "COMPLETED"}, seen
    faults.resume(slurm.layout, "slurmctld")
    row.happened()
    assert states(ended(slurm, run)) == ALL
    row.told()
    if made is not None:
        verb(slurm, "retry", made)
        all_complete(slurm, made)
    assert [step for _, step in done_steps(run)] == list(range(1, 61))
    row.final("COMPLETED")
    row.work(run, 60)


@pytest.mark.row(
    "36", "the clock of the submit host jumps an hour forward, and two back, while it waits", "no effect", within=60
)
def test_a_clock_that_jumps_while_it_waits(slurm: Cluster, row: Row) -> None:
    folder = slurm.shared("common") / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    clock = folder / "now"
    clock.write_text("0", encoding="utf-8")
    env = {"PYTHONPATH": str(folder), "CLOCK": str(clock)}
    words = command(slurm, "cluster.env.STANDIN_TRAIN=steps:40", "nodes=1", "wait=true", "cluster.poll_seconds=1")
    process = slurm.start("pkalice", words, env=env)
    run = newest(slurm)
    for step, jump in ((3, 3600), (15, -3600)):
        at_step(slurm, run, step)
        clock.write_text(str(jump), encoding="utf-8")
        found = json.loads(verb(slurm, "status", run, "--json", env=env).stdout)
        assert job(found, "train")["state"] in ("RUNNING", "COMPLETED"), found
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.splitlines() == [str(run)], err
    assert states(status(slurm, run)) == ALL
    assert sent(slurm, run) == sorted(KINDS)
    row.final("COMPLETED")
    row.work(run, 40)


@pytest.mark.row("38", "two retries at once, on two hosts", "one submits, the other says why not", repeated=1)
def test_two_hosts_at_once(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_PREPARE=fail")
    ended(slurm, run)
    both = []
    for node in slurm.nodes[:2]:
        pid = (slurm.layout.base / "pids" / node).read_text(encoding="utf-8").split()[0]
        words = [str(slurm.python), "-m", "pkuslurm", "retry", str(run)]
        as_her = ["setpriv", "--reuid=pkalice", "--regid=pkalice", "--init-groups", *words]
        home = str(slurm.shared("pkalice"))
        env = {"PATH": "/usr/bin:/bin", "HOME": home, "SLURM_CONF": str(slurm.layout.conf)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        entered = ["nsenter", "--all", "-t", pid, "--wdns=" + home, *as_her]
        both.append(subprocess.Popen(entered, env=env, text=True, **pipes))  # type: ignore[call-overload]
    said = [process.communicate(timeout=90)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    refused = next(words for process, words in zip(both, said, strict=True) if process.returncode == 2)
    assert "another command is submitting" in refused or "still waits or runs" in refused, said
    ended(slurm, run)
    assert sent(slurm, run) == ["prepare", "prepare-r1", "train", "train-r1"]
    row.final("one job each")


@contextmanager
def taken(slurm: Cluster, ports: range) -> Iterator[None]:
    """On every node."""
    held = []
    text = (
        "import socket, sys, time; found = [socket.create_server(('', int(port))) for port in sys.argv[1:]]; "
        "print('held', flush=True); time.sleep(900)"
    )
    for node in slurm.nodes:
        pid = (slurm.layout.base / "pids" / node).read_text(encoding="utf-8").split()[0]
        words = ["nsenter", "-n", "-t", pid, "python3", "-c", text, *map(str, ports)]
        held.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    try:
        for process in held:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield
    finally:
        for process in held:
            process.kill()
            process.communicate()


@pytest.mark.row(
    "39", "the port that a job would take for its ranks is taken, on every node", "all meet at the next free one"
)
def test_a_port_that_is_taken_on_the_node(slurm: Cluster, row: Row) -> None:
    first = launched(slurm, "pipeline=train")
    ended(slurm, first)
    last = int(jobs_of(first)["train"]["job_id"])
    with taken(slurm, range(10000 + last, 10000 + last + 30)):
        run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:10")
        assert states(ended(slurm, run)) == ALL
    seen = {view["MASTER_PORT"] for view in views(run, "train")}
    assert len(seen) == 1 and int(seen.pop()) >= 10000 + last + 30
    row.final("COMPLETED")
    row.work(run, 10)


@pytest.mark.row(
    "44", "scancel at a random moment of a merge, six times", "CANCELLED, or complete and proved; `retry` completes"
)
def test_a_merge_cancelled_at_any_moment(slurm: Cluster, row: Row) -> None:
    run = launched(slurm)
    assert states(ended(slurm, run)) == ALL
    ends = {"CANCELLED": 0, "COMPLETED": 0}
    for number in range(6):
        assert verb(slurm, "merge", run, "--force").returncode == 0
        running(slurm, run, "merge") if number % 2 else time.sleep(number * 0.4)
        slurm.run("pkalice", ["scancel", str(jobs_of(run)["merge"]["job_id"])])
        state = job(ended(slurm, run), "merge")["state"]  # proved by tests/verify.py, where it is COMPLETED
        ends[state] += 1
    if ends["CANCELLED"]:
        assert verb(slurm, "retry", run).returncode == 0
        assert states(ended(slurm, run)) == ALL
    row.final(", ".join(f"{count} {state}" for state, count in ends.items()))


@pytest.mark.row(
    "E3",
    "a complete job that Slurm starts again, and holds (launch failed requeued held)",
    "in nobody's way: `retry` takes it away",
)
def test_a_complete_job_that_is_held(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_MERGE=once")
    assert states(ended(slurm, run))["merge"] == "FAILED"
    train = str(jobs_of(run)["train"]["job_id"])
    assert slurm.run("pkalice", ["scontrol", "requeuehold", train]).returncode == 0
    assert job(status(slurm, run), "train")["state"] == "COMPLETED"
    row.happened()
    done = verb(slurm, "retry", run)
    assert done.returncode == 0, done.stderr
    row.told()
    assert states(ended(slurm, run)) == ALL
    assert not slurm.ask("squeue", "-h", "-j", train).strip() and len(begun_lines(run, "train")) == 2
    row.final("COMPLETED")


def begun_lines(run: Path, kind: str) -> list[str]:
    lines = (run / "views" / "begun").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(f"{kind} ")]
