"""Slurm does not answer, or answers wrongly, late, or in another version's words: no wrong state is ever shown."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.people import identity
from tests.cluster.process import in_netns, kill_all, of_user, wait_for
from tests.cluster.runs import (
    ALL,
    KINDS,
    command,
    ended,
    job,
    jobs_of,
    launched,
    queued,
    running,
    sent,
    shim,
    states,
    status,
    until,
    verb,
)
from tests.faults.recorder import Row
from tests.faults.test_nodes import failed, mend
from tests.faults.test_sending import restart
from tests.faults.watch import Watch

pytestmark = pytest.mark.usefixtures("healed")
slow = pytest.mark.faults
GOING = {"PENDING", "RUNNING", "UNKNOWN", "COMPLETED"}


def shims(slurm: Cluster, name: str, **programs: str) -> dict[str, str]:
    """PATH with several programs of ours before Slurm's; FLAG is a file that the test may make or take away."""
    folder = slurm.shared("common") / f"shims-{name}"
    flag = slurm.shared("pkalice") / f"flag-{name}"
    for file in flag.parent.glob(f"{flag.name}*"):
        file.unlink()
    found = {}
    for program, text in programs.items():
        found = shim(slurm, folder, program, text.replace("FLAG", str(flag)))
    return found | {"FLAG": str(flag)}


def shown(slurm: Cluster, run: Path, env: dict[str, str]) -> dict[str, str]:
    done = verb(slurm, "status", run, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return states(json.loads(done.stdout))


def without_a_word(slurm: Cluster) -> None:
    """All that pkalice runs on the nodes is killed at once: batch scripts, workers and their guards."""
    own = of_user(identity("pkalice").uid)
    for name in slurm.nodes:
        there = in_netns(slurm.layout.netns(name))
        kill_all(lambda pid, there=there: own(pid) and there(pid))  # type: ignore[misc]


def forgotten(slurm: Cluster, run: Path) -> None:
    """Until the controller no longer knows its jobs."""
    deadline = time.monotonic() + 60
    while sent(slurm, run):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.row("9", "squeue fails every other time", "who waits keeps what is known; no job is said to have ended")
def test_squeue_fails_every_other_time(slurm: Cluster, row: Row) -> None:
    text = 'echo >> FLAG; [ $(( $(wc -l < FLAG) % 2 )) = 0 ] && exec "$REAL" "$@"\n'
    text += 'echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1'
    env = shims(slurm, "squeue", squeue=text)
    arguments = command(slurm, "pipeline=train", "wait=true", "cluster.poll_seconds=1")
    done = slurm.run("pkalice", arguments, env=env)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"\b(prepare|train) +([A-Z_]+)\b", done.stderr)
    assert {kind for kind, _ in said} == {"prepare", "train"} and {state for _, state in said} <= GOING, done.stderr
    asked = int(Path(env["FLAG"]).read_text(encoding="utf-8").count("\n"))
    assert asked >= 4, "squeue was asked too seldom to fail: the test shows nothing"
    run = Path(done.stdout.splitlines()[-1])
    found = status(slurm, run)
    row.final(found["state"])
    assert sent(slurm, run) == ["prepare", "train"]
    row.work(run)


@slow
@pytest.mark.row(
    "10", "jobs end, one of them without a word, and Slurm forgets them between two looks", "marker, then accounting"
)
def test_purged_between_two_looks(slurm: Cluster, row: Row) -> None:
    with faults.forgetful(slurm.layout, 5):
        good = launched(slurm)
        silent = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
        running(slurm, silent, "train")
        wait_for((good / "report.html").exists, 60, "the end of the other run")
        time.sleep(1)
        without_a_word(slurm)
        row.happened()
        forgotten(slurm, good)
        forgotten(slurm, silent)
        assert states(status(slurm, good)) == ALL
        found = status(slurm, silent)
        assert states(found) == failed("FAILED"), found
        row.told()
        mend(silent)
        assert verb(slurm, "retry", silent).returncode == 0
        found = ended(slurm, silent)
        assert states(found) == ALL, found
    row.final("FAILED; COMPLETED by retry")


@slow
@pytest.mark.row("11", "sacct prints nothing, three times", "UNKNOWN, not ended; nothing is submitted again by itself")
def test_accounting_that_knows_nothing_yet(slurm: Cluster, row: Row) -> None:
    """Of a job that ended without a word, and that the controller has forgotten."""
    env = shims(slurm, "sacct", sacct='echo >> FLAG; [ "$(wc -l < FLAG)" -gt 3 ] && exec "$REAL" "$@"; exit 0')
    with faults.forgetful(slurm.layout, 5):
        run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=sleep")
        running(slurm, run, "train")
        assert verb(slurm, "retry", run, env=env).returncode == 2, "it runs"
        without_a_word(slurm)
        forgotten(slurm, run)
    said = [shown(slurm, run, env)["train"] for _ in range(3)]
    row.happened()
    assert said == ["UNKNOWN"] * 3, said
    assert shown(slurm, run, env)["train"] == "FAILED"
    row.told()
    assert len(jobs_of(run)["train"].get("earlier", ())) == 0 and queued(slurm) == []
    row.final("UNKNOWN, then FAILED")


