"""Which checkpoint is gone on from, when an attempt may start, and who has to make room."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.worker import attempts, checkpoints, completion, requeue, sameness
from pkuslurm.worker.job import Job, load
from pkuslurm.worker.state import Recorder
from pkuslurm.worker.supervise import Hang
from tests.worker.conftest import Lab, adapter, safetensors

WEIGHTS = "adapter_model.safetensors"


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", "x" * 100)


def checkpoint(folder: Path, step: int, last: int = 60, ranks: int = 4) -> Path:
    path = folder / f"checkpoint-{step}"
    safetensors(path / WEIGHTS)
    for name in ("optimizer.pt", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(ranks))):
        archive(path / name)
    write_json(path / "trainer_state.json", {"global_step": step, "max_steps": last})
    return path


def cut(name: str, by: int = 8) -> Callable[[Path], None]:
    def tear(path: Path) -> None:
        with (path / name).open("r+b") as file:
            file.truncate((path / name).stat().st_size - by)

    return tear


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def other_step(path: Path) -> None:
    write_json(path / "trainer_state.json", {"global_step": 7, "max_steps": 60})


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


TORN = {
    "trainer_state.json is not there": remove("trainer_state.json"),
    "trainer_state.json is not there or torn": cut("trainer_state.json"),
    "trainer_state.json is of step 7": other_step,
    "truncated": cut(WEIGHTS),
    "no optimizer.pt": remove("optimizer.pt"),
    "optimizer.pt is torn": cut("optimizer.pt"),
    "no scheduler.pt": remove("scheduler.pt"),
    "scheduler.pt is torn": cut("scheduler.pt"),
    "no rng_state_3.pth": remove("rng_state_3.pth"),
    "rng_state_2.pth is torn": cut("rng_state_2.pth"),
    "not there": empty,
}


@pytest.mark.parametrize("words", TORN)
def test_a_torn_checkpoint_is_moved_aside_and_the_one_before_is_taken(tmp_path: Path, words: str) -> None:
    folder, aside = tmp_path / "adapter", tmp_path / "bad-checkpoints"
    good = checkpoint(folder, 20)
    TORN[words](checkpoint(folder, 30))
    kept = sorted(path.name for path in (folder / "checkpoint-30").iterdir())
    for number in ("", ".2"):
        found, problems = checkpoints.newest(folder, WEIGHTS, 4, aside)
        assert found == checkpoints.Checkpoint(good, 20, 60)
        assert len(problems) == 1 and words in problems[0] and f"lies in {aside}" in problems[0], problems
        assert sorted(path.name for path in (aside / f"checkpoint-30{number}").iterdir()) == kept, "nothing is deleted"
        TORN[words](checkpoint(folder, 30))


def test_sound_checkpoints_of_other_kinds(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", 5, ranks=0)
    archive(one / "rng_state.pth")
    assert checkpoints.newest(tmp_path / "one", WEIGHTS, 1, tmp_path / "bad")[0] is not None
    zero = checkpoint(tmp_path / "zero", 5)
    (zero / "optimizer.pt").unlink()
    write_text(zero / "latest", "global_step5")
    (zero / "global_step5").mkdir()
    for rank in range(4):
        archive(zero / "global_step5" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert checkpoints.check(zero, 5, WEIGHTS, 4).step == 5
    with pytest.raises(completion.Incomplete, match="4 optimizer shards, 2 ranks"):
        checkpoints.check(zero, 5, WEIGHTS, 2)
    assert checkpoints.newest(tmp_path / "nothing", WEIGHTS, 1, tmp_path / "bad") == (None, [])


@pytest.fixture
def job(lab: Lab) -> Job:
    path = lab.job("train", "", nodes=2, nproc_per_node=2, resume={"max_attempts": 5, "hang_minutes": 1})
    model = lab.run.path / "model"
    safetensors(model / "model.safetensors")
    write_text(
        lab.run.train_yaml,
        f"model_name_or_path: {model}\nlearning_rate: 0.1\nlora_target:\n- q\n- v\nlogging_steps: 5\n",
    )
    return load(path)


def recorder(job: Job, attempt: int) -> Recorder:
    return Recorder(job.run, job.kind, 0, job.nodes, attempt, "7", "node0")


def decide(job: Job, attempt: int) -> attempts.Decision:
    return attempts.decide(job, recorder(job, attempt), attempt - 1)


def test_from_attempt_to_attempt(job: Job) -> None:
    folder = job.run.adapter
    assert decide(job, 1) == attempts.Decision()
    checkpoint(folder, 20)
    second = decide(job, 2)
    assert (second.checkpoint, second.step) == (folder / "checkpoint-20", 20)
    value = read_json(job.run.attempt("train")) or {}
    assert value["checkpoint"] == str(folder / "checkpoint-20") and value["decided"]
    assert [(one["attempt"], one["step"]) for one in value["history"]] == [(1, 0), (2, 20)]
    decide(job, 3)
    with pytest.raises(attempts.Refused, match="attempts 2 and 3 were stopped before a checkpoint after step 20"):
        decide(job, 4)
    checkpoint(folder, 30)
    assert decide(job, 5).step == 30
    with pytest.raises(attempts.Refused, match="max_attempts=5 are used up"):
        decide(job, 6)


CHANGED: dict[str, Callable[[RunDir], object]] = {
    "train.learning_rate (0.1, now 0.2)": lambda run: edit(run.train_yaml, "0.1", "0.2"),
    "train.lora_target": lambda run: edit(run.train_yaml, "- v", "- k"),
    "train.per_device_train_batch_size (unset, now 3)": lambda run: edit(
        run.train_yaml, "learning", "per_device_train_batch_size: 3\nlearning"
    ),
    "the base model (model.safetensors)": lambda run: cut("model/model.safetensors", 1)(run.path),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("words", CHANGED)
def test_what_has_changed_meanwhile_is_refused_by_name(job: Job, words: str) -> None:
    decide(job, 1)
    checkpoint(job.run.adapter, 20)
    edit(job.run.train_yaml, "logging_steps: 5", "logging_steps: 1")
    assert decide(job, 2).step == 20, "what changes nothing may change"
    CHANGED[words](job.run)
    with pytest.raises(attempts.Refused) as error:
        decide(job, 3)
    assert words in str(error.value) and "checkpoint-20" in str(error.value)


def test_another_number_of_ranks(job: Job) -> None:
    before = sameness.look(job, 4)
    assert sameness.differences(before, sameness.look(job, 8)) == ["the number of ranks (4, now 8)"]
    assert sameness.differences(before, before) == [] == sameness.differences(None, before)


def test_all_steps_done_and_cut_off_before_the_end_was_written(job: Job) -> None:
    """From the last checkpoint, without training a step too many."""
    decide(job, 1)
    last = checkpoint(job.run.adapter, 60)
    write_json(last / "adapter_config.json", {"r": 8})
    found = decide(job, 2)
    assert found.complete and found.step == 60
    assert {path.name for path in completion.judge(job)} == {WEIGHTS, "trainer_state.json", "adapter_config.json"}
    assert not list(job.run.adapter.glob("*.pt")) and not list(job.run.adapter.glob("*.pth"))
    assert decide(job, 3).notes == ("it was complete already, but for its marker",)


def test_a_finished_training_without_a_marker_is_not_run_again(lab: Lab) -> None:
    file = lab.job("train", "raise SystemExit('it ran again')", resume={"max_attempts": 3})
    adapter(lab.run.adapter)
    assert lab.work(file) == 0
    assert lab.state("train")["state"] == "COMPLETED"
    assert read_json(lab.run.done("train")) is not None


def test_an_older_attempt_that_wakes_up_late_takes_nothing_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hung while it looked at the checkpoints, as it blamed a node, or in the very write."""
    first, second = recorder(job, 1), recorder(job, 2)
    look, file = attempts._train, job.run.attempt("train")

    def hang(job: Job, value: dict[str, Any]) -> attempts.Decision:
        monkeypatch.setattr(attempts, "_train", look)
        attempts.decide(job, second, 1)
        return look(job, value)

    monkeypatch.setattr(attempts, "_train", hang)
    with pytest.raises(attempts.Replaced) as error:
        attempts.decide(job, first, 0)
    assert error.value.attempt == 2
    decided = read_json(file) or {}
    attempts.blame(job, first, ["node7"])
    assert read_json(file) == decided and decided["attempt"] == 2 and decided["decided"]
    attempts.blame(job, second, ["node8"])
    write_json(file, decided | {"attempt": 1})
    assert attempts.taken(job, second) is None
    assert read_json(file) == decided | {"bad_nodes": ["node8"]}, "the newer one has it again"
    assert attempts.taken(job, first) == 2


