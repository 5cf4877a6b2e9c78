"""A run's jobs one after another, in the foreground: the local executor, whose nodes are process trees on this machine.

Where the nodes are is ``Nodes``' matter; those of meet.py are on several machines. Ctrl-C (SIGINT) and SIGTERM cancel
the run and leave nothing running; a closed terminal (SIGHUP) does not end it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any, Protocol

from pkuslurm.errors import PkuslurmError
from pkuslurm.render.render import worker_command
from pkuslurm.rundir import RunDir, as_its_folder, read_json, write_json, write_last_word
from pkuslurm.submit import gathering, owner
from pkuslurm.submit.meeting import Host
from pkuslurm.submit.setup import setup_lines
from pkuslurm.worker import network, processes

POLL_SECONDS = 0.1
# so often a launcher that others may take for dead looks whether the run is still its own
OURS_SECONDS = 1.0
# A worker ends its tree with TERM, then KILL after 3 s; it gets time for both.
STOP_SECONDS = 15.0


class Watcher(Protocol):
    """Whoever shows what happens; called from the executor's own thread."""

    def started(self, kind: str) -> None: ...

    def tick(self, kind: str) -> None: ...

    def ended(self, kind: str, state: str, reason: str | None) -> None: ...


@dataclass
class Cancel:
    """Set by a signal handler, or by who has asked on another machine, ``by``: how and where. The loop looks at it."""

    number: int | None = None
    by: str | None = None

    @property
    def words(self) -> str:
        return f"the run was cancelled {self.by or f'{self.how} on {socket.gethostname()}'}"

    @property
    def how(self) -> str:
        return "by Ctrl-C" if self.number == signal.SIGINT else "by SIGTERM (`pkuslurm cancel`, or the system)"


class NotBegun(PkuslurmError):
    """The run's directory takes nothing more: no job of it was begun."""


