"""Whose a run is: its user, and the one process that runs its jobs, which is found, asked to stop, or succeeded here.

run.json's ``launcher`` names that process; where other machines may see the run, by a file that it writes every second
(meeting.py). Exactly one takes a run whose launcher is dead: on one machine by a lock, on several by that file.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit.meeting import PATIENCE, POLL_SECONDS
from pkuslurm.submit.meeting_files import ask_to_cancel
from pkuslurm.worker import beats, processes


class Replaced(PkuslurmError):
    """Another process has taken the run over: nothing more is written here."""

    exit_code = 1


def check_owner(run: RunDir) -> None:
    """Raise PkuslurmError unless the run is this user's: what another's files say is never executed or signalled."""
    if run.path.stat().st_uid != os.getuid():
        raise PkuslurmError(f"{run.run_id}: it belongs to another user, who alone can run or cancel its jobs")


def launcher_of(run: RunDir, document: Mapping[str, Any], seconds: float | None = None) -> tuple[int, int] | None:
    """Pid and start of the process that runs it here; None: nobody. Raises PkuslurmError if on another host.

    ``seconds``: for how long another machine's silence is listened to; one that lives is heard within a few.
    """
    known = document.get("launcher")
    if not isinstance(known, dict):
        return None
    if (there := _elsewhere(known)) is not None:
        if beats.alive(*there, PATIENCE["running"] if seconds is None else seconds) is not True:
            return None
        raise PkuslurmError(f"{run.run_id}: it is at work on {known.get('host')}; wait, or cancel it first")
    if known.get("host") != socket.gethostname():
        raise PkuslurmError(f"{run.run_id}: it is run on {known.get('host')}; go there to see to it")
    pid, start = known.get("pid"), known.get("pid_start")
    alive = isinstance(pid, int) and isinstance(start, int) and processes.alive(pid, start)
    return (pid, start) if alive and pid and start else None


def check_idle(run: RunDir, document: Mapping[str, Any], seconds: float | None = None) -> None:
    """Raise PkuslurmError while somebody runs it; ``seconds`` as for ``launcher_of``."""
    if (running := launcher_of(run, document, seconds)) is not None:
        raise PkuslurmError(f"{run.run_id}: it is still running (pid {running[0]}); wait, or cancel it first")


def claim(run: RunDir, document: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be said of this process where it is told who runs ``run``; refused while somebody else does."""
    check_idle(run, document)
    own = processes.look(os.getpid())
    if own is None:
        raise PkuslurmError("/proc cannot be read: without it nothing that a run starts could be found again")
    return {"host": socket.gethostname(), "pid": own.pid, "pid_start": own.start}


def take(run: RunDir, more: dict[str, Any]) -> dict[str, Any]:
    """run.json, which names this process from now on; ``more``: Host.launcher. Raises PkuslurmError as ``claim``."""
    while True:
        before = described(run)
        mine = claim(run, before) | more  # half a minute may go by: what was read is old
        with _locked(run):
            document = described(run)
            if document.get("launcher") == before.get("launcher"):
                document["launcher"] = mine
                write_json(run.run_json, document)
                return document


def is_ours(run: RunDir, launcher: Mapping[str, Any]) -> bool:
    """Whether run.json still names this process; a file that cannot be read says nothing else."""
    there = read_json(run.run_json)
    return there is None or there.get("launcher") == launcher


def check_ours(run: RunDir, launcher: Mapping[str, Any]) -> None:
    """Raises Replaced."""
    if not is_ours(run, launcher):
        known = (read_json(run.run_json) or {}).get("launcher")
        who = f"on {known['host']} " if isinstance(known, dict) and known.get("host") else ""
        raise Replaced(f"{run.run_id}: another command {who}took this launcher for dead and the run over; it ends here")


def cancel(run: RunDir, seconds: float = 60.0) -> bool:
    """Ask the process that runs ``run`` to cancel it, and wait until it is gone. False: nobody runs it here."""
    return cancel_launcher(run, run.run_json, seconds)


def cancel_launcher(run: RunDir, file: Path, seconds: float) -> bool:
    """The same of whoever ``file`` names; of a sweep that is its sweep.json."""
    check_owner(run)  # another user's files could name any process of ours
    if (there := _elsewhere((read_json(file) or {}).get("launcher"))) is not None:
        return _cancel_elsewhere(run, *there, seconds)
    running = launcher_of(run, read_json(file) or {})
    if running is None:
        return False
    pid, start = running
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while processes.alive(pid, start):
        if time.monotonic() > deadline:
            raise PkuslurmError(f"{run.run_id}: pid {pid} was told to stop {seconds:.0f} s ago and still runs")
        time.sleep(POLL_SECONDS)
    return True


def _cancel_elsewhere(run: RunDir, file: Path, nonce: str, seconds: float) -> bool:
    if beats.alive(file, nonce, PATIENCE["running"]) is not True:
        return False
    try:
        ask_to_cancel(file, nonce)
    except OSError as error:
        raise PkuslurmError(f"{error.filename or file.parent}: {error.strerror or error}") from None
    deadline = time.monotonic() + seconds
    while ((read_json(run.run_json) or {}).get("launcher") or {}).get("nonce") == nonce:
        if time.monotonic() > deadline:
            raise PkuslurmError(f"{run.run_id}: its launcher was asked to stop {seconds:.0f} s ago and still runs")
        time.sleep(POLL_SECONDS)
    return True


def _elsewhere(launcher: object) -> tuple[Path, str] | None:
    """The file, and the nonce, of whoever runs it on another machine, where one can be asked through a file."""
    if not isinstance(launcher, dict) or launcher.get("host") == socket.gethostname() or not launcher.get("meeting"):
        return None
    return Path(str(launcher["meeting"])), str(launcher.get("nonce"))


def described(run: RunDir) -> dict[str, Any]:
    """run.json. Raises PkuslurmError as ``whole`` does."""
    return whole(run, read_json(run.run_json))


def whole(run: RunDir, document: dict[str, Any] | None) -> dict[str, Any]:
    """``document``, as read. Raises PkuslurmError where there is none, or none of a run's."""
    if document is None or not isinstance(document.get("jobs"), dict):
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    return document


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """For as long as it takes to write run.json, the only one on this machine."""
    handle = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a shared disk without locks: there the meeting lets one through
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
