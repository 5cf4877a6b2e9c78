"""300 submissions while slurmctld is paused and killed at random: none is lost, none is done twice."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.fixture import Cluster
from tests.cluster.runs import launch, status, verb
from tests.faults.accounting import completed
from tests.faults.recorder import Row

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("healed")]
LAUNCHES, AT_ONCE = 100, 4
KINDS = ("prepare", "train", "merge")


class Weather(threading.Thread):
    """Pauses slurmctld for up to 13 s (sbatch gives up after 10) or kills it, again and again."""

    def __init__(self, slurm: Cluster, seed: int) -> None:
        super().__init__()
        self._slurm, self._random = slurm, random.Random(seed)
        self.over = threading.Event()
        self.done: Counter[str] = Counter()

    def run(self) -> None:
        layout, dice = self._slurm.layout, self._random
        while not self.over.wait(dice.uniform(2, 7)):
            what = dice.choice(("pause", "kill", "pause and kill"))
            self.done[what] += 1
            if what.startswith("pause"):
                faults.pause(layout, "slurmctld")
                time.sleep(dice.choice((0.5, 3, 11, 13)))
            if what.endswith("kill"):
                faults.kill(layout, "slurmctld")
                time.sleep(dice.uniform(0, 3))
                faults.start(layout, "slurmctld")
            else:
                faults.resume(layout, "slurmctld")


@pytest.mark.timeout(1500)
@pytest.mark.row("E2", "300 submissions while slurmctld is paused and killed at random", "none lost, none twice")
def test_three_hundred_submissions(slurm: Cluster, row: Row) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"SEED={seed}")
    weather = Weather(slurm, seed)
    weather.start()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ends = list(pool.map(lambda _: _launch(slurm), range(LAUNCHES)))
    finally:
        weather.over.set()
        weather.join()
    print(weather.done, Counter(code for code, _, _ in ends))
    assert {code for code, _, _ in ends} <= {0, 3}, [one for one in ends if one[0] not in (0, 3)][:3]
    runs = [run for _, run, _ in ends if run is not None]
    assert len(set(runs)) == LAUNCHES
    again = _complete(slurm, runs)
    print(f"retried: {again}")
    begun: Counter[tuple[Path, str]] = Counter()
    for run in runs:
        begun.update((run, line.split()[0]) for line in (run / "views" / "begun").read_text().splitlines())
    twice = {f"{run.name} {kind}": count for (run, kind), count in begun.items() if count > 1}
    assert not twice, (f"SEED={seed}", twice)
    ids = completed(slurm, [run.name for run in runs], LAUNCHES * len(KINDS))
    assert ids, "accounting knows nothing: the test shows less than it says"
    more = {key: numbers for key, numbers in ids.items() if len(numbers) > 1}
    assert not more, (f"SEED={seed}", more)
    known = f"{len(ids)} of {LAUNCHES * len(KINDS)} jobs known to accounting, each once"
    row.final(f"COMPLETED, {sum(again.values())} of {LAUNCHES} by retry; {known}")
    row.counted(LAUNCHES * len(KINDS) - len(begun), len(twice), f"{LAUNCHES * len(KINDS)} jobs")


def _launch(slurm: Cluster) -> tuple[int, Path | None, str]:
    while True:
        done = launch(slurm, "pipeline=train_merge", "nodes=1", timeout=600)
        # it was asked before anything was written: nothing is there to go on with
        if not (done.returncode == 2 and "the controller does not answer; try again later" in done.stderr):
            break
    last = done.stdout.splitlines()[-1:]
    return done.returncode, Path(last[0]) if last else None, done.stderr


def _complete(slurm: Cluster, runs: list[Path], seconds: float = 600) -> Counter[int]:
    """Until all are COMPLETED; how many needed how many retries."""
    retries: Counter[Path] = Counter()
    left, deadline = list(runs), time.monotonic() + seconds
    while left:
        assert time.monotonic() < deadline, [status(slurm, run) for run in left[:3]]
        faults.undrain(slurm.layout)  # Slurm gives an id anew whose first job still runs, and drains the node for it
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda run: status(slurm, run), left))
        left = [Path(one["path"]) for one in found if one["state"] != "COMPLETED"]
        for one in found:
            stuck = any(job["state"] == "PENDING" and "retry" in (job["reason"] or "") for job in one["jobs"])
            if one["state"] not in ("COMPLETED", "PENDING", "RUNNING") or stuck:
                done = verb(slurm, "retry", one["path"])
                if "the DB index is being set" in done.stderr:  # slurmctld died over that, and keeps it so for ever
                    verb(slurm, "cancel", one["path"])
                    done = verb(slurm, "retry", one["path"])
                retries[Path(one["path"])] += done.returncode == 0
        time.sleep(2)
    return Counter(retries.values())