class Worker(Protocol):
    """One node's worker, as a process of ours is seen."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


class Nodes:
    """Where a run's jobs work: here, each node a process tree.

    ``host``: its file tells other machines that the run is at work; none where the run has no others.
    """

    def __init__(self, host: Host | None = None) -> None:
        self.host = host

    def start(self, run: RunDir, kind: str, job: Mapping[str, Any], job_id: str) -> Sequence[Worker]:
        """The workers of the job, in rank order."""
        meets = {}
        if job["nodes"] > 1:  # two runs side by side get two ports
            meets = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(network.free_port(os.getpid()))}
        return [start_worker(run, kind, job_id, rank, meets) for rank in range(job["nodes"])]

    def look(self, cancel: Cancel) -> None:
        """Whether somebody on another machine wishes the run cancelled."""
        if self.host is not None and cancel.number is None and (by := self.host.wishes_cancelled()) is not None:
            cancel.number, cancel.by = signal.SIGINT, by

    def lost(self, workers: Sequence[Worker]) -> str | None:
        """The first worker whose end nobody but us can tell, in words."""
        return None


def run_jobs(
    run: RunDir,
    kinds: Sequence[str],
    watcher: Watcher,
    begin: Callable[[], None] = lambda: None,
    nodes: Nodes | None = None,
) -> int:
    """Run ``kinds`` in order; 0, 1 (a job failed) or 130 (cancelled). Every job has a final state afterwards.

    ``begin`` is called once the run is ours alone; ``nodes``: here, unless something else is said. Raises PkuslurmError
    where somebody else runs it (owner.Replaced: has taken it over), or where its directory cannot be written.
    """
    try:
        with signals() as cancel, _seen(run, nodes, cancel) as nodes:
            return _run_jobs(run, kinds, watcher, begin, nodes, cancel)
    except OSError as error:
        raise NotBegun(_words(error, run)) from None  # of a job, or after one, it is that job's failure


@contextmanager
def _seen(run: RunDir, nodes: Nodes | None, cancel: Cancel) -> Iterator[Nodes]:
    """``nodes``, else this machine; where the run has no scheduler, so that other machines see that it is at work."""
    if nodes is not None or (read_json(run.run_json) or {}).get("executor") != "meet":
        yield nodes or Nodes()
        return
    host = gathering.alone(run.meeting, lambda: cancel.number is not None)
    try:
        yield Nodes(host)
    finally:
        host.close()


def _words(error: OSError, run: RunDir) -> str:
    return f"{error.filename or run.path}: {error.strerror or error}"


def _run_jobs(
    run: RunDir, kinds: Sequence[str], watcher: Watcher, begin: Callable[[], None], nodes: Nodes, cancel: Cancel
) -> int:
    document = owner.take(run, nodes.host.launcher if nodes.host is not None else {})
    launcher = document["launcher"]
    if nodes.host is not None:
        nodes.host.post.say(run=str(run.path))
    begin()
    _say_attempts(run, document, kinds)
    processes.become_subreaper()  # a killed worker's children become ours, and are ended with it
    failed: str | None = None
    try:
        for kind in kinds:
            nodes.look(cancel)
            verdict: tuple[str, str | None] | None = None
            if cancel.number is not None:
                verdict = "CANCELLED", f"{cancel.words} before this job started"
            elif failed is not None:
                verdict = "SKIPPED", f"{failed} did not complete"
            try:
                if verdict is not None:
                    final(run, document, kind, *verdict)
                else:
                    _run_job(run, document, kind, cancel, watcher, nodes)
                state = state_of(run, kind)
                verdict = state.get("state", "UNKNOWN"), state.get("reason")
            except OSError as error:
                end_leftovers()
                verdict = verdict or ("FAILED", _words(error, run))  # on a full disk it can be told, if not written
            watcher.ended(kind, *verdict)
            if verdict[0] != "COMPLETED":
                failed = failed or kind
    finally:
        document["launcher"] = None
        with_versions(run, document)
        try:
            if owner.is_ours(run, launcher):
                write_json(run.run_json, document)
        except OSError as error:
            print(f"pkuslurm: {_words(error, run)}", file=sys.stderr)  # the jobs have ended as they have
    if cancel.number is not None:
        return 130
    return 0 if failed is None else 1


def _say_attempts(run: RunDir, document: dict[str, Any], kinds: Sequence[str]) -> None:
    """In run.json, before the first job: what an earlier attempt has left of the later ones is not their state now."""
    for kind in kinds:
        first = (read_json(run.job(kind)) or {}).get("first_attempt")
        if first is not None and kind in document["jobs"]:
            document["jobs"][kind]["first_attempt"] = first
    owner.check_ours(run, document["launcher"])
    write_json(run.run_json, document)


def with_versions(run: RunDir, document: dict[str, Any]) -> None:
    """Put into run.json's ``document`` what was installed where each job ran, as its nodes told."""
    for kind, entry in document["jobs"].items():
        if seen := (read_json(run.state(kind)) or {}).get("versions"):
            entry["versions"] = seen


def state_of(run: RunDir, kind: str) -> dict[str, Any]:
    """The job's state of this attempt; empty where only an earlier attempt has left one."""
    state = read_json(run.state(kind)) or {}
    first = (read_json(run.job(kind)) or {}).get("first_attempt", 1)
    attempt = state.get("attempt")
    return state if isinstance(attempt, int) and attempt >= first else {}


@contextmanager
def signals() -> Iterator[Cancel]:
    """SIGINT and SIGTERM are remembered, not obeyed; a closed terminal is not noticed."""
    cancel = Cancel()

    def remember(number: int, frame: FrameType | None) -> None:
        cancel.number = cancel.number or number

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield cancel
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_job(run: RunDir, document: dict[str, Any], kind: str, cancel: Cancel, watcher: Watcher, nodes: Nodes) -> None:
    job = read_json(run.job(kind))
    if job is None:
        final(run, document, kind, "FAILED", f"{run.job(kind)} is missing or damaged")
        return
    job_id = f"local-{job['first_attempt']}"
    # serve is no part of what was launched
    entry = {"key": job.get("key"), "parents": job.get("parents") or [], "num_nodes": job["nodes"]}
    document["jobs"].setdefault(kind, entry).update(job_id=job_id, first_attempt=job["first_attempt"])
    owner.check_ours(run, document["launcher"])
    write_json(run.run_json, document)
    workers = nodes.start(run, kind, job, job_id)
    watcher.started(kind)

    looked = time.monotonic()

    def tick() -> None:
        nonlocal looked
        if nodes.host is not None and time.monotonic() - looked > OURS_SECONDS:
            looked = time.monotonic()
            owner.check_ours(run, document["launcher"])
        nodes.look(cancel)
        watcher.tick(kind)

    try:
        _follow(workers, cancel, tick)
        nodes.look(cancel)  # a node whose user cancels says so before its worker ends, and that may end ours at once
    except owner.Replaced:
        cancel.number = cancel.number or signal.SIGTERM
        _follow(workers, cancel, lambda: None)
        raise
    finally:
        end_leftovers()
    state = state_of(run, kind)
    if state.get("state") == "COMPLETED":
        return
    if cancel.number is not None:
        final(run, document, kind, "CANCELLED", cancel.words, keep=state)
    elif (lost := nodes.lost(workers)) is not None:
        final(run, document, kind, "FAILED", lost, keep=state)
    elif state.get("state") not in ("FAILED", "CANCELLED", "SKIPPED"):
        # the worker itself was killed: its state file still says RUNNING
        codes = [worker.returncode for worker in workers]
        final(run, document, kind, "FAILED", f"its worker ended without a verdict (exit codes {codes})", keep=state)