def test_an_older_attempt_makes_room(lab: Lab) -> None:
    """As after a pulled cable: both run, the newer takes over, the older ends and writes nothing more."""
    write = "open('adapter.txt', 'a').write('1\\n'); time.sleep(0.1)\n"
    old = lab.start(lab.job("report", f"while True: {write}"), PKUSLURM_JOB_ID="7", SLURMD_NODENAME="node0")
    lab.until(lambda: (lab.run.path / "adapter.txt").exists())
    script = "open('report.html', 'w').write('new')\n"
    new = lab.start(lab.job("report", script, first_attempt=2), PKUSLURM_JOB_ID="8", SLURMD_NODENAME="node5")
    assert new.wait(30) == 0
    assert old.wait(30) == 0
    size = (lab.run.path / "adapter.txt").stat().st_size
    time.sleep(0.5)
    assert (lab.run.path / "adapter.txt").stat().st_size == size
    assert (lab.state("report")["state"], lab.state("report")["attempt"]) == ("COMPLETED", 2)
    assert "attempt 2 has taken over" in lab.run.log("report", "7", 0).read_text(encoding="utf-8")
    late = lab.start(lab.job("report", "raise SystemExit(5)"), PKUSLURM_JOB_ID="7")
    assert late.wait(30) == 0 and lab.state("report")["attempt"] == 2


