"""What is decided before an attempt of a job starts: whether it may, and from where. Node 0 decides, the others wait.

state/<kind>.attempt.json holds the decision, and what is remembered of the attempts before. It also is the fence: who
finds a newer attempt in it stops writing, for a node that was cut off goes on with its old attempt on the shared disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import checkpoints, completion, sameness
from pkuslurm.worker.job import Job
from pkuslurm.worker.state import Recorder, gone, now, save

# an older attempt looks for a newer one this often, and is given twice that to end
FENCE_SECONDS = 5.0
# for node 0 to decide; looking at checkpoints takes seconds
DECIDE_SECONDS = 600.0
# so many attempts in a row without a newer checkpoint end it
FRUITLESS = 2


class Refused(Exception):
    """This attempt may not start; why."""


class Replaced(Exception):
    """Another attempt has taken over from this one."""

    def __init__(self, attempt: int) -> None:
        super().__init__(f"attempt {attempt} has taken over")
        self.attempt = attempt


@dataclass(frozen=True)
class Decision:
    """``complete``: an earlier attempt had done all but say so. ``notes``: what is to be said in the log."""

    checkpoint: Path | None = None
    step: int = 0
    complete: bool = False
    notes: tuple[str, ...] = ()


def newer(job: Job, attempt: int) -> int | None:
    """The number of the attempt that has taken over from ``attempt``, if there is one."""
    found = (rundir.read_json(job.run.attempt(job.kind)) or {}).get("attempt")
    return found if isinstance(found, int) and found > attempt else None


def taken(job: Job, recorder: Recorder) -> int | None:
    """The number of the attempt that has the run now, where it is not this one's.

    A controller that was killed as it started the job starts it again without counting that: another start of the same
    number, which node 0 knows by who wrote it. An older attempt that hung as it wrote and has woken up since is not
    given way to: node 0 puts its own decision back, which fences the other.
    """
    value = rundir.read_json(job.run.attempt(job.kind)) or {}
    if recorder.replaced_by(value):
        return int(value["attempt"])
    found = value.get("attempt")
    if recorder.decision is not None and isinstance(found, int) and found < recorder.attempt:
        with suppress(PkuslurmError):  # the next look tries again
            save(job.run.attempt(job.kind), recorder.decision)
    return None


def _save(job: Job, recorder: Recorder, value: Mapping[str, Any]) -> None:
    """Write ``value`` as the run's attempt. Raises Replaced, also where that happened while it was being written.

    Between two looks at a shared disk that hangs minutes may pass, and a newer attempt has begun.
    """
    if (other := taken(job, recorder)) is not None:
        raise Replaced(other)
    save(job.run.attempt(job.kind), value)
    if (other := taken(job, recorder)) is not None:
        raise Replaced(other)


def decide(job: Job, recorder: Recorder, restarts: int, make_room: bool = False) -> Decision:
    """Node 0's: take over, look at what is there, write the decision down. ``make_room``: of ``others_at_work``.

    Raises Refused where it has been tried often enough, or what it would go on from is no longer what it was;
    Replaced where another attempt has taken over meanwhile; PkuslurmError and OSError where the run directory cannot be
    written.
    """
    known = rundir.read_json(job.run.attempt(job.kind)) or {}
    history = [one for one in known.get("history") or [] if isinstance(one, dict) and type(one.get("attempt")) is int]
    value = known | {"attempt": recorder.attempt, "job_id": recorder.job_id, "decided": False, "history": history}
    value["by"] = recorder.by
    _save(job, recorder, value)  # from here on an older attempt stops
    recorder.decided = True
    if make_room:
        time.sleep(2 * FENCE_SECONDS)
    if job.max_attempts is not None and restarts + 1 > job.max_attempts:
        raise Refused(f"resume.max_attempts={job.max_attempts} are used up; `pkuslurm retry` tries as often again")
    decision = _train(job, value) if job.kind == "train" and job.max_attempts is not None else Decision()
    own = [one for one in history if job.first_attempt <= one["attempt"] < recorder.attempt]
    fruitless = len(own) >= FRUITLESS and all(one.get("step") == decision.step for one in own[-FRUITLESS:])
    if fruitless and not decision.complete and job.max_attempts is not None:
        numbers = " and ".join(str(one.get("attempt")) for one in own[-FRUITLESS:])
        what = f"a checkpoint after step {decision.step}" if job.kind == "train" else "an end"
        raise Refused(f"attempts {numbers} were stopped before {what}; see their logs, then `pkuslurm retry`")
    entry = {"attempt": recorder.attempt, "job_id": recorder.job_id, "started": now(), "step": decision.step}
    value |= {
        "decided": not decision.complete,  # where nothing is left to do, the other nodes wait for the marker
        "checkpoint": str(decision.checkpoint) if decision.checkpoint else None,
        "history": [*history, entry],
    }
    _save(job, recorder, value)
    recorder.decision = value
    return decision


def await_decision(job: Job, recorder: Recorder, over: Callable[[], bool]) -> None:
    """The other nodes': until node 0 has decided, or ``over()``."""
    deadline = time.monotonic() + DECIDE_SECONDS
    while not over():
        value = rundir.read_json(job.run.attempt(job.kind)) or {}
        if value.get("attempt") == recorder.attempt and value.get("decided"):
            return
        if time.monotonic() > deadline:
            raise PkuslurmError(f"node 0 has not begun within {DECIDE_SECONDS:.0f} s")
        time.sleep(0.2)


