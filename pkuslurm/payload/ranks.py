"""The ranks of one node as forks of this process: put apart, watched, and ended together, as torchrun does it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

# what a rank ends with that stopped on request, its checkpoint written
STOPPED = 75
# from TERM to KILL
TERM_SECONDS = 3.0
# where TERM is ignored: for the others to say what they saw of a failure
SAY_SECONDS = 1.0
# for the other ranks, once one has stopped: all have met behind the checkpoint
STOP_SECONDS = 30.0
# a signal to the whole job reaches the ranks and this process in any order
OWN_SIGNAL_SECONDS = 0.3
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Node:
    """torchrun's words for what is to be started here."""

    nnodes: int
    node_rank: int
    nproc_per_node: int
    master_addr: str
    master_port: int

    def environment(self, local: int) -> dict[str, str]:
        """What torchrun sets for this rank; but for its own store, which rank 0 has here, and its error file."""
        rank, world = str(self.node_rank * self.nproc_per_node + local), str(self.nnodes * self.nproc_per_node)
        return {
            "RANK": rank,
            "LOCAL_RANK": str(local),
            "GROUP_RANK": str(self.node_rank),
            "ROLE_RANK": rank,
            "ROLE_NAME": "default",
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": str(self.nproc_per_node),
            "GROUP_WORLD_SIZE": str(self.nnodes),
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }


@dataclass(frozen=True)
class Death:
    """``code`` as subprocess has it (negative: a signal)."""

    pid: int
    local: int
    code: int

    @property
    def weight(self) -> int:
        """0 killed, 1 ended by itself, 2 an abort, 3 ended by us or with us: the least one is to be named."""
        if self.code > 0:
            return 1
        return {-signal.SIGABRT: 2, -signal.SIGTERM: 3, -signal.SIGINT: 3}.get(self.code, 0)


def fork(node: Node, environ: Mapping[str, str]) -> None:
    """Returns in each rank; the process that called ends here, when all of them have."""
    parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, *ENDING])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    prctl = ctypes.CDLL(None).prctl
    running: dict[int, int] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    for local in range(node.nproc_per_node):
        pid = os.fork()
        if pid == 0:
            break
        running[pid] = local
    else:
        code = Watch(node, running).run()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the libraries' own ways of ending have nothing to do here

    os.setsid()
    # with this process the ranks go, too, however it dies
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    own = node.environment(local)
    # /proc/PID/environ stays as it was before the fork: by this the worker, and who looks at top, tells the ranks
    prctl(_PR_SET_NAME, f"pku-rank-{own['RANK']}".encode(), 0, 0, 0)
    os.environ.clear()
    os.environ.update({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **environ, **own})
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watch:
    """The ranks until the last one has ended. ``running``: process id → local rank."""

    def __init__(self, node: Node, running: dict[int, int]) -> None:
        self.node = node
        self.running = running
        self.first: Death | None = None
        self.stopped = False
        self.told: int | None = None  # the signal that ends us
        self.deaf = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        # one that is ignored would be handed out all the same while it is blocked
        self.ending = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        self.kill_at: float | None = None

    def run(self) -> int:
        """The exit code; dies of the signal that it was ended by."""
        while self.running:
            left = 60.0 if self.kill_at is None else self.kill_at - time.monotonic()
            if left <= 0:
                self._send(signal.SIGKILL)
                left = 0.5
            self._hear(signal.sigtimedwait([signal.SIGCHLD, *self.ending], left))
            self._judge(sorted(self._dead(), key=lambda death: death.weight))
        if self.told is not None:
            signal.signal(self.told, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self.told])
            os.kill(os.getpid(), self.told)
            return 128 + self.told  # the first process of a container does not die of it
        if self.first is not None:
            return max(self.first.code, 1)
        return STOPPED if self.stopped else 0

    def _hear(self, heard: signal.struct_siginfo | None) -> bool:
        """Whether that was the word to end."""
        if heard is None or heard.si_signo not in self.ending:
            return False
        if self.told is None:
            self.told = heard.si_signo
            self._end(self.told)
        return True

    def _dead(self) -> Iterable[Death]:
        """Those that have ended since the last look; what they had started ends, too.

        None is waited for: its number so stays its own, and the worker, who looks in /proc, sees how it ended.
        """
        for pid in list(self.running):
            seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if seen is None:
                continue
            code = seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status
            if code != 0:
                with suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            yield Death(pid, self.running.pop(pid), code)

    def _judge(self, dead: Iterable[Death]) -> None:
        for death in dead:
            if death.code == STOPPED and not self.stopped:
                self.stopped = True
                self.kill_at = self.kill_at or time.monotonic() + STOP_SECONDS
            if death.code in (0, STOPPED) or self.first is not None or self.told is not None:
                continue
            # perhaps it died of what ends us, too
            if death.weight == 3 and self._hear(signal.sigtimedwait(self.ending, OWN_SIGNAL_SECONDS)):
                continue
            self.first = death
            rank = self.node.node_rank * self.node.nproc_per_node + death.local
            # torchrun's words, which the worker knows
            print(
                f"pkuslurm prefork: rank {rank} failed (exitcode: {death.code}) local_rank: {death.local} "
                f"(pid: {death.pid})",
                file=sys.stderr,
                flush=True,
            )
            self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        self.kill_at = time.monotonic() + (SAY_SECONDS if self.deaf else TERM_SECONDS)
        self._send(number)

    def _send(self, number: int) -> None:
        for pid in self.running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)