@slow
@pytest.mark.row(
    "12", "no accounting at all, and Slurm has forgotten every job", "the files tell the same; `retry` goes on"
)
def test_long_after_slurm_forgot(slurm: Cluster, row: Row) -> None:
    with faults.without_accounting(slurm.layout), faults.forgetful(slurm.layout, 5):
        good, bad = launched(slurm), launched(slurm, "cluster.env.STANDIN_TRAIN=fail")
        stopped = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
        ended(slurm, good), ended(slurm, bad)
        running(slurm, stopped, "train")
        verb(slurm, "cancel", stopped)
        for run in (good, bad, stopped):
            forgotten(slurm, run)
        row.happened()
        assert states(status(slurm, good)) == ALL
        assert states(status(slurm, bad)) == failed("FAILED")
        assert states(status(slurm, stopped)) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")
        row.told()
        mend(bad)
        assert verb(slurm, "retry", bad).returncode == 0
        assert states(ended(slurm, bad)) == ALL
        row.final("COMPLETED, FAILED, CANCELLED as they were")
        row.work(good)


@slow
@pytest.mark.row("12", "slurmdbd does not answer during a run", "no effect")
def test_accounting_that_is_away(slurm: Cluster, row: Row) -> None:
    run = launched(slurm)
    faults.pause(slurm.layout, "slurmdbd")
    found = until(slurm, run, lambda found: (run / "report.html").exists(), "pkalice", 120)
    row.happened()
    found = ended(slurm, run, seconds=120)
    row.told()
    assert states(found) == ALL
    faults.resume(slurm.layout, "slurmdbd")
    row.final(found["state"])
    row.work(run)


@slow
@pytest.mark.row("13", "a sacct that without --starttime tells of nothing before midnight", "it is always given one")
def test_a_job_of_yesterday(slurm: Cluster, row: Row) -> None:
    text = 'case " $* " in *" -S "*) exec "$REAL" "$@";; esac'
    env = shims(slurm, "midnight", sacct=text)
    with faults.forgetful(slurm.layout, 5):
        run = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=sleep")
        running(slurm, run, "train")
        without_a_word(slurm)
        forgotten(slurm, run)
    row.happened()
    assert shown(slurm, run, env) == {"prepare": "COMPLETED", "train": "FAILED"}
    row.final("FAILED")


@pytest.mark.row(
    "20", "Slurm says COMPLETED and the worker FAILED; the other way round", "nothing is COMPLETED by Slurm's word"
)
def test_slurm_and_the_worker_disagree(slurm: Cluster, row: Row) -> None:
    """Without a marker that is proved it is FAILED, with one it is COMPLETED, whatever squeue and sacct say."""
    lies = {"squeue": "s/|FAILED|/|COMPLETED|/", "sacct": "s/|FAILED|/|COMPLETED|/;s/|[0-9]*:[0-9]*|/|0:0|/"}
    env = shims(slurm, "lies", **{name: f'set -o pipefail; "$REAL" "$@" | sed "{text}"' for name, text in lies.items()})
    other = shims(slurm, "lies-2", squeue='set -o pipefail; "$REAL" "$@" | sed "s/|COMPLETED|/|FAILED|/"')
    bad = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=fail")
    found = ended(slurm, bad)
    assert job(found, "train")["state"] == "FAILED"
    assert shown(slurm, bad, env) == states(found)
    wait_for(lambda: not queued(slurm), 30, "Slurm's own word")  # the worker's is there a moment before
    (bad / "state" / "train.json").unlink()  # not even the worker's word is left
    assert shown(slurm, bad, env) == states(found)
    assert shown(slurm, bad, other)["prepare"] == "COMPLETED"
    row.final("FAILED")
    row.work(bad, begun=KINDS[:2])


NEWER = {
    # a purged parent is refused, also where it has completed
    "sbatch": """\
for file in "$@"; do :; done
for id in $(sed -n 's/^#SBATCH --dependency=//p' "$file" | grep -o '[0-9]\\+'); do
    scontrol show job "$id" > /dev/null 2>&1 && continue
    echo "sbatch: error: Batch job submission failed: Job dependency problem" >&2
    exit 1
done
exec "$REAL" "$@\"""",
    # the signal in the reason, with spaces
    "squeue": 'set -o pipefail; "$REAL" "$@" | sed "s/|JobLaunchFailure|/|RaisedSignal:53(Real-time signal 19)|/"',
    # of a killed orphan no reason, of its elements no row; a shell\'s code as it is
    "sacct": """set -o pipefail
"$REAL" "$@" | sed 's/|Dependency|/|None|/;s/|0:9|/|137:0|/;/_[0-9]*|CANCELLED/d'""",
}


