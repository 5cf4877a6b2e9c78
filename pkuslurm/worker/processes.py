"""The command's process tree: started, watched, and ended with nothing left behind.

torchrun puts each rank into a session of its own, so neither process groups nor sessions hold the tree
together. The worker therefore is a subreaper: whoever loses its parent becomes the worker's child, and every
descendant is found by walking /proc.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker.guard import VARIABLE, Guard

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
# what a forked rank calls itself (payload/ranks.py): its environment is not to be seen from outside
_FORKED_RANK = re.compile(r"pku-rank-(\d+)")

TERM_SECONDS = 3.0
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Process:
    """A line of /proc/<pid>/stat; ``start`` in clock ticks since boot tells a reused pid from the old one."""

    pid: int
    parent: int
    start: int
    zombie: bool
    wait_status: int
    state: str = ""
    name: str = ""


def look(pid: int) -> Process | None:
    """The process ``pid``, also a zombie; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the name in parentheses may hold spaces and parentheses
    head, _, tail = text.rpartition(")")
    fields, name = tail.split(), head.partition("(")[2]
    return Process(pid, int(fields[1]), int(fields[19]), fields[0] in "ZX", int(fields[49]), fields[0], name)


def alive(pid: int, start: int) -> bool:
    """Whether the very process that had ``pid`` and ``start`` still runs on this host."""
    process = look(pid)
    return process is not None and process.start == start and not process.zombie


def descendants(root: int) -> list[Process]:
    """Everything below ``root``, parents before children, zombies included."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (process := look(int(name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        for process in children.get(todo.pop(), []):
            found.append(process)
            todo.append(process.pid)
    return found


def become_subreaper() -> None:
    """From now on orphaned descendants become children of this process, not of init. Raises PkuslurmError."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise PkuslurmError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


