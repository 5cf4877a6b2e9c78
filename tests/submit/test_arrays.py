"""A sweep's submissions to a Slurm that only keeps a list: who waits for whom, limits, refusals, launchers that die."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from pkuslurm import launch_sweep, sweep, sweep_files
from pkuslurm.compose import compose_sweep
from pkuslurm.errors import PartlySubmitted
from pkuslurm.plan.chains import Chain
from pkuslurm.points import ready
from pkuslurm.retry import retry
from pkuslurm.rundir import write_json, write_text
from pkuslurm.slurm import commands
from pkuslurm.slurm.commands import Answer
from pkuslurm.slurm.parse import Row
from pkuslurm.submit import identity, slurm, write_sweep
from pkuslurm.submit.alone import alone
from pkuslurm.submit.arrays import send
from pkuslurm.submit.slurm import Full, Refused, Submission
from pkuslurm.submit.sweep_queue import living
from pkuslurm.sweepdir import SweepDir, load
from pkuslurm.worker import marker
from pkuslurm.worker.unpack import unpack

SWEEP_ID = "20260101-000000-sweep-0000"
SIX = ("train.learning_rate=1e-5,5e-5,1e-4", "train.lora_rank=8,16")


class Killed(BaseException):
    """The launcher is gone: no except clause of ours sees it."""


@dataclass
class Job:
    id: str
    key: str
    dependency: str
    held: bool
    count: int | None
    at_once: int | None
    text: str
    alive: bool = True
    over: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        """key[elements] <- dependency, without the sweep's id."""
        elements = f"[{self.count}]" if self.count else ""
        return f"{self.key.removeprefix(SWEEP_ID)}{elements}" + (f" <- {self.dependency}" if self.dependency else "")


@dataclass
class Queue:
    """``most``: elements that may be in the queue. ``refuse``: a word of keys that are refused for good."""

    most: int = 10**6
    refuse: str = "no such key"
    kill_before: int = 0
    kill_after: int = 0
    jobs: list[Job] = field(default_factory=list)
    asked: int = 0
    released: list[str] = field(default_factory=list)

    def sbatch(self, submission: Submission, text: str, again: bool = True) -> str:
        self.asked += 1
        if self.asked == self.kill_before:
            raise Killed
        if self.refuse in submission.key:
            raise Refused("Slurm refuses it: Invalid account")
        count = submission.array.count if submission.array else None
        if sum(job.count or 1 for job in self.living) + (count or 1) > self.most:
            raise Full("QOSMaxSubmitJobPerUserLimit")
        at_once = submission.array.at_once if submission.array else None
        job_id = str(100 + max((int(job.id) - 99 for job in self.jobs), default=0))
        self.jobs.append(Job(job_id, submission.key, submission.dependency, submission.hold, count, at_once, text))
        if self.asked == self.kill_after:
            raise Killed
        return job_id

    @property
    def living(self) -> list[Job]:
        return [job for job in self.jobs if job.alive]

    @property
    def lines(self) -> list[str]:
        return [str(job) for job in self.living]

    def rows(self, job: Job) -> Iterable[Row]:
        for index in range(job.count or 1):
            state = ("FAILED" if index in job.over else "PENDING") if job.alive else "CANCELLED"
            job_id = f"{job.id}_{index}" if job.count else job.id
            reason = "JobHeldUser" if job.held else "Dependency"
            yield Row(job_id, job.key, state, state, reason=reason, nodes="node1" if index in job.over else "")

    def answer(self, jobs: Iterable[Job]) -> Answer:
        return Answer({row.job_id: row for job in jobs for row in self.rows(job)}, True)

    def by_id(self, ids: Iterable[str]) -> list[Job]:
        wanted = {one.partition("_")[0] for one in ids}
        return [job for job in self.jobs if job.id in wanted]

    def cancel(self, ids: Iterable[str]) -> None:
        for one in ids:
            (job,) = self.by_id([one])
            assert job.held or job.dependency, f"{job} may run already"
            element = one.partition("_")[2]
            job.over |= {int(element)} if element else set()
            job.alive = bool(element) and len(job.over) < (job.count or 1)

    def release(self, job_id: str) -> None:
        (job,) = self.by_id([job_id])
        assert job.alive and job.key.startswith(SWEEP_ID)
        job.held = False
        self.released.append(job_id)

    def named(self, word: str) -> Job:
        return next(job for job in self.living if word in job.key)

    def lose(self, word: str) -> None:
        """Its controller was started anew, and has given the id to somebody else's."""
        job = self.named(word)
        job.key = "another"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr("pkuslurm.points.check_slurm", lambda _: None)
    monkeypatch.setattr("pkuslurm.points.check_machine", lambda *_: None)
    monkeypatch.setattr(slurm, "_sbatch", queue.sbatch)
    monkeypatch.setattr(identity, "ABSENT_SECONDS", 0.0)
    monkeypatch.setattr(commands, "most_elements", lambda: 1001)
    monkeypatch.setattr(commands, "queue", lambda ids: queue.answer(queue.by_id(ids)))
    monkeypatch.setattr(commands, "by_name", lambda name: queue.answer(job for job in queue.jobs if job.key == name))
    monkeypatch.setattr(commands, "cancel", queue.cancel)
    monkeypatch.setattr(commands, "release", queue.release)
    return queue