STOPPABLE = """
open('state/train.progress.json', 'w').write(json.dumps({'step': 3, 'attempt': 1}))
while not os.path.exists('state/train.stop'): time.sleep(0.05)
os.makedirs('adapter/checkpoint-16'); sys.exit(75)
"""


@pytest.mark.parametrize(("number", "state"), [(signal.SIGUSR2, "TIMEOUT"), (signal.SIGTERM, "CANCELLED")])
def test_slurms_word_reaches_the_worker_alone(lab: Lab, number: signal.Signals, state: str) -> None:
    """The signal goes to every process of the step; only the worker heeds it, and the ranks save."""
    file = lab.job("train", STOPPABLE, resume={"max_attempts": 5})
    worker = lab.start(file, SLURM_JOB_ID="7", PATH="/nowhere")
    lab.until(lambda: lab.run.progress("train").exists())
    for pid in lab.left():
        os.kill(pid, number)
    assert worker.wait(30) == (143 if number == signal.SIGTERM else 1)
    found = lab.state("train")
    assert found["state"] == state and "16" in found["reason"], found
    if state == "TIMEOUT":
        assert "no scontrol" in found["reason"] and f"pkuslurm retry {shlex.quote(lab.run.run_id)}" in found["reason"]


def scontrol(folder: Path, text: str) -> dict[str, str]:
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{text}\n', encoding="utf-8")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}


def test_what_slurm_is_asked(tmp_path: Path) -> None:
    environ = scontrol(tmp_path, "exit 0")
    assert requeue.requeue(environ) is None
    assert requeue.requeue(environ | {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}) is None
    assert (tmp_path / "asked").read_text(encoding="utf-8").split("\n") == ["requeue 12", "requeue 10_3", ""]
    refused = "Requested operation is presently disabled for job 12"
    assert requeue.requeue(scontrol(tmp_path, f"echo '{refused}' >&2; exit 1")) == refused
    assert requeue.requeue(scontrol(tmp_path, "echo 'Job is pending execution for job 12' >&2; exit 1")) is None
    assert requeue.requeue({"PATH": "/nowhere"}) == "there is no scontrol on this node"
    line = "JobId=12 JobName=x JobState=RUNNING Reason=None PreemptTime={} SuspendTime=None"
    for moment, right in (("2026-11-24T10:00:00", True), ("None", False)):
        assert requeue.preempted(scontrol(tmp_path, f"echo '{line.format(moment)}'")) is right
    ended = line.format("2026-11-24T10:00:00").replace("RUNNING", "CANCELLED")
    assert requeue.preempted(scontrol(tmp_path, f"echo '{ended}'")) is False


def test_what_is_a_hang(tmp_path: Path) -> None:
    clock = [0.0]
    file = tmp_path / "progress.json"
    watch = Hang(file, 60, lambda: clock[0])

    def look(at: float, **value: Any) -> str | None:
        """Every 20 seconds until ``at``, as the supervisor does every five."""
        while clock[0] < at - 20:
            clock[0] += 20
            watch.look()
        clock[0] = at
        if value:
            file.write_text(json.dumps(value), encoding="utf-8")
        return watch.look()

    assert look(0, step=1, phase=None) is None
    assert look(59) is None
    assert look(61) == "no step for 1.0 minutes; the last one was 1"
    assert look(62, step=2, phase=None) is None, "a step of 62 seconds: now ten times that is waited for"
    assert look(62 + 600) is None
    assert look(62 + 621) == "no step for 10.3 minutes; the last one was 2"
    for number, phase in enumerate(("saving", "evaluating", "ending")):
        assert look(1000 + 5000 * number, step=3, phase=phase) is None
        assert look(5000 + 5000 * number) is None
    assert look(16000, step=4, phase=None) is None
    clock[0] += 5000  # the job was suspended, and this watch with it
    assert watch.look() is None
    assert look(clock[0] + 600) is None
    assert look(clock[0] + 60) is not None

    watch = Hang(file, 60, lambda: clock[0])
    begun = clock[0]
    for number in range(5):
        assert look(begun + 20 * number, step=100 * number, phase=None) is None
    assert look(begun + 80 + 61) is not None, "steps of 0.2 seconds, however seldom they are looked at"