def blame(job: Job, recorder: Recorder, hosts: list[str]) -> None:
    """Remember for this run that ``hosts`` failed: whoever watches keeps the next attempt from them.

    An attempt that another has taken over from leaves that one's word as it is.
    """
    if taken(job, recorder) is not None:
        return
    value = rundir.read_json(job.run.attempt(job.kind)) or {}
    value["bad_nodes"] = sorted({*(value.get("bad_nodes") or []), *hosts})
    with suppress(Replaced):
        _save(job, recorder, value)
        recorder.decision = recorder.decision and value


def others_at_work(job: Job, recorder: Recorder) -> bool:
    """Whether an earlier attempt may still run somewhere: its nodes never said that they ended. Nor do dead ones.

    To be asked before this attempt's first word, which takes the place of theirs.
    """
    files = [job.run.state(job.kind), *job.run.state(job.kind).parent.glob(f"{job.kind}.*.json")]
    states = [value for file in files if (value := rundir.read_json(file)) and "node_rank" in value]
    return any(_at_work(value, recorder) for value in states)


def _at_work(value: dict[str, Any], recorder: Recorder) -> bool:
    attempt = value.get("attempt")
    older = isinstance(attempt, int) and attempt < recorder.attempt
    # another start of this number: by node 0 alone, whose word nobody has written yet this time
    older = older or (attempt == recorder.attempt and value.get("node_rank") == 0 and recorder.node_rank == 0)
    return older and value.get("state") == "RUNNING" and not gone(value, recorder.host)


def _train(job: Job, value: dict[str, Any]) -> Decision:
    adapter = Path(str(job.expect.get("dir") or job.run.adapter))
    weights = str(job.expect.get("weights") or "adapter_model.safetensors")
    ranks = job.nodes * job.nproc_per_node
    seen = sameness.look(job, ranks)
    try:
        completion.judge(job)
        return Decision(complete=True, notes=("it was complete already, but for its marker",))
    except completion.Incomplete:
        pass
    there = checkpoints.found(adapter)
    if there and (changed := sameness.differences(value.get("settings"), seen)):
        raise Refused(
            f"it cannot go on from {max(there)[1].name}, for since then has changed: {'; '.join(changed)}; "
            "put it back, or start a new run"
        )
    best, problems = checkpoints.newest(adapter, weights, ranks, job.run.path / "bad-checkpoints")
    if best is None:
        value["settings"] = seen
        return Decision(notes=tuple(problems))
    if best.max_steps and best.step >= best.max_steps and (source := _result(best, seen, weights, ranks)):
        checkpoints.finish(best, source, adapter)
        return Decision(best.path, best.step, True, (*problems, f"all steps were done; finished from {best.path.name}"))
    return Decision(best.path, best.step, False, (*problems, f"goes on from {best.path.name}"))


def _result(last: checkpoints.Checkpoint, seen: dict[str, Any], weights: str, ranks: int) -> Path | None:
    """The checkpoint whose weights a training that has done all its steps leaves: its last, or its best."""
    if seen["settings"].get("load_best_model_at_end") != "true":
        return last.path
    named = (rundir.read_json(last.path / "trainer_state.json") or {}).get("best_model_checkpoint")
    folder = last.path.parent / Path(str(named)).name
    step = folder.name.removeprefix("checkpoint-")
    try:
        return checkpoints.check(folder, int(step), weights, ranks).path if step.isdecimal() else None
    except completion.Incomplete:
        return None
