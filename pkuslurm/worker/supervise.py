"""From the command's start to the end of its last process: signals, dying ranks, the other nodes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pkuslurm.worker import failures
from pkuslurm.worker.failures import Failure
from pkuslurm.worker.job import Job
from pkuslurm.worker.processes import Death, RankWatch, Tree
from pkuslurm.worker.state import Recorder, gone, seconds_of

POLL_SECONDS = 0.2
# after a failure: for the other ranks and nodes to say what they saw, before they are ended
GRACE_SECONDS = 1.0
# for how long a failure from before this worker's start is taken for a leftover: its author, started anew
# beside this worker, removes it
STALE_SECONDS = 10.0
# for our own signal to come after the command has died of it
OWN_SIGNAL_SECONDS = 0.5
_SIGNALLED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
# what the trainer ends with when it stopped on request, its checkpoint written
STOPPED_CODE = 75


class Signals:
    """TERM and INT are remembered; early warnings and the closed terminal are ignored, also by the children.

    Slurm sends a step's signal to every process of the step, and torchrun would die of USR1 or USR2.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = number

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            before[number] = signal.signal(number, signal.SIG_IGN)
        try:
            yield self
        finally:
            for number, action in before.items():
                signal.signal(number, action)


@dataclass(frozen=True)
class Log:
    """The part of this node's log that belongs to this start."""

    path: Path
    start: int

    def text(self) -> str:
        return failures.read_log(self.path, self.start)


@dataclass(frozen=True)
class Outcome:
    """How the tree ended. ``code`` is the command's own, None where we ended it."""

    code: int | None = None
    cancelled: int | None = None
    cancelled_by: str | None = None
    peer: str | None = None
    stopped: bool = False
    survivors: tuple[int, ...] = ()


@dataclass
class Supervisor:
    """Watches one tree. All effects outside of it: failure files of ranks that could not write their own."""

    job: Job
    recorder: Recorder
    signals: Signals
    log: Log
    _began: float = field(default_factory=time.time)
    _stopped: bool = False

    @property
    def _rank_offset(self) -> int:
        return self.recorder.node_rank * self.job.nproc_per_node

    def run(self, tree: Tree) -> Outcome:
        """Until nothing of the tree is left. A failure anywhere ends it within GRACE + TERM seconds."""
        watch = RankWatch()
        deadline: float | None = None
        code: int | None = None
        peer: tuple[str, str] | None = None
        known_hosts = self.recorder.nodes == 1 or self.recorder.node_rank > 0 or bool(self.recorder.hosts)
        try:
            while (code := tree.poll()) is None and self.signals.received is None:
                for death in watch.wait(POLL_SECONDS):
                    self._note(death)
                peer = peer or self.trouble()
                if deadline is None and (peer or self.failures()):
                    deadline = time.monotonic() + GRACE_SECONDS
                if deadline is not None and time.monotonic() >= deadline:
                    break
                if not known_hosts and len(self.recorder.peers()) == self.recorder.nodes - 1:
                    # now all hosts are known, for the list in node 0's state
                    self.recorder.write("RUNNING")
                    known_hosts = True
            cancelled = self.signals.received if code is None or self._ended_with_us(code) else None
            if code is None:
                self._note_last(watch)
            elif cancelled is None and code not in (0, STOPPED_CODE) and not self.failures():
                # the other nodes watch these files
                self._record(None, code)
        finally:
            survivors = tree.end()
            watch.close()
        if cancelled is None and code != 0:
            self._note_named()
        return Outcome(
            code=code,
            cancelled=cancelled,
            cancelled_by=peer[1] if peer and peer[0] == "CANCELLED" else None,
            peer=peer[1] if peer else None,
            stopped=self._stopped or code == STOPPED_CODE,
            survivors=tuple(survivors),
        )

    def _ended_with_us(self, code: int) -> bool:
        """Whether the command died of the signal that ends us: Slurm sends it to every process, in any order."""
        if code in (0, STOPPED_CODE):
            return False
        deadline = time.monotonic() + (OWN_SIGNAL_SECONDS if code in _SIGNALLED else 0.0)
        while self.signals.received is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signals.received is not None and all(failure.weight > 0 for failure in self.failures())

    def trouble(self) -> tuple[str, str] | None:
        """The state of a watched node that ended badly, and that in words."""
        for rank, value in self.recorder.peers().items():
            state = str(value.get("state"))
            where = f"node {rank} on {value.get('host')}"
            if state == "RUNNING":
                # it may have ended well between the two looks, so only a second look counts
                if gone(value, self.recorder.host):
                    again = self.recorder.peers().get(rank)
                    if again and gone(again, self.recorder.host) and self._fresh(again.get("started")):
                        return "FAILED", f"{where}: its worker, process {value.get('pid')}, is gone"
            elif state != "COMPLETED" and self._fresh(value.get("finished")):
                words = "was cancelled" if state == "CANCELLED" else f"is {state}: {value.get('reason')}"
                return state, f"{where} {words}"
        return None

    def failures(self) -> list[Failure]:
        """What is known on any node about this start."""
        known = failures.read(self.job.run, self.job.kind, self.recorder.attempt)
        return [failure for failure in known if self._fresh_time(failure.time)]

    def _fresh(self, moment: object) -> bool:
        seconds = seconds_of(moment)
        # states tell whole seconds
        return seconds is None or self._fresh_time(seconds + 1)

    def _fresh_time(self, moment: float) -> bool:
        return moment >= self._began or time.time() - self._began > STALE_SECONDS

    def _note_last(self, watch: RankWatch) -> None:
        for death in watch.wait(0):
            self._note(death)

    def _note_named(self) -> None:
        """Where only the ranks were seen that torchrun ended: the one that it names as the first, from its log."""
        known = self.failures()
        text = self.log.text()
        if known and all(failure.weight > 0 for failure in known):
            named = failures.named_by_torchrun(text, self._rank_offset)
            if named is not None and named[1] != STOPPED_CODE:
                failure = failures.of_rank(*named, text, time.time(), self.recorder.host)
                failures.record(self.job.run, self.job.kind, self.recorder.attempt, failure, place=self._rank_offset)

    def _note(self, death: Death) -> None:
        if death.code == STOPPED_CODE:
            self._stopped = True
        elif death.code != 0 and self.signals.received is None:
            self._record(death.rank, death.code)

    def _record(self, rank: int | None, code: int) -> None:
        text, moment, host = self.log.text(), time.time(), self.recorder.host
        if rank is None and (named := failures.named_by_torchrun(text, self._rank_offset)):
            # a rank that died before the watch had found it; the command's own code is only torchrun's 1
            rank, code = named
        if code == STOPPED_CODE:
            self._stopped = True
            return
        failure = failures.of_rank(rank, code, text, moment, host)
        failures.record(self.job.run, self.job.kind, self.recorder.attempt, failure, place=self._rank_offset)
