"""One node's part of one job, from its job file to its marker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir
from pkuslurm.worker import attempts, completion, ending, environment, failures, inside, marker, probe, requeue
from pkuslurm.worker.failures import Failure
from pkuslurm.worker.job import Job, load
from pkuslurm.worker.processes import Tree, end_with
from pkuslurm.worker.rendezvous import Rendezvous, own_rank, rendezvous
from pkuslurm.worker.state import Recorder, host_name
from pkuslurm.worker.supervise import POLL_SECONDS, WARNINGS, Log, Outcome, Signals, Supervisor
from pkuslurm.worker.unpack import unpack

# node 0 is done when the others are; this long it waits for them to say so
PEERS_SECONDS = 30.0


def work(job_file: Path, environ: Mapping[str, str]) -> int:
    """Do this node's part of the job; to be called in a process of its own, on its main thread.

    Returns 0 complete (also: was complete already; a newer attempt has taken over; on other nodes than 0, a stop that
    node 0 goes on from), 1 failed or skipped, 75 stopped with a checkpoint, 130 or 143 cancelled by SIGINT or SIGTERM.
    Says what went wrong in one line on stderr; never raises for a mistake of the user's or the machine's.
    """
    with Signals().handled() as signals:
        if environ.get("PKUSLURM_LAUNCHER_PID", "").isdecimal():
            end_with(int(environ["PKUSLURM_LAUNCHER_PID"]))
        try:
            return _work(job_file, environ, signals)
        except (PkuslurmError, OSError) as error:
            ending.say(_words(error))
        return 1


def _work(job_file: Path, environ: Mapping[str, str], signals: Signals) -> int:
    _check_owner(job_file.parent.parent)
    if not job_file.exists():
        unpack(RunDir(job_file.parent.parent))
    job = load(job_file)
    _check_owner(job.run.path)
    attempt = job.first_attempt + _restarts(environ)
    if marker.doubt(job.run, job.run_id, job.kind) is None:
        ending.say(f"{job.kind} is complete already ({job.run.done(job.kind)}); nothing to do")
        return 0

    recorder = Recorder(
        run=job.run,
        kind=job.kind,
        node_rank=own_rank(environ),
        nodes=job.nodes,
        attempt=attempt,
        job_id=environ.get("PKUSLURM_JOB_ID") or requeue.job_id(environ) or f"local-{attempt}",
        host=host_name(environ),
    )
    if pid := recorder.already_running():
        raise PkuslurmError(f"{job.kind} of {job.run.path} is being worked on already, by process {pid}")
    for parent in job.parents:
        if problem := marker.doubt(job.run, job.run_id, parent):
            return ending.end(recorder, "SKIPPED", None, f"{parent} did not complete: {problem}")
    try:
        meeting = rendezvous(environ, job.nodes)
    except PkuslurmError as error:
        return ending.end(recorder, "FAILED", 1, str(error))

    recorder.hosts = meeting.hosts
    try:
        if newer := attempts.newer(job, attempt):
            return ending.fenced(recorder, newer)
        _clear_leftovers(job, recorder)
        make_room = attempts.others_at_work(job, recorder)
        recorder.write("RUNNING")
        supervisor = Supervisor(job, recorder, signals, _log(environ, job, recorder), saves=_saves(job, environ))
        begun = _begin(job, supervisor, environ, make_room)
        return _run(job, meeting, supervisor, environ) if begun is None else begun
    except (PkuslurmError, OSError) as error:
        # also a full disk may have room again for this line, now that the command is gone
        with suppress(PkuslurmError):
            ending.end(recorder, "FAILED", 1, _words(error))
        return 1


def _begin(job: Job, supervisor: Supervisor, environ: Mapping[str, str], make_room: bool) -> int | None:
    """Agree with the other nodes on where this attempt starts; an exit code where it does not start."""
    recorder, signals = supervisor.recorder, supervisor.signals
    if recorder.node_rank > 0:
        attempts.await_decision(job, recorder, lambda: signals.received is not None or _node_0_has_ended(recorder))
        if signals.received is not None:
            return ending.cancelled(job, recorder, environ, signals.received)
        if marker.doubt(job.run, job.run_id, job.kind) is None:
            return ending.end(recorder, "COMPLETED", 0, None)
        if _node_0_has_ended(recorder):
            return ending.end(recorder, "FAILED", 1, f"node 0 failed: {recorder.peers().get(0, {}).get('reason')}")
        return None
    try:
        decision = attempts.decide(job, recorder, _restarts(environ), make_room)
    except attempts.Replaced as error:
        return ending.fenced(recorder, error.attempt)
    except attempts.Refused as error:
        return ending.end(recorder, "FAILED", 1, str(error))
    for note in decision.notes:
        ending.say(note)
    return _finish(job, supervisor, environ, alone=True) if decision.complete else None


def _node_0_has_ended(recorder: Recorder) -> bool:
    return recorder.peers().get(0, {}).get("state") not in (None, "RUNNING")


def _saves(job: Job, environ: Mapping[str, str]) -> bool:
    """Whether a warning or a TERM of Slurm's lets the training save first."""
    return job.kind == "train" and ending.goes_on(job, environ)


