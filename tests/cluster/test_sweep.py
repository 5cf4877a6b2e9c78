"""Sweeps on a real Slurm: arrays, what a failure costs, limits, launchers that die. Training is stood in for."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.rundir import RunDir
from tests.cluster.fixture import Cluster
from tests.cluster.runs import launch, launched, queued, shim, verb
from tests.faults.recorder import Row

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# 3 × 2 points
SIX = ("-m", "train.learning_rate=1e-5,5e-5,1e-4", "train.lora_rank=8,16")
Json = dict[str, Any]


def look(slurm: Cluster, sweep: Path) -> Json:
    done = verb(slurm, "status", sweep, "--json")
    assert done.returncode == 0, done.stderr
    found: Json = json.loads(done.stdout)
    return found


def over(slurm: Cluster, sweep: Path, seconds: float = 120) -> Json:
    """The sweep's status once nothing of it waits or runs."""
    deadline = time.monotonic() + seconds
    while (found := look(slurm, sweep))["state"] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, json.dumps(found, indent=1)
        time.sleep(0.5)
    assert found["state"] != "UNKNOWN", json.dumps(found, indent=1)
    return found


def table(found: Json) -> list[str]:
    """Of each point the states of its jobs, by their first letters: CCCC, CFSS."""
    return ["".join(job["state"][0] for job in run["jobs"]) for run in found["runs"]]


def names(slurm: Cluster, sweep: Path) -> Counter[str]:
    """Every job and array that was ever submitted for the sweep, without its id."""
    lines = slurm.ask("squeue", "-h", "-r", "-t", "all", "-o", "%F %j").splitlines()
    once = {tuple(line.split(" ", 1)) for line in lines}
    return Counter(name.removeprefix(sweep.name) for _, name in once if name.startswith(sweep.name))


def begun(sweep: Path, kind: str) -> dict[int, int]:
    """How many attempts of ``kind`` each point has had."""
    files = {int(path.name): RunDir(path).state(kind) for path in sweep.iterdir() if path.name.isdecimal()}
    return {n: json.loads(file.read_text(encoding="utf-8"))["attempt"] for n, file in files.items() if file.exists()}