def end_with(parent: int) -> None:
    """A SIGTERM for this process when ``parent``, which started it, is gone; at once if it is gone already.

    For the local executor, whose workers nobody else would end if it was killed -9.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class Tree:
    """The command and everything that comes from it. One a process: it waits for all its children."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        deaf_to: Sequence[signal.Signals] = (),
        blocked: Sequence[signal.Signals] = (),
    ) -> None:
        """Start ``command`` on this process's stdout and stderr. Raises PkuslurmError if it cannot start.

        ``deaf_to``: signals that it and all below it ignore (what is ignored stays so through exec). ``blocked``: those
        that do not reach a program, either, that asks for them.
        """
        become_subreaper()
        worker = os.getpid()
        token = uuid.uuid4().hex
        self._guard = Guard(token)

        def die_with_the_worker() -> None:
            for number in deaf_to:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            # a worker that is killed -9 takes its direct child along at once; the guard sees to the rest
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != worker:
                os._exit(1)

        try:
            self._popen = subprocess.Popen(
                list(command),
                cwd=cwd,
                env={**env, VARIABLE: token},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_the_worker,  # the worker has one thread
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            self._guard.dismiss()
            why = error.strerror if isinstance(error, OSError) else error
            raise PkuslurmError(f"cannot start {command[0]!r}: {why}") from None
        self._code: int | None = None

    def poll(self) -> int | None:
        """Reap whatever ended; the command's return code (negative: a signal) once it ended, else None."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._popen.pid:
                self._code = os.waitstatus_to_exitcode(status)
                # waited for behind Popen's back, so it has to be told
                self._popen.returncode = self._code
            elif self._guard.popen is not None and pid == self._guard.pid:
                self._guard.popen.returncode = os.waitstatus_to_exitcode(status)
        return self._code

    def end(self, term_seconds: float = TERM_SECONDS) -> list[int]:
        """TERM to every descendant, KILL to what is left after ``term_seconds``.

        Returns the pids that survived both.
        """
        left = self._sweep(signal.SIGTERM, term_seconds)
        if left:
            left = self._sweep(signal.SIGKILL, KILL_SECONDS)
        self._guard.dismiss()
        return left

    def _sweep(self, number: signal.Signals, seconds: float) -> list[int]:
        left = sweep(number, seconds, self.poll, self._guard.pid)
        self.poll()
        return left


def sweep(number: signal.Signals, seconds: float, poll: Callable[[], object], spared: int | None) -> list[int]:
    """Send ``number`` to everything below this process but ``spared``; what it did not end within ``seconds``.

    ``poll`` reaps the children that the caller knows.
    """
    deadline = time.monotonic() + seconds
    told: set[tuple[int, int]] = set()
    while True:
        poll()
        left = [one for one in descendants(os.getpid()) if not one.zombie and one.pid != spared]
        for process in left:
            # one TERM each (a second one makes some programs give up cleaning), KILL as often as it takes
            if number == signal.SIGKILL or (process.pid, process.start) not in told:
                told.add((process.pid, process.start))
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, number)
        if not left or time.monotonic() > deadline:
            return [process.pid for process in left]
        time.sleep(0.05)


@dataclass(frozen=True)
class Death:
    """A rank that ended; ``code`` as subprocess has it (negative: a signal)."""

    rank: int
    pid: int
    code: int


class RankWatch:
    """Sees how each rank ends, although they are the launcher's children.

    torchrun says nothing before it has ended the other ranks, which takes up to 30 s. A pidfd wakes the
    worker at once, while the dead rank is still a zombie whose exit code /proc shows; without pidfds
    (Linux < 5.3) frequent looks see most of them.
    """

    def __init__(self) -> None:
        self._ranks: dict[tuple[int, int], int] = {}
        self._ended: set[tuple[int, int]] = set()
        self._descriptors: dict[int, tuple[int, int]] = {}
        self._poller = select.poll()
        self._has_pidfd = hasattr(os, "pidfd_open")
        self._next_scan = 0.0

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def wait(self, seconds: float) -> list[Death]:
        """Wait for a rank's end, at most ``seconds``; the ranks that ended, where it could be seen how."""
        if time.monotonic() >= self._next_scan:
            began = time.monotonic()
            self._scan()
            # a node with thousands of processes must not spend its time on being listed
            self._next_scan = time.monotonic() + max(0.3, 20 * (time.monotonic() - began))
        if self._ranks and not self._has_pidfd:
            seconds = min(seconds, 0.03)
        for descriptor, _ in self._poller.poll(int(seconds * 1000)):
            self._poller.unregister(descriptor)
            del self._descriptors[descriptor]
            os.close(descriptor)
        deaths = []
        for (pid, start), rank in self._ranks.items():
            process = look(pid)
            if process is not None and process.start == start and not process.zombie:
                continue
            self._ended.add((pid, start))
            if process is not None and process.start == start:
                deaths.append(Death(rank, pid, os.waitstatus_to_exitcode(process.wait_status)))
        for key in self._ended:
            self._ranks.pop(key, None)
        return deaths

    def stuck(self) -> list[tuple[int, str]]:
        """The ranks that cannot run now, and why: somebody stopped them, or they wait in the kernel."""
        words = {"T": "its process is stopped (SIGSTOP)", "t": "a debugger holds its process"}
        words["D"] = "its process waits in the kernel, for a disk or a device"
        states = [(rank, look(pid)) for (pid, _), rank in self._ranks.items()]
        return [(rank, words[one.state]) for rank, one in states if one is not None and one.state in words]

    def _scan(self) -> None:
        """Find the ranks: the topmost processes that have a LOCAL_RANK, or call themselves one (their own children
        inherit either)."""
        below: set[int] = set()
        for process in descendants(os.getpid()):
            key = (process.pid, process.start)
            if process.parent in below or key in self._ranks or key in self._ended:
                below.add(process.pid)
            elif (rank := _rank_of(process)) is not None:
                below.add(process.pid)
                self._ranks[key] = rank
                self._watch(process.pid, key)

    def _watch(self, pid: int, key: tuple[int, int]) -> None:
        if not self._has_pidfd:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:
            self._has_pidfd = False
            return
        self._descriptors[descriptor] = key
        self._poller.register(descriptor, select.POLLIN)


def _rank_of(process: Process) -> int | None:
    """By its name, or RANK of a process that has LOCAL_RANK too; None for all others, and while it is not readable."""
    if named := _FORKED_RANK.fullmatch(process.name):
        return int(named[1])
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return None
    words = dict(word.split(b"=", 1) for word in block.split(b"\0") if b"=" in word)
    rank = words.get(b"RANK", b"")
    return int(rank) if b"LOCAL_RANK" in words and rank.isdigit() else None
