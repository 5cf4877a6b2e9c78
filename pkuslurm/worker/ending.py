"""How a node's part of a job ends: what is written down, what is said, the exit code; and whether it starts again."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pkuslurm import rundir
from pkuslurm.paths import command
from pkuslurm.worker import attempts, checkpoints, completion, disk, failures, requeue
from pkuslurm.worker.failures import describe
from pkuslurm.worker.job import Job
from pkuslurm.worker.state import Recorder
from pkuslurm.worker.supervise import POLL_SECONDS, STOPPED_CODE, Outcome, Supervisor

# for a node that only saw its peers go away: this long it waits to hear from the other nodes why
CAUSE_SECONDS = 2.0
# a node that has neither ended nor failed by then was lost
LOST_SECONDS = 12.0
# after a stop that all nodes make together
TOGETHER_SECONDS = 15.0
# not a mistake in what was asked for: it can be tried again
_NOBODYS = (failures.HANG, failures.STUCK, failures.NODE)
# a requeued or preempted job is ended by Slurm; should it not be, so long we wait for it
ENDED_BY_SLURM_SECONDS = 600.0


def end(recorder: Recorder, state: str, code: int | None, reason: str | None) -> int:
    """Write the last state and say it; ``code`` as subprocess has it. Returns the worker's exit code."""
    shell = 128 - code if code is not None and code < 0 else code
    # what ended for want of room seldom says so (torch: "file write failed"), and never where
    if state == "FAILED" and (lack := disk.lack(recorder.run.path)) and lack not in (reason or ""):
        reason = f"{reason}; {lack}" if reason else lack
    say(f"{recorder.kind} {state}" + (f": {reason}" if reason else ""))
    recorder.write(state, shell, reason)
    if state == "COMPLETED":
        return 0
    return shell or 1 if state == "CANCELLED" else 1


def cancelled(job: Job, recorder: Recorder, environ: Mapping[str, str], number: int, more: str = "") -> int:
    """By a signal: somebody's wish, or a preemption, after which Slurm starts the job again by itself."""
    if number == signal.SIGTERM and goes_on(job, environ) and requeue.preempted(environ):
        # a job that ends by itself in the time of grace would not be started again
        end(recorder, "REQUEUED", STOPPED_CODE, f"preempted{more}")
        _wait_for_slurm()
        return STOPPED_CODE
    code = 128 + number
    end(recorder, "CANCELLED", code, f"cancelled: the worker on {recorder.host} got signal {number}{more}")
    return code


def goes_on(job: Job, environ: Mapping[str, str]) -> bool:
    """Whether Slurm can be asked for a next attempt: not for a job by hand, nor for a local run."""
    return job.max_attempts is not None and requeue.ours(environ)


def fenced(recorder: Recorder, newer: int) -> int:
    """Another attempt has taken over: nothing more is written.

    Not an error: once its cable is back, this attempt's srun would end the step of that name, which now is the newer
    attempt's.
    """
    say(f"attempt {newer} has taken over from this one, attempt {recorder.attempt} on {recorder.host}, which ends")
    return 0


def incomplete(job: Job, recorder: Recorder, error: completion.Incomplete) -> int:
    """The command ended well and left less than it should have."""
    if job.run.stop(job.kind).exists():
        return end(recorder, "FAILED", STOPPED_CODE, _stopped(job))
    return end(recorder, "FAILED", 1, f"not complete: {error}")