def test_one_failure_costs_only_its_own_descendants_and_retry_completes_the_rest(slurm: Cluster) -> None:
    sweep = launched(slurm, *SIX, "cluster.env={STANDIN_TRAIN: once@1, STANDIN_MERGE: once@4}", "name=北大 lr")
    before = sorted(path.name for path in (sweep / "3").iterdir())
    assert before == ["run.json", "shared"] or (sweep / "3" / "state").exists(), "few files before anything runs"
    found = over(slurm, sweep)
    assert table(found) == ["CCCC", "CFSS", "CCCC", "CCCC", "CCFS", "CCCC"], found
    assert found["state"] == "FAILED" and found["counts"] == {"COMPLETED": 4, "FAILED": 2}
    assert [job["kind"] for job in found["jobs"]] == ["prepare", "report"]
    assert names(slurm, sweep) == dict.fromkeys(["-prepare", "-train", "-merge", "-infer", "-report"], 1)
    shown = verb(slurm, "status", sweep).stdout
    assert "train was told to fail" in shown and "merge was told to fail" in shown and shown.count("\n") < 24
    done = verb(slurm, "retry", sweep)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(sweep), done.stderr
    found = over(slurm, sweep)
    assert table(found) == ["CCCC"] * 6 and found["state"] == "COMPLETED", found
    assert begun(sweep, "train") == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}, "what is complete is never run again"
    assert begun(sweep, "merge") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 1}
    again = verb(slurm, "retry", sweep)
    assert again.returncode == 0 and "nothing to do" in again.stderr and queued(slurm) == []
    with (sweep / "leaderboard.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["COMPLETED"] * 6
    assert {row["train.learning_rate"] for row in rows} == {"1e-5", "5e-5", "1e-4"}
    assert (sweep / "report.html").exists() and (sweep / "5" / "report.html").exists()


def test_points_that_ask_for_other_resources_have_arrays_of_their_own(slurm: Cluster) -> None:
    wanted = ("-m", "nodes=1,2", "train.learning_rate=1e-5,5e-5", "cluster.array_parallelism=1")
    sweep = launched(slurm, *wanted, "cluster.env={STANDIN_TRAIN: fail@0}")
    most = 0
    deadline = time.monotonic() + 120
    while (found := look(slurm, sweep))["state"] in ("PENDING", "RUNNING"):
        running = [job["state"] == "RUNNING" for run in found["runs"] for job in run["jobs"] if job["kind"] == "train"]
        most = max(most, sum(running))
        assert time.monotonic() < deadline
    assert most == 1, "array_parallelism is over the whole sweep"
    assert table(found) == ["CFSS", "CCCC", "CCCC", "CCCC"], found
    assert sorted(name for name in names(slurm, sweep) if "train" in name) == ["-train", "-train-g2"]
    trains = [next(job for job in run["jobs"] if job["kind"] == "train") for run in found["runs"]]
    assert [len(job["nodes"]) for job in trains] == [1, 1, 2, 2]
    arrays = [job["job_id"].partition("_")[0] for job in trains]
    assert arrays[0] == arrays[1] != arrays[2] == arrays[3]


def test_without_arrays_it_behaves_the_same(slurm: Cluster) -> None:
    more = ("cluster.arrays=false", "cluster.array_parallelism=2")
    sweep = launched(slurm, *SIX, *more, "cluster.env={STANDIN_TRAIN: once@1, STANDIN_MERGE: once@4}")
    found = over(slurm, sweep)
    assert table(found) == ["CCCC", "CFSS", "CCCC", "CCCC", "CCFS", "CCCC"], found
    assert names(slurm, sweep)["/3-train"] == 1 and names(slurm, sweep)["-train"] == 0
    assert verb(slurm, "retry", sweep).returncode == 0
    assert table(over(slurm, sweep)) == ["CCCC"] * 6
    assert begun(sweep, "train")[1] == 2 and names(slurm, sweep)["/1-train-r1"] == 1


def test_what_is_prepared_is_prepared_once_and_costs_only_those_that_share_it(slurm: Cluster) -> None:
    data = slurm.shared("pkalice") / "mine.json"
    data.write_text(json.dumps([{"instruction": "你是谁", "output": "我是小明"}] * 3), encoding="utf-8")
    data.chmod(0o644)
    identity = slurm.source / "conf" / "dataset" / "identity.jsonl"
    wanted = ("-m", f"dataset.path={identity},{data}", "train.learning_rate=1e-5,5e-5")
    sweep = launched(slurm, *wanted, "cluster.env={STANDIN_PREPARE: once@1}")
    found = over(slurm, sweep)
    assert table(found) == ["CCCC", "CCCC", "FSSS", "FSSS"], found
    assert [job["kind"] for job in found["jobs"]] == ["prepare", "prepare", "report"]
    assert names(slurm, sweep)["-prepare"] == 1
    assert verb(slurm, "retry", f"{sweep.name}/2").returncode == 2, "it is not this point's alone"
    assert verb(slurm, "retry", sweep).returncode == 0
    assert table(over(slurm, sweep)) == ["CCCC"] * 4
    assert begun(sweep, "train") == {0: 1, 1: 1, 2: 2, 3: 2}, "they looked for their share's marker, and ended"


def limited(slurm: Cluster, most: int) -> dict[str, str]:
    """An sbatch that refuses what would make more than ``most`` jobs wait or run, elements counted, as a QOS does."""
    text = f"""\
count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1"); count=$(( ${{count:-0}} + 1 ))
there=$(squeue -h -r -u "$(id -u)" | wc -l)
[ $(( there + count )) -gt {most} ] && {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
exec "$REAL" "$@\""""
    return shim(slurm, slurm.shared("common") / f"shim-most-{most}", "sbatch", text)


@pytest.mark.row(
    "7",
    "a limit on jobs (11) in the middle of a sweep",
    "what fits goes with its whole chain; `retry` goes on, nothing twice",
)
def test_a_limit_is_met(slurm: Cluster, row: Row) -> None:
    path = limited(slurm, 11)
    done = launch(slurm, *SIX, env=path)
    assert done.returncode == 3 and "over the limit" in done.stderr and done.stderr.count("\n") < 30, done
    sweep = Path(done.stdout.splitlines()[-1])
    first = look(slurm, sweep)
    assert table(first).count("PPPP") + sum(row != "PPPP" for row in table(first)) == 6
    time.sleep(1)
    rounds = 0
    while "P" in "".join(table(look(slurm, sweep))) or rounds == 0:
        rounds += 1
        assert rounds < 40
        done = verb(slurm, "retry", sweep, env=path)
        assert done.returncode in (0, 3), done.stderr
        time.sleep(2)
    found = over(slurm, sweep)
    assert table(found) == ["CCCC"] * 6 and found["state"] == "COMPLETED", found
    assert set(begun(sweep, "train").values()) == {1}, "nothing twice"
    row.final(found["state"])
    for point in range(6):
        row.work(sweep / str(point))


def test_who_waits_feeds_the_rest_in(slurm: Cluster) -> None:
    done = launch(slurm, *SIX, "wait=true", "cluster.poll_seconds=1", env=limited(slurm, 8))
    assert done.returncode == 0, done.stderr
    sweep = Path(done.stdout.splitlines()[-1])
    assert table(look(slurm, sweep)) == ["CCCC"] * 6 and set(begun(sweep, "train").values()) == {1}


def test_a_launcher_killed_after_each_sbatch(slurm: Cluster) -> None:
    sweeps = []
    root = slurm.shared("pkalice") / "runs"
    for number in range(1, 6):
        count = slurm.shared("pkalice") / f"sweep-count-{number}"
        count.unlink(missing_ok=True)
        text = f'"$REAL" "$@" || exit $?\necho >> {count}\n[ "$(wc -l < {count})" = {number} ] && kill -9 $PPID\nexit 0'
        path = shim(slurm, slurm.shared("common") / f"shim-sweep-{number}", "sbatch", text)
        before = set(root.glob("*"))
        assert launch(slurm, *SIX[:2], env=path).returncode == -signal.SIGKILL
        (sweep,) = set(root.glob("*")) - before
        sweeps.append(sweep)
    for sweep in sweeps:
        assert set("".join(table(look(slurm, sweep)))) == {"P"}, "held until all is there"
        done = verb(slurm, "retry", sweep)
        assert done.returncode == 0, done.stderr
    for sweep in sweeps:
        assert table(over(slurm, sweep)) == ["CCCC"] * 3
        assert set(names(slurm, sweep).values()) == {1}, names(slurm, sweep)
        assert set(begun(sweep, "train").values()) == {1}


def test_cancelled_as_a_whole_and_one_point(slurm: Cluster) -> None:
    sweep = launched(slurm, *SIX[:2], "cluster.env={STANDIN_TRAIN: sleep@0+1}", "cluster.arrays=true")
    deadline = time.monotonic() + 60
    while "R" not in table(look(slurm, sweep))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    done = verb(slurm, "cancel", f"{sweep.name}/0")
    assert done.returncode == 0 and "CANCELLED" in done.stdout, done
    while table(found := look(slurm, sweep))[2] != "CCCC":
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert table(found)[0] == "CXXX".replace("X", "C") and found["runs"][0]["state"] == "CANCELLED", found
    refused = verb(slurm, "retry", f"{sweep.name}/1")
    assert refused.returncode == 2 and "still waits or runs" in refused.stderr
    assert verb(slurm, "cancel", sweep).returncode == 0
    found = look(slurm, sweep)
    assert [run["state"] for run in found["runs"]] == ["CANCELLED", "CANCELLED", "COMPLETED"] and queued(slurm) == []


def test_a_sweep_is_extended_by_what_is_not_there(slurm: Cluster) -> None:
    sweep = launched(slurm, "-m", "train.learning_rate=1e-5,5e-5")
    over(slurm, sweep)
    done = launch(slurm, "-m", "train.learning_rate=1e-5,5e-5,1e-4", f"sweep.extend={sweep.name}")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(sweep), done.stderr
    assert "2 of 3 points are there already" in done.stderr
    found = over(slurm, sweep)
    assert table(found) == ["CCCC"] * 3 and set(begun(sweep, "train").values()) == {1}
    assert names(slurm, sweep)["-prepare"] == 1, "what the points share is there"


def test_one_bad_point_and_nothing_is_submitted(slurm: Cluster) -> None:
    there = set((slurm.shared("pkalice") / "runs").glob("*"))
    done = launch(slurm, "-m", "nodes=1,2", "train.learning_rate=1e-5,-1")
    assert done.returncode == 2 and "point 1 (nodes=1,lr=-1)" in done.stderr and "learning_rate" in done.stderr, done
    done = launch(slurm, "-m", "cluster.gres=npu:1,npu:9")
    assert done.returncode == 2 and "point 1 (gres=npu_9): cluster.gres=npu:9: " in done.stderr, done
    done = launch(slurm, "-m", "train.learning_rate=1e-5,5e-5", "cluster.jobs.infer.constraint=h100")
    assert done.returncode == 2 and "Invalid feature" in done.stderr, done
    assert set((slurm.shared("pkalice") / "runs").glob("*")) == there and queued(slurm) == []