def make(folder: Path, *overrides: str) -> tuple[SweepDir, list[Chain]]:
    """A sweep's directory as launch writes it, and what is to be submitted."""
    model = [] if any(one.startswith("model") for one in overrides) else ["model=tiny"]
    typed = [f"run_root={folder}", f"cache_root={folder}/cache", "cluster=slurm", *model, *overrides]
    points = compose_sweep(typed)
    home = SweepDir(folder / SWEEP_ID)
    checked = ready(points, home, {})
    files = sweep_files.sweep_files(home, checked, points, typed)
    write_sweep.create(files)
    return home, launch_sweep._chains(files, checked)


def submit(home: SweepDir, todo: Sequence[Chain]) -> list[Chain]:
    with alone(home.own) as known:
        return send(home, known, todo, living(home, known))


def submitted(folder: Path, *overrides: str) -> SweepDir:
    home, todo = make(folder, *overrides)
    assert submit(home, todo) == []
    return home


def test_an_array_for_each_kind_each_element_after_its_own(tmp_path: Path, queue: Queue) -> None:
    home = submitted(tmp_path, *SIX)
    assert queue.lines == [
        "-prepare[1]",
        "-train[6] <- afterok:100_0",
        "-merge[6] <- aftercorr:101",
        "-infer[6] <- aftercorr:102",
        "-report <- afterany:100:103",
    ]
    assert not any(job.held for job in queue.jobs), "let go at the end"
    assert home.table(1).read_text(encoding="utf-8") == "0\n1\n2\n3\n4\n5\n"
    whole = load(home) or {}
    assert [group["members"] for group in whole["groups"]] == [["shared/0"], list("012345")]
    assert whole["jobs"]["report"]["job_id"] == "104" and not whole["jobs"]["report"]["owed"]
    assert [job.at_once for job in queue.jobs] == [None] * 5


def test_shares_one_to_one_and_mixed(tmp_path: Path, queue: Queue) -> None:
    submitted(tmp_path / "one", "train.cutoff_len=64,128,256")
    assert queue.lines[:2] == ["-prepare[3]", "-train[3] <- aftercorr:100"]
    queue.jobs.clear()
    submitted(tmp_path / "mixed", "train.cutoff_len=64,128", "train.lora_rank=8,16")
    assert queue.lines[:2] == ["-prepare[2]", "-train[4] <- afterany:100_0:100_1"]


def test_without_arrays_chains_of_their_own(tmp_path: Path, queue: Queue) -> None:
    home = submitted(tmp_path, "train.lora_rank=8,16", "cluster.arrays=false")
    assert queue.lines == [
        "/shared/0-prepare",
        "/0-train <- afterok:100",
        "/0-merge <- afterok:101",
        "/0-infer <- afterok:102",
        "/1-train <- afterok:100",
        "/1-merge <- afterok:104",
        "/1-infer <- afterok:105",
        "-report <- afterany:100:103:106",
    ]
    assert not any("--array" in job.text or "@POINT@" in job.text for job in queue.jobs)
    assert list(home.groups.glob("*.txt")) == []


def test_array_parallelism_is_over_all_arrays(tmp_path: Path, queue: Queue) -> None:
    submitted(tmp_path, "nodes=1,2", "train.lora_rank=8,16", "cluster.array_parallelism=2")
    trains = [job for job in queue.living if "train" in job.key]
    assert [str(job) for job in trains] == ["-train[2] <- afterok:100_0", "-train-g2[2] <- afterok:100_0,afterany:101"]
    assert [job.at_once for job in queue.living] == [None, 2, None, None, 2, None, None, None]
    assert "#SBATCH --array=0-1%2\n" in trains[0].text


