"""Pipelines under random faults: `make soak N=40 SEED=7`. Slurm is real, the training a stand-in that does steps.

Everything random comes from the seed, but the moments at which Slurm and the disk answer. What must come out: each
pipeline ends as it should, by artifacts that somebody else has looked at; each key of a job was one job; each step of a
training was done once, but for those after a last checkpoint; and nothing is left over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tests.cluster import faults, people
from tests.cluster.fixture import Cluster, cluster
from tests.cluster.process import command_line, of_user, pids, wait_for
from tests.cluster.runs import command, verb
from tests.cluster.test_resume import ranks, steps
from tests.faults import table
from tests.faults.accounting import accounted
from tests.verify import problems

USER = "pkalice"
IN_FLIGHT = 6
STEPS = 120
# between two faults; of the cluster itself one at a time, with some peace in between: nothing else gets anywhere
SECONDS = (3.0, 12.0)
PEACE = (5.0, 30.0)
# what no infrastructure is to blame for is retried once, as a user would; the rest until it is complete
MOST_RETRIES = 25
LAUNCHES = 5
GOING = ("PENDING", "RUNNING", "UNKNOWN", "REQUEUED", "PREEMPTED")
Json = dict[str, Any]


@dataclass
class Pipeline:
    """``wants``: what its stand-in is told; ``good``: whether it can complete."""

    name: str
    wants: tuple[str, ...]
    good: bool = True
    run: Path | None = None
    launcher: subprocess.Popen[str] | None = None
    kill_at: float | None = None
    launches: int = 0
    retries: int = 0
    over: bool = False
    complete: set[str] = field(default_factory=set)
    found: Json = field(default_factory=dict)


class Soak:
    def __init__(self, slurm: Cluster, count: int, seed: int) -> None:
        self.slurm, self.seed = slurm, seed
        self.random = random.Random(seed)  # what the pipelines are
        self.chance = random.Random(seed)  # which faults come, in this order
        self.began = time.monotonic()
        self.runs = slurm.shared(USER) / "runs"
        self.there = set(self.runs.glob("*"))  # of an earlier soak with this seed
        self.pipelines = [self._pipeline(number) for number in range(count)]
        self.next_fault = self.began + 10
        self.mended: tuple[float, Callable[[], object]] | None = None  # when and how the cluster's own fault ends
        self.peace_until = 0.0
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []

    def _pipeline(self, number: int) -> Pipeline:
        kind = self.random.choices(("good", "once", "fail"), (8, 1, 1))[0]
        nodes = self.random.choice((1, 1, 2))
        wants = [f"nodes={nodes}", f"cluster.env.STANDIN_TRAIN=steps:{STEPS}", "cluster.poll_seconds=1"]
        if kind != "good":
            where = self.random.choice(("PREPARE", "MERGE", "INFER"))
            wants.append(f"cluster.env.STANDIN_{where}={kind}")
        return Pipeline(f"soak-{self.seed}-{number}", tuple(wants), good=kind != "fail")

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {words}", file=sys.stderr, flush=True)

    def run(self) -> None:
        waiting = list(self.pipelines)
        while waiting or self.flying():
            while waiting and len(self.flying()) < IN_FLIGHT:
                self.launch(waiting.pop(0))
            for one in self.flying():
                self.look(one)
                self.disturb()
            time.sleep(0.2)
        self.mend()

    def flying(self) -> list[Pipeline]:
        return [one for one in self.pipelines if one.launches and not one.over]

    def launch(self, one: Pipeline) -> None:
        one.launches += 1
        one.launcher = self.slurm.start(USER, command(self.slurm, f"name={one.name}", *one.wants))
        one.kill_at = None
        if one.launches <= LAUNCHES and self.random.random() < 0.2:
            one.kill_at = time.monotonic() + self.random.uniform(0.3, 2.0)

    def look(self, one: Pipeline) -> None:
        """Once more at a pipeline: is its launcher gone, has it ended, is what it says right?"""
        if one.launcher is not None:
            if one.kill_at is not None and time.monotonic() > one.kill_at and one.launcher.poll() is None:
                self.faults["launcher killed"] += 1
                one.launcher.send_signal(signal.SIGKILL)
            if one.launcher.poll() is None:
                return
            self.launched(one)
            return
        assert one.run is not None
        done = verb(self.slurm, "status", one.run, "--json")
        if done.returncode:
            self.blame(one, f"status: exit code {done.returncode}: {done.stderr.strip()}")
            one.over = True
            return
        one.found = json.loads(done.stdout)
        self.check(one)
        if one.found["state"] in GOING:
            if any("`pkuslurm retry`" in str(job["reason"]) for job in one.found["jobs"]):
                self.retry(one)  # as it says: Slurm has lost jobs, or holds them
            return
        if one.found["state"] == "COMPLETED" or (not one.good and one.retries):
            one.over = True
            self.say(f"{one.run.name}: {one.found['state']}, {one.retries} retries")
        elif one.retries >= MOST_RETRIES:
            self.blame(one, f"not complete after {one.retries} retries: {json.dumps(one.found)}")
            one.over = True
        else:
            self.retry(one)

    def launched(self, one: Pipeline) -> None:
        """The launcher has ended, or was killed. There is a run, or nothing was done."""
        assert one.launcher is not None
        out, err = one.launcher.communicate()
        code, one.launcher = one.launcher.returncode, None
        made = sorted({path.parent for path in self.runs.glob(f"*-{one.name}-*/run.json")} - self.there)
        if len(made) > 1:
            self.blame(one, f"two runs of one pipeline: {made}")
        if code not in (0, 2, 3, -signal.SIGKILL):
            self.blame(one, f"launch: exit code {code}: {err.strip()}")
        if "Traceback" in err:
            self.blame(one, f"launch: {err.strip()}")
        if code == 2 and made:
            self.blame(one, f"launch: refused, and a run is there: {err.strip()}")
        if code in (0, 3) and [str(path) for path in made] != out.splitlines()[-1:]:
            self.blame(one, f"launch: exit code {code}, said {out.splitlines()[-1:]}, made {made}")
        if not made:
            if code == 2:
                self.say(f"{one.name}: launch refused: {err.strip().splitlines()[-1]}")
            self.launch(one)
            return
        one.run = made[0]
        if code != 0:
            self.say(f"{one.run.name}: launch ended with {code}: {(err.strip().splitlines() or [''])[-1]}")
            self.retry(one)

    def retry(self, one: Pipeline) -> None:
        assert one.run is not None
        done = verb(self.slurm, "retry", one.run)
        if "Traceback" in done.stderr or done.returncode not in (0, 2, 3):
            self.blame(one, f"retry: exit code {done.returncode}: {done.stderr.strip()}")
        if done.returncode == 0:
            one.retries += 1
        reasons = [f"{job['kind']}: {job['reason']}" for job in one.found.get("jobs", ()) if job["reason"]]
        last = (done.stderr.strip().splitlines() or [""])[-1]
        self.say(f"{one.run.name}: retry: {done.returncode} {last} | {reasons[:1]}")

    def check(self, one: Pipeline) -> None:
        """What is COMPLETED has artifacts that verify, and stays so; no run that must fail is COMPLETED."""
        assert one.run is not None
        now = {job["kind"] for job in one.found["jobs"] if job["state"] == "COMPLETED"}
        for kind in one.complete - now:
            self.blame(one, f"{kind} was COMPLETED and is {json.dumps(one.found)}")
        for problem in problems(one.run, sorted(now - one.complete)):
            self.blame(one, f"shown COMPLETED: {problem}")
        one.complete |= now
        if one.found["state"] == "COMPLETED" and (not one.good or len(now) < 5):
            self.blame(one, f"falsely COMPLETED: {json.dumps(one.found)}")

    def blame(self, one: Pipeline, words: str) -> None:
        self.wrong.append(f"{one.name}: {words}")
        self.say(f"WRONG {one.name}: {words}")

    # faults

    def disturb(self) -> None:
        now = time.monotonic()
        if self.mended and now >= self.mended[0]:
            self.mend()
        if now < self.next_fault:
            return
        self.next_fault = now + self.chance.uniform(*SECONDS)
        mine = [self.scancel, self.kill_rank, self.retry_any]
        clusters = [self.node, self.cable, self.ctld_paused, self.ctld_killed, self.dbd_paused]
        choice = self.chance.choice(mine if self.mended or now < self.peace_until else [*mine, *clusters])
        if said := choice():
            self.faults[said.partition(":")[0]] += 1
            self.say(said)

    def mend(self) -> None:
        if self.mended:
            self.mended, (_, undo) = None, self.mended
            undo()
            self.resume()
            self.peace_until = time.monotonic() + self.chance.uniform(*PEACE)

    def resume(self) -> None:
        """What an administrator does with nodes that Slurm has drained (what it could not kill, a double id)."""
        shown = self.slurm.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        for name in {line.split()[0] for line in shown if "drain" in line}:
            self.slurm.ask("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def _breaks(self, seconds: tuple[float, float], undo: Callable[[], object]) -> None:
        self.mended = time.monotonic() + self.chance.uniform(*seconds), undo

    def node(self) -> str:
        name, layout = self.chance.choice(self.slurm.nodes), self.slurm.layout
        faults.node_kill(layout, name)
        self._breaks((1, 45), lambda: faults.start(layout, name))
        return f"node killed: {name}"

    def cable(self) -> str:
        name, layout = self.chance.choice(self.slurm.nodes), self.slurm.layout
        faults.link_down(layout, name)
        self._breaks((2, 45), lambda: faults.link_up(layout, name))
        return f"cable pulled: {name}"

    def ctld_paused(self) -> str:
        faults.pause(self.slurm.layout, "slurmctld")
        self._breaks((2, 15), lambda: faults.resume(self.slurm.layout, "slurmctld"))
        return "slurmctld paused"

    def ctld_killed(self) -> str:
        faults.kill(self.slurm.layout, "slurmctld")
        self._breaks((1, 10), lambda: faults.start(self.slurm.layout, "slurmctld"))
        return "slurmctld killed"

    def dbd_paused(self) -> str:
        faults.pause(self.slurm.layout, "slurmdbd")
        self._breaks((5, 30), lambda: faults.resume(self.slurm.layout, "slurmdbd"))
        return "slurmdbd paused"

    def scancel(self) -> str | None:
        jobs = [job for one in self.flying() for job in one.found.get("jobs", ()) if job["state"] in GOING]
        if not (ids := [str(job["job_id"]) for job in jobs if job["job_id"]]):
            return None
        chosen = self.chance.choice(sorted(ids))
        done = self.slurm.run(USER, ["scancel", chosen])
        return f"scancel by hand: {chosen} {done.stderr.strip()}"

    def kill_rank(self) -> str | None:
        for name in self.chance.sample(self.slurm.nodes, len(self.slurm.nodes)):
            with suppress(OSError):  # it ended while it was looked for
                if found := ranks(self.slurm, name):
                    os.kill(self.chance.choice(found), signal.SIGKILL)
                    return f"rank killed: on {name}"
        return None

    def retry_any(self) -> str | None:
        there = [one for one in self.pipelines if one.run is not None]
        if not there:
            return None
        one = self.chance.choice(there)
        done = verb(self.slurm, "retry", str(one.run))
        if "Traceback" in done.stderr or done.returncode not in (0, 2, 3):
            self.blame(one, f"retry: exit code {done.returncode}: {done.stderr.strip()}")
        if one.over and one.found["state"] == "COMPLETED" and "nothing to do" not in done.stderr:
            self.blame(one, f"retry of a complete run: {done.returncode} {done.stderr.strip()}")
        if done.returncode == 0 and "nothing to do" not in done.stderr:
            one.over, one.retries = False, one.retries + 1
        return f"retry at random: {one.run.name if one.run else ''} {done.returncode}"

    # the end

    def judge(self, tmp: set[Path], mounts: str) -> Json:
        repeated = 0
        for one in self.pipelines:
            assert one.run is not None
            for problem in problems(one.run, sorted(one.complete)):
                self.blame(one, problem)
            repeated += self.steps(one)
        self.once()
        left = self.left(tmp, mounts)
        self.wrong += [f"left over: {what}" for what in left]
        return {
            "n": len(self.pipelines),
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.began),
            "states": dict(Counter(one.found["state"] for one in self.pipelines)),
            "faults": dict(self.faults.most_common()),
            "retries": sum(one.retries for one in self.pipelines),
            "steps repeated": repeated,
            "wrong": self.wrong,
        }

    def steps(self, one: Pipeline) -> int:
        """Those that were done twice: only what came after a checkpoint (one every 5) of an attempt that was ended."""
        assert one.run is not None
        most = 2 if "nodes=2" in one.wants else 1
        twice = 0
        for rank in range(most):
            done = steps(one.run, rank)
            parts: list[list[int]] = []
            for at, (attempt, step) in enumerate(done):
                # a controller that was killed may start a job anew without counting that: the same number again
                if at == 0 or attempt != done[at - 1][0] or step <= done[at - 1][1]:
                    parts.append([])
                parts[-1].append(step)
            numbers = [attempt for attempt, _ in done]
            if numbers != sorted(numbers):
                self.blame(one, f"rank {rank}: an older attempt did a step after a newer one: {numbers}")
            if any(part != list(range(part[0], part[-1] + 1)) for part in parts):
                self.blame(one, f"rank {rank}: steps are left out in one attempt: {parts}")
            for before, after in itertools.pairwise(parts):
                if not before[-1] - 5 < after[0] <= before[-1] + 1:
                    self.blame(one, f"rank {rank}: ended at step {before[-1]}, went on at {after[0]}")
                twice += before[-1] + 1 - after[0]
            if "train" in one.complete and (not parts or parts[0][0] != 1 or parts[-1][-1] != STEPS):
                self.blame(one, f"rank {rank}: steps {parts[:1]} to {parts[-1:]} of {STEPS}")
        return twice

    def once(self) -> None:
        """Of each key exactly one job."""
        try:
            names = accounted(self.slurm, [one.run.name for one in self.pipelines if one.run is not None])
        except AssertionError as error:
            self.wrong.append(str(error))
            return
        self.wrong += [f"{name}: jobs {sorted(ids)}" for name, ids in names.items() if len(ids) > 1]

    def left(self, tmp: set[Path], mounts: str) -> list[str]:
        mine = of_user(people.identity(USER).uid)
        own = str(self.slurm.base)
        found = [f"job {line}" for line in self.slurm.busy()]
        found += [f"process {command_line(pid)}" for pid in pids() if mine(pid) and own in command_line(pid)]
        found += [f"process {line}" for line in self.slurm.processes(USER)]
        uid = people.identity(USER).uid
        new = [path for path in sorted(temporaries() - tmp) if path.lstat().st_uid == uid]
        # the user may be at work on another cluster of this machine, too
        found += [str(path) for path in new if not path.is_file() or own in path.read_text(errors="replace")]
        if (now := Path("/proc/mounts").read_text(encoding="utf-8")) != mounts:
            found += [
                f"mount {line}" for line in sorted(set(now.splitlines()) - set(mounts.splitlines())) if own in line
            ]
        return found


def temporaries() -> set[Path]:
    return {path for folder in ("/tmp", "/dev/shm", "/var/tmp") for path in Path(folder).iterdir()}


def record(result: Json) -> None:
    """Its line in docs/reliability.md."""
    ends = ", ".join(f"{count} {state}" for state, count in result["states"].items())
    came = ", ".join(f"{count} × {what}" for what, count in result["faults"].items())
    words = (
        f"{date.today().isoformat()}, `N={result['n']} SEED={result['seed']}`, "
        f"{result['seconds'] // 60} minutes: {came}. "
        f"{ends}; {result['retries']} retries; {result['steps repeated']} steps done twice, after a last checkpoint; "
        + (f"**{len(result['wrong'])} wrong**." if result["wrong"] else "none lost, no job twice, nothing left over.")
    )
    table.save(table.load() | {"soak": words})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=40, help="pipelines")
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.randrange(10**4)
    print(f"soak: make soak N={given.n} SEED={seed}", file=sys.stderr, flush=True)
    with cluster() as slurm:
        slurm.clear()
        tmp, mounts = temporaries(), Path("/proc/mounts").read_text(encoding="utf-8")
        soak = Soak(slurm, given.n, seed)
        try:
            soak.run()
            faults.heal(slurm.layout)
            slurm.wait_idle(180)
            wait_for(lambda: not slurm.processes(USER), 60, "an end of every process")
            result = soak.judge(tmp, mounts)
        finally:
            slurm.clear()
    print(json.dumps(result, indent=1, ensure_ascii=False))
    record(result)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