def start_worker(run: RunDir, kind: str, job_id: str, rank: int, meets: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Node ``rank``'s worker of job ``kind``, on this machine; ``meets``: MASTER_ADDR and MASTER_PORT of several."""
    environ = dict(os.environ)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "SLURM_PROCID", "SLURM_RESTART_COUNT"):
        environ.pop(name, None)  # of an enclosing job: not this one's
    environ |= {"NODE_RANK": str(rank), "PKUSLURM_JOB_ID": job_id, "PKUSLURM_LAUNCHER_PID": str(os.getpid()), **meets}
    command = worker_command(sys.executable, run, kind)
    if lines := setup_lines((read_json(run.job(kind)) or {}).get("setup") or ()):
        command = ["bash", "-c", "\n".join([*lines, 'exec "$@"']), "bash", *command]
    log = run.log(kind, job_id, rank)
    with open(log, "ab", opener=as_its_folder) as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=environ,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the workers in order
            umask=0o777 & ~(run.path.stat().st_mode | 0o700),  # as for whom the run is, whatever this shell's is
        )


def _follow(workers: Sequence[Worker], cancel: Cancel, tick: Callable[[], None]) -> None:
    """Until every worker ended. One that fails, or a cancellation, ends the others."""
    stopping: float | None = None
    while any(worker.poll() is None for worker in workers):
        if stopping is None and (cancel.number is not None or any(worker.poll() for worker in workers)):
            stopping = time.monotonic()
            # after a failure the other nodes see it by themselves and say so in their logs; give them the time
            if cancel.number is not None:
                _signal(workers, signal.SIGTERM)
        if stopping is not None:
            waited = time.monotonic() - stopping
            if waited > STOP_SECONDS:
                _signal(workers, signal.SIGKILL)
            elif waited > STOP_SECONDS / 2:
                _signal(workers, signal.SIGTERM)
        tick()
        time.sleep(POLL_SECONDS)


def _signal(workers: Sequence[Worker], number: signal.Signals) -> None:
    for worker in workers:
        if worker.poll() is None:
            with suppress(ProcessLookupError):
                worker.send_signal(number)


def end_leftovers() -> None:
    """What a killed worker left behind is below us (we are a subreaper): end it, and reap it."""
    deadline = time.monotonic() + STOP_SECONDS
    while (left := processes.descendants(os.getpid())) and time.monotonic() < deadline:
        for process in left:
            if not process.zombie:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def final(
    run: RunDir,
    document: Mapping[str, Any],
    kind: str,
    state: str,
    reason: str | None,
    keep: Mapping[str, Any] | None = None,
) -> None:
    """A verdict on a job whose worker could not give one."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    known = document["jobs"][kind]
    base: dict[str, Any] = {
        # a retry has renumbered its jobs' files; run.json learns it when they start
        "attempt": (read_json(run.job(kind)) or {}).get("first_attempt") or known["first_attempt"],
        "job_id": known["job_id"],
        "nodes": [],
        "node_rank": 0,
        "host": socket.gethostname(),
        "started": None,
        "exit_code": None,
    }
    write_last_word(run.state(kind), base | dict(keep or {}) | {"state": state, "reason": reason, "finished": now})