def test_array_parallelism_without_arrays_is_so_many_lanes(tmp_path: Path, queue: Queue) -> None:
    rates = "train.learning_rate=1e-5,2e-5,3e-5,4e-5,5e-5"
    submitted(tmp_path, rates, "pipeline=train", "cluster.arrays=false", "cluster.array_parallelism=2")
    assert [str(job) for job in queue.living if "train" in job.key] == [
        "/0-train <- afterok:100",
        "/1-train <- afterok:100",
        "/2-train <- afterok:100,afterany:101",
        "/3-train <- afterok:100,afterany:102",
        "/4-train <- afterok:100,afterany:103",
    ]


@pytest.mark.parametrize("most", (4, 5, 8, 13, 18, 19))
def test_what_fits_goes_with_its_whole_chain(tmp_path: Path, queue: Queue, most: int) -> None:
    """Whatever the limit: no chain in parts, nobody twice, nobody lost; once there is room all are there."""
    home, todo = make(tmp_path, *SIX, "cluster.array_parallelism=2")
    queue.most = most
    left = submit(home, todo)
    whole = load(home) or {}
    there = [name for group in whole["groups"] for name in group["members"]]
    assert sorted(there + [name for chain in left for name in chain.members]) == [*"012345", "shared/0"]
    assert bool(left) is (most < 1 + 3 * 6)
    for job in queue.living:
        assert not job.held and all(one.alive for one in queue.by_id(re.findall(r"\d+", job.dependency))), job
    by_kind = [sum(job.count or 1 for job in queue.living if kind in job.key) for kind in ("train", "merge", "infer")]
    assert len(set(by_kind)) == 1 and by_kind[0] == len(there) - 1
    queue.most = 10**6
    assert sweep.go_on(home) == []
    trains = [job for job in queue.living if "train" in job.key]
    assert sum(job.count or 0 for job in trains) == 6
    for before, after in pairwise(trains):
        assert before.id in after.dependency.partition("afterany:")[2].split(":"), "never more than array_parallelism"
    keys = [job.key for job in queue.living]
    assert len(set(keys)) == len(keys) and sum("report" in key for key in keys) == 1
    report = next(job for job in queue.living if "report" in job.key)
    infers = {job.id for job in queue.living if "infer" in job.key}
    assert infers <= set(re.findall(r"\d+", report.dependency)), "after all"
    assert sweep.go_on(home) == [] and [job.key for job in queue.living] == keys, "nothing twice"


@pytest.mark.parametrize("kind", ["prepare", "infer", "report"])
@pytest.mark.parametrize("arrays", ["true", "false"])
def test_a_refusal_takes_everything_back(tmp_path: Path, queue: Queue, kind: str, arrays: str) -> None:
    home, todo = make(tmp_path, *SIX, f"cluster.arrays={arrays}")
    queue.refuse = f"-{kind}"
    with pytest.raises(Refused, match="Invalid account"):
        submit(home, todo)
    assert queue.living == []
    assert [group["members"] for group in (load(home) or {})["groups"]] in ([], [[]])


@pytest.mark.parametrize("arrays", ["true", "false"])
@pytest.mark.parametrize("when", ["kill_before", "kill_after"])
@pytest.mark.parametrize("number", [1, 2, 4, 5, 8])
def test_a_launcher_that_died_is_gone_on_for(tmp_path: Path, queue: Queue, number: int, when: str, arrays: str) -> None:
    home, todo = make(tmp_path, "train.lora_rank=8,16", f"cluster.arrays={arrays}", "cluster.array_parallelism=1")
    setattr(queue, when, number)
    total = 5 if arrays == "true" else 8
    if number <= total:
        with pytest.raises(Killed):
            submit(home, todo)
        assert all(job.held or job.dependency for job in queue.living if "report" not in job.key)
    else:
        submit(home, todo)
    sweep.go_on(home)
    # what nobody took may have another number
    lines = [re.sub(r"-[gr]\d+", "", line) if when == "kill_before" else line for line in queue.lines]
    lines = [re.sub(r"\d{3}", "N", line) for line in lines]
    first = ["-prepare[1]", "-train[2] <- afterok:N_0", "-merge[2] <- aftercorr:N", "-infer[2] <- aftercorr:N"]
    if arrays == "false":
        first = ["/shared/0-prepare", "/0-train <- afterok:N", "/0-merge <- afterok:N", "/0-infer <- afterok:N"]
        first += ["/1-train <- afterok:N,afterany:N", "/1-merge <- afterok:N", "/1-infer <- afterok:N"]
    assert lines[:-1] == first
    assert lines[-1].startswith("-report") and not any(job.held for job in queue.living)
    groups = (load(home) or {})["groups"]
    assert all(job["job_id"] for group in groups if group["members"] for job in group["jobs"].values())