def saved(job: Job, supervisor: Supervisor, environ: Mapping[str, str]) -> int:
    """All ranks stopped at Slurm's word, with a checkpoint: on into the next attempt, if there may be one."""
    recorder, signals = supervisor.recorder, supervisor.signals
    step = last_step(job)
    if recorder.node_rank > 0:
        # not an error: that would make srun end node 0 before it has seen to the next attempt
        end(recorder, "REQUEUED", STOPPED_CODE, f"stopped at step {step}")
        if signals.received is not None and requeue.preempted(environ):
            _wait_for_slurm()
        return 0
    deadline = time.monotonic() + TOGETHER_SECONDS
    while any(value.get("state") == "RUNNING" for value in recorder.peers().values()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if signals.received is None:
        return _again(job, supervisor, environ, "TIMEOUT", f"stopped at step {step} before its time limit")
    more = f"; its checkpoint of step {step} is kept, retry goes on from it"
    return cancelled(job, recorder, environ, signals.received, more)


def failed(job: Job, supervisor: Supervisor, outcome: Outcome, environ: Mapping[str, str]) -> int:
    """The command did not end well somewhere: name the first failure. A node that was lost, a bad card, or a rank that
    hangs, is nobody's mistake: the next attempt goes on without it."""
    recorder = supervisor.recorder
    first = failures.first(supervisor.failures())
    # a stop leaves torchrun's 1, so that the request tells; a rank that was killed meanwhile did not stop
    requested = (outcome.stopped or job.run.stop(job.kind).exists()) and not supervisor.asked
    wait = CAUSE_SECONDS if job.nodes > 1 and not requested else 0.0
    deadline = time.monotonic() + wait
    while (first is None or first.weight > 0) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        first = failures.first(supervisor.failures())
    if requested and (first is None or first.weight > 0):
        return end(recorder, "FAILED", STOPPED_CODE, _stopped(job))
    if first is not None and (first.type in _NOBODYS or first.weight >= 2) and job.nodes > 1:
        if recorder.node_rank > 0:
            return _after_node_0(recorder, str(first))
        if first.weight >= 2 and (lost := _lost(supervisor)):
            return _node_lost(job, supervisor, environ, lost, str(first))
    if first is not None and first.type in _NOBODYS:
        named = first.type == failures.NODE or (first.type == failures.STUCK and job.nodes > 1)
        hosts = [first.host] if named and first.host else []
        if hosts:
            attempts.blame(job, recorder, hosts)
        return _again(job, supervisor, environ, "NODE_FAIL" if hosts else "FAILED", str(first))
    if first is not None:
        code = 1 if first.code is None else first.code
        return end(recorder, "FAILED", code, str(first))
    if outcome.code is None:
        return end(recorder, "FAILED", 1, outcome.peer or "another node failed")
    return end(recorder, "FAILED", outcome.code, f"{job.kind} on {recorder.host} {describe(outcome.code)}")


def _lost(supervisor: Supervisor) -> list[str]:
    """Hosts of the watched nodes that say nothing any more while all the others are ending."""
    deadline = time.monotonic() + LOST_SECONDS
    while silent := _silent(supervisor):
        if time.monotonic() > deadline:
            return silent
        time.sleep(POLL_SECONDS)
    return []


def _silent(supervisor: Supervisor) -> list[str]:
    spoken = {failure.host for failure in supervisor.failures() if failure.host}
    running = [value for value in supervisor.recorder.peers().values() if value.get("state") == "RUNNING"]
    return [str(value.get("host")) for value in running if value.get("host") not in spoken]


def _after_node_0(recorder: Recorder, reason: str) -> int:
    """The other nodes': say it, and leave only when node 0 has seen to the next attempt. An exit code other than 0
    makes srun end node 0, and scontrol with it."""
    end(recorder, "FAILED", 1, reason)
    deadline = time.monotonic() + LOST_SECONDS + TOGETHER_SECONDS
    while (state := recorder.peers().get(0, {}).get("state")) == "RUNNING" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return 0 if state == "REQUEUED" else 1


def _node_lost(job: Job, supervisor: Supervisor, environ: Mapping[str, str], lost: list[str], symptom: str) -> int:
    attempts.blame(job, supervisor.recorder, lost)
    reason = f"node {', '.join(lost)} was lost ({symptom})"

    def told() -> bool:
        return supervisor.signals.received is not None

    if goes_on(job, environ) and not told():
        # Slurm 22.05 forgets the gres of a job that is requeued before it has noticed the node's end, and then cannot
        # start it; left alone, it notices (SlurmdTimeout) and requeues the job itself
        end(supervisor.recorder, "REQUEUED", 1, f"{reason}; Slurm starts it again")
        _wait_for_slurm(told)
        if told():
            return STOPPED_CODE
    return _again(job, supervisor, environ, "NODE_FAIL", reason)


def _again(job: Job, supervisor: Supervisor, environ: Mapping[str, str], state: str, reason: str) -> int:
    """Have Slurm start the job again under its id; where that is not to be had, ``state`` with the line to type."""
    recorder = supervisor.recorder
    number = recorder.attempt - job.first_attempt + 1
    if job.max_attempts is None or not goes_on(job, environ):
        return end(recorder, "FAILED", STOPPED_CODE, reason)
    if supervisor.signals.received is not None:  # cancelled meanwhile: that is not to be undone
        return cancelled(job, recorder, environ, supervisor.signals.received)
    go_on = f"go on with: {command('retry', job.run_id)}"
    if number >= job.max_attempts:
        reason = f"{reason}; resume.max_attempts={job.max_attempts} are used up"
        return end(recorder, state, STOPPED_CODE, f"{reason}; {go_on}")
    end(recorder, "REQUEUED", STOPPED_CODE, f"{reason}; it goes on by itself")
    problem = requeue.requeue(environ)
    if problem is not None:
        return end(recorder, state, STOPPED_CODE, f"{reason}; it could not be requeued ({problem}); {go_on}")
    _wait_for_slurm(lambda: supervisor.signals.received is not None)
    return STOPPED_CODE


def _wait_for_slurm(told: Callable[[], bool] = lambda: False) -> None:
    say("waiting for Slurm to end this attempt")
    deadline = time.monotonic() + ENDED_BY_SLURM_SECONDS
    while time.monotonic() < deadline and not told():
        time.sleep(0.5)


def _stopped(job: Job) -> str:
    return f"stopped at step {last_step(job)}, as asked; retry goes on from its checkpoint"


def last_step(job: Job) -> int:
    """From the newest checkpoint or the progress file."""
    step = (rundir.read_json(job.run.progress(job.kind)) or {}).get("step")
    saved_at = checkpoints.last_step(Path(str(job.expect.get("dir") or job.run.adapter)))
    return max(saved_at, step if isinstance(step, int) else 0)


def say(line: str) -> None:
    # "pkuslurm: " at a line's start is the payloads'
    with suppress(OSError):
        print(f"pkuslurm worker: {line}", file=sys.stderr, flush=True)