def _run(job: Job, meeting: Rendezvous, supervisor: Supervisor, environ: Mapping[str, str]) -> int:
    """The command from its start to its end, and what is to be said about it."""
    recorder = supervisor.recorder
    ending.say(
        f"{job.kind}, attempt {recorder.attempt}, node {meeting.node_rank} of {meeting.nodes} on {recorder.host}, "
        f"master {meeting.master_addr}:{meeting.master_port} (from {meeting.source})"
    )
    # a TERM is Slurm's word to us: the ranks get it too, and would die before they have saved
    deaf_to = (*WARNINGS, *([signal.SIGTERM] if supervisor.saves else []))
    name = f"{recorder.attempt}-{meeting.node_rank}"
    try:
        env = environment.of(environ, job, meeting, recorder.attempt)
        env, over = probe.look(job, supervisor, env, name)
        if over is None:
            start = inside.start(job, _command(job, meeting), env, name, deaf_to)
            tree = Tree(start.argv, job.cwd, start.env, deaf_to, start.blocked)
    except probe.BadNode as error:
        _note(job, recorder, failures.NODE, error)
        return ending.failed(job, supervisor, Outcome(), environ)
    except PkuslurmError as error:
        _note(job, recorder, failures.REFUSED, error)
        raise
    if over is not None:
        outcome = over
    else:
        try:
            outcome = supervisor.run(tree)
        finally:
            inside.end(start)
    if outcome.survivors:
        ending.say(f"could not be ended: {', '.join(map(str, outcome.survivors))}")

    if outcome.fenced is not None:
        return ending.fenced(recorder, outcome.fenced)
    if outcome.saved and (supervisor.asked or recorder.node_rank > 0):
        return ending.saved(job, supervisor, environ)
    if outcome.cancelled is not None:
        # srun --kill-on-bad-exit ends us where another node has failed: that is then the reason
        trouble = supervisor.trouble()
        if trouble is not None and trouble[0] == "FAILED":
            return ending.failed(job, supervisor, replace(outcome, code=None, peer=trouble[1]), environ)
        return ending.cancelled(job, recorder, environ, outcome.cancelled)
    if outcome.cancelled_by is not None:
        return ending.end(recorder, "CANCELLED", 143, outcome.cancelled_by)
    if outcome.code != 0:
        return ending.failed(job, supervisor, outcome, environ)
    return _finish(job, supervisor, environ)