@slow
@pytest.mark.row(
    "42",
    "sbatch, squeue, sacct in the words of Slurm 25.11",
    "the same states; `retry` names no parent that is gone",
    repeated=1,
)
def test_the_words_of_another_version(slurm: Cluster, row: Row) -> None:
    env = shims(slurm, "newer", **NEWER)
    with faults.forgetful(slurm.layout, 5):
        bad = launched(slurm, "cluster.env.STANDIN_MERGE=fail", env=env)
        sweep = launched(slurm, "-m", "train.learning_rate=1e-5,5e-5", "cluster.env={STANDIN_TRAIN: once@1}", env=env)
        stopped = launched(slurm, "pipeline=train", "cluster.env.STANDIN_TRAIN=sleep", env=env)
        until(slurm, sweep, lambda found: found["state"] not in ("PENDING", "RUNNING"), "pkalice", 90)
        ended(slurm, bad)
        running(slurm, stopped, "train")
        without_a_word(slurm)
        ended(slurm, stopped)
        wanted = {
            "prepare": "COMPLETED",
            "train": "COMPLETED",
            "merge": "FAILED",
            "infer": "SKIPPED",
            "report": "SKIPPED",
        }
        for _ in range(2):  # while it is known, and after that
            assert shown(slurm, bad, env) == wanted
            assert shown(slurm, stopped, env)["train"] == "FAILED"
            done = verb(slurm, "status", sweep, "--json", env=env)
            assert '"COMPLETED": 1, "FAILED": 1' in done.stdout, done.stdout
            forgotten(slurm, bad)
            forgotten(slurm, stopped)
            forgotten(slurm, sweep)
        mend(bad)
        done = verb(slurm, "retry", bad, env=env)
        assert done.returncode == 0, done.stderr
        assert states(ended(slurm, bad)) == ALL
    row.final("FAILED; COMPLETED by retry")
    row.work(bad)


@slow
@pytest.mark.row(
    "C1",
    "the controller is killed while a job runs, and comes back",
    "UNKNOWN, never ended, `retry` and `cancel` refuse; then RUNNING as before, and `cancel` ends it",
)
def test_a_controller_that_is_killed_and_comes_back(slurm: Cluster, row: Row) -> None:
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
    row.happened()
    running(slurm, run, "train")
    row.told()
    verb(slurm, "cancel", run)
    found = status(slurm, run)
    assert states(found) == {"prepare": "COMPLETED"} | dict.fromkeys(KINDS[1:], "CANCELLED")
    row.final(f"RUNNING, then {found['state']}")
    row.work(run, begun=KINDS[:2])


@slow
@pytest.mark.row(
    "C2",
    "the controller is paused, killed, started anew, again and again, while `status` looks on",
    "no job is ever ended",
)
def test_a_controller_that_comes_and_goes(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:120", "nodes=1")
    running(slurm, run, "train")
    with Watch(slurm, run) as watch:
        for number in range(3):
            faults.pause(slurm.layout, "slurmctld")
            time.sleep(2 + 5 * number)
            faults.resume(slurm.layout, "slurmctld")
            time.sleep(1)
            restart(slurm)
            time.sleep(3)
        found = ended(slurm, run, seconds=150)
    for kind in KINDS:
        assert {*watch.states(kind)} <= GOING, (kind, watch.states(kind))
    assert states(found) == ALL, found
    row.final(found["state"])
    row.work(run, 120)


@slow
@pytest.mark.row(
    "C3",
    "slurmctld starts with an empty memory (its state is gone); ids begin anew",
    "never another job's state; `retry`",
)
def test_ids_that_begin_anew(slurm: Cluster, row: Row) -> None:
    run = launched(slurm, "cluster.env.STANDIN_TRAIN=sleep")
    good = launched(slurm, "pipeline=train")
    ended(slurm, good)
    running(slurm, run, "train")
    with faults.configured(slurm.layout, f"FirstJobId={jobs_of(run)['prepare']['job_id']}"):
        faults.forget_jobs(slurm.layout)
        ours = {str(entry["job_id"]) for one in (run, good) for entry in jobs_of(one).values()}
        given = set()
        for number in range(8):
            words = ("-n1", "-o", "/dev/null", "-J", f"another{number}", "--wrap", "sleep 60")
            given.add(slurm.run("pkalice", ["sbatch", "--parsable", *words]).stdout.strip())
        assert given >= ours, "not all ids were given anew"
        with Watch(slurm, run) as watch, Watch(slurm, good) as other:
            time.sleep(4)
            slurm.run("pkalice", ["scancel", *sorted(given)])  # an end that none of ours can have
            time.sleep(5)
        ends = slurm.ask("squeue", "-h", "-t", "all", "-j", ",".join(sorted(given)), "-o", "%T").split()
        assert len(ends) == 8 and set(ends) <= {"CANCELLED", "COMPLETING"}, ends
    assert {*other.of_run()} == {"COMPLETED"}, "proved by its files"
    assert {*watch.states("train")} <= {"RUNNING", "UNKNOWN", "PENDING"}, watch.states("train")
    for kind in KINDS[2:]:
        assert {*watch.states(kind)} <= {"PENDING", "UNKNOWN", "SKIPPED"}, (kind, watch.states(kind))
    mend(run)
    done = verb(slurm, "retry", run)
    assert done.returncode == 0, done.stderr
    assert states(ended(slurm, run)) == ALL
    row.final(f"{', '.join(watch.of_run())}; COMPLETED by retry")