def test_slurm_silent_in_between_is_told_and_gone_on_with(
    tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, todo = make(tmp_path, *SIX)

    def silent(submission: Submission, text: str, again: bool = True) -> str:
        if "-merge" in submission.key:
            raise OSError(28, "No space left on device")
        return queue.sbatch(submission, text)

    monkeypatch.setattr(slurm, "_sbatch", silent)
    with pytest.raises(PartlySubmitted, match=r"No space left.*pkuslurm retry") as told:
        submit(home, todo)
    assert told.value.exit_code == 3 and "\n" not in str(told.value)
    assert all(job.held or job.dependency for job in queue.living)
    monkeypatch.setattr(slurm, "_sbatch", queue.sbatch)
    assert sweep.go_on(home) == []
    assert [job.key.removeprefix(SWEEP_ID) for job in queue.living] == [
        "-prepare", "-train", "-merge", "-infer", "-report"
    ]  # fmt: skip


def test_in_one_allocation(tmp_path: Path, queue: Queue) -> None:
    submitted(tmp_path, *SIX, "cluster.pack=true")
    keys = [job.key for job in queue.living]
    assert len(keys) == 3 and len(set(keys)) == 3, keys
    assert str(queue.living[1]).endswith("[6] <- afterok:100_0")
    assert queue.living[1].text.count("srun ") == 3


def test_points_without_prepare_wait_for_no_share(tmp_path: Path, queue: Queue) -> None:
    """Whichever of the pipelines comes first."""
    for number, pipelines in enumerate(("infer,full", "full,infer")):
        queue.jobs.clear()
        submitted(
            tmp_path / str(number), f"pipeline={pipelines}", "model.path=/m", "model.template=qwen", "dry_run=true"
        )
        waits = {line.partition(" <- ")[0].split("-g")[0]: line.partition(" <- ")[2] for line in queue.lines}
        assert waits["-train[1]"] == "afterok:100_0"
        assert "" in [line.partition(" <- ")[2] for line in queue.lines if line.startswith("-infer")], queue.lines


def test_scripts_are_bash(tmp_path: Path, queue: Queue) -> None:
    for number, arrays in enumerate(("true", "false")):
        submitted(tmp_path / f"a 'b\" $(x) {number}", "train.lora_rank=8,16", f"cluster.arrays={arrays}")
    for job in queue.jobs:
        done = subprocess.run(["bash", "-n"], input=job.text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), job


# What Slurm has lost, and what a launcher that was killed left behind.


def killed(queue: Queue, monkeypatch: pytest.MonkeyPatch, after: bool = False) -> None:
    """The next launcher is killed when all is submitted: before it lets that go, or before it has written that down."""

    def release(job_id: str) -> None:
        monkeypatch.setattr(commands, "release", queue.release)
        if after:
            queue.release(job_id)
        raise Killed

    monkeypatch.setattr(commands, "release", release)


def elements(queue: Queue, kind: str) -> int:
    return sum((job.count or 1) - len(job.over) for job in queue.living if f"-{kind}" in job.key)


@pytest.mark.parametrize("kind", ["train", "merge", "infer"])
def test_an_array_that_slurm_has_lost_takes_its_group_along(
    tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    home, todo = make(tmp_path, *SIX)
    killed(queue, monkeypatch)
    with pytest.raises(Killed):
        submit(home, todo)
    queue.lose(f"-{kind}")
    assert sweep.go_on(home) == []
    assert [elements(queue, kind) for kind in ("train", "merge", "infer")] == [6, 6, 6]
    assert not any(job.held for job in queue.living if job.key != "another")
    assert queue.named("another").alive, "under its id is somebody else's job"
    keys = [job.key for job in queue.living]
    assert sweep.go_on(home) == [] and [job.key for job in queue.living] == keys, "nothing twice"


def test_what_was_let_go_and_failed_is_not_lost(tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher was killed after it had let the arrays go; nothing that runs is cancelled (``Queue.cancel``)."""
    home, todo = make(tmp_path, *SIX)
    killed(queue, monkeypatch, after=True)
    with pytest.raises(Killed):
        submit(home, todo)
    train = queue.named("-train")
    queue.jobs.remove(train)  # forgotten after five minutes
    for point in "012345":
        write_json(home.point(int(point)).state("train"), {"attempt": 1, "state": "FAILED"})
    queue.named("-merge").over |= {0}
    assert sweep.go_on(home) == []
    assert [elements(queue, kind) for kind in ("train", "merge", "infer")] == [6, 6, 6]
    assert not any(job.held for job in queue.living) and queue.named("-train").dependency == "afterok:100_0"


def test_what_waits_for_a_training_that_failed_is_sent_again_with_it(tmp_path: Path, queue: Queue) -> None:
    """Of its point alone."""
    home = submitted(tmp_path, *SIX)
    train, merge, infer = (queue.named(f"-{kind}") for kind in ("train", "merge", "infer"))
    train.over |= {2}
    assert sweep.go_on(home, room=1) == [] and not merge.over, "who feeds the rest in retries nothing"
    assert sweep.go_on(home) == []
    assert merge.over == infer.over == {2}
    assert [elements(queue, kind) for kind in ("train", "merge", "infer")] == [6, 6, 6]
    assert home.table(2).read_text(encoding="utf-8") == "2\n"


def test_what_is_held_is_let_go_by_a_retry_with_one_call_an_array(tmp_path: Path, queue: Queue) -> None:
    home = submitted(tmp_path, *SIX)
    queue.released.clear()
    train = queue.named("-train")
    train.held = True  # by its user; or the controller has forgotten that it was let go
    sweep.go_on(home, room=1)
    assert train.held and queue.released == []
    sweep.go_on(home)
    assert not train.held and queue.released == [train.id]


def test_the_report_is_looked_for_as_all_others(tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    home, todo = make(tmp_path, *SIX)

    def sbatch(submission: Submission, text: str, again: bool = True) -> str:
        job_id = queue.sbatch(submission, text)
        if "-report" in submission.key:
            queue.jobs[-1].key = "another"
        return job_id

    monkeypatch.setattr(slurm, "_sbatch", sbatch)
    with pytest.raises(PartlySubmitted, match=r"has lost .*-report"):
        submit(home, todo)
    assert queue.released == []
    monkeypatch.setattr(slurm, "_sbatch", queue.sbatch)
    assert sweep.go_on(home) == []
    assert queue.named("-report").key and not any(job.held for job in queue.living)


@pytest.fixture
def again(tmp_path: Path, queue: Queue) -> SweepDir:
    """A sweep whose point 0 has failed as a whole, long ago; its data is there."""
    home = submitted(tmp_path, *SIX)
    share = home.shared(0)
    write_text(share.data / "state.json", "{}")
    marker.write(share, share.run_id, "prepare", 1, "100", [share.data / "state.json"])
    for kind in ("prepare", "train", "merge", "infer"):
        queue.named(f"-{kind}").over |= {0}
    return home


def alone_again(home: SweepDir) -> None:
    unpack(home.point(0))
    with pytest.raises(Killed):
        retry(home.point(0))


def test_a_point_that_was_half_sent_by_itself_is_let_go_when_all_of_it_is_there(again: SweepDir, queue: Queue) -> None:
    queue.kill_after = queue.asked + 2
    alone_again(again)
    train = queue.named("/0-train")
    assert train.held
    queue.refuse = "/0-infer"
    with pytest.raises(Refused):
        sweep.go_on(again)
    assert train.id not in queue.released and not train.alive, "nothing of it ever ran"


def test_a_point_that_was_let_go_and_failed_is_sent_again(
    again: SweepDir, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(queue, monkeypatch, after=True)
    alone_again(again)
    queue.jobs.remove(queue.named("/0-train"))  # failed, and forgotten
    assert sweep.go_on(again) == []
    assert [elements(queue, kind) for kind in ("train", "merge", "infer")] == [6, 6, 6]
    assert not any("/0-" in job.key for job in queue.living), "what waited for it is taken away"