def _note(job: Job, recorder: Recorder, kind: str, error: Exception) -> None:
    """For all nodes to see, which end then, too."""
    failure = Failure(None, time.time(), kind, str(error), host=recorder.host)
    failures.record(job.run, job.kind, recorder.attempt, failure, place=recorder.node_rank * job.nproc_per_node)


def _finish(job: Job, supervisor: Supervisor, environ: Mapping[str, str], alone: bool = False) -> int:
    """The command ended well on this node: node 0 checks what came of it and writes the marker.

    ``alone``: nothing was left to be done, and the other nodes wait to see the marker.
    """
    recorder = supervisor.recorder
    if recorder.node_rank > 0:
        return ending.end(recorder, "COMPLETED", 0, None)
    try:
        artifacts = completion.judge(job)
    except completion.Incomplete as error:
        return ending.incomplete(job, recorder, error)
    deadline = time.monotonic() + PEERS_SECONDS
    while not alone and (waiting := _not_completed(recorder)):
        if supervisor.signals.received is not None:
            return ending.cancelled(job, recorder, environ, supervisor.signals.received)
        if supervisor.trouble() or supervisor.failures():
            return ending.failed(job, supervisor, Outcome(peer=(supervisor.trouble() or (None, None))[1]), environ)
        if time.monotonic() > deadline:
            nodes = ", ".join(map(str, waiting))
            return ending.end(recorder, "FAILED", 1, f"node {nodes} did not complete within {PEERS_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    if newer := attempts.taken(job, recorder):
        return ending.fenced(recorder, newer)
    marker.write(job.run, job.run_id, job.kind, recorder.attempt, recorder.job_id, artifacts)
    return ending.end(recorder, "COMPLETED", 0, None)


def _not_completed(recorder: Recorder) -> list[int]:
    peers = recorder.peers()
    return [rank for rank in recorder.watched if peers.get(rank, {}).get("state") != "COMPLETED"]


def _clear_leftovers(job: Job, recorder: Recorder) -> None:
    """What an earlier start left and this one would take for its own: a stop request, this node's failures."""
    first = recorder.node_rank * job.nproc_per_node
    failures.forget(job.run, job.kind, recorder.attempt, range(first, first + job.nproc_per_node))
    if recorder.node_rank == 0:
        ranks = job.nodes * job.nproc_per_node
        failures.forget(job.run, job.kind, recorder.attempt, [ranks])  # where a hang is written down
        job.run.stop(job.kind).unlink(missing_ok=True)


def _command(job: Job, meeting: Rendezvous) -> list[str]:
    """The job's command; only tokens that are exactly ``$NODE_RANK`` and its like are filled in."""
    tokens = {f"${name}": value for name, value in meeting.variables().items()}
    return [tokens.get(word, word) for word in job.command]


def _log(environ: Mapping[str, str], job: Job, recorder: Recorder) -> Log:
    given = environ.get("PKUSLURM_LOG")
    path = Path(given) if given else job.run.log(job.kind, recorder.job_id, recorder.node_rank)
    # a requeued job appends to its log
    size = path.stat().st_size if path.is_file() else 0
    return Log(path, size)


def _restarts(environ: Mapping[str, str]) -> int:
    text = environ.get("SLURM_RESTART_COUNT") or "0"
    if not text.isdecimal():
        raise PkuslurmError(f"SLURM_RESTART_COUNT={text}: must be a whole number")
    return int(text)


def _check_owner(run_dir: Path) -> None:
    """Whoever owns the directory decides what its files make this user run."""
    try:
        owner = run_dir.stat().st_uid
    except OSError as error:
        raise PkuslurmError(f"run directory {run_dir}: {error.strerror}") from None
    if owner != os.geteuid():
        raise PkuslurmError(f"run directory {run_dir} belongs to user {owner}, not to you ({os.geteuid()})")


def _words(error: PkuslurmError | OSError) -> str:
    if isinstance(error, PkuslurmError):
        return str(error)
    return f"{error.filename or 'the run directory'}: {error.strerror or error}"
