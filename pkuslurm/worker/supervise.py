"""From the command's start to the end of its last process: signals, dying and hanging ranks, the other nodes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import attempts, failures, versions
from pkuslurm.worker.failures import Failure
from pkuslurm.worker.job import Job
from pkuslurm.worker.processes import TERM_SECONDS, Death, RankWatch, Tree
from pkuslurm.worker.state import Recorder, gone

POLL_SECONDS = 0.2
# after a failure: for the other ranks and nodes to say what they saw, before they are ended
GRACE_SECONDS = 1.0
# for how long what was there before this worker's start is taken for a leftover: its author, started anew beside this
# worker, removes it
STALE_SECONDS = 10.0
# for our own signal to come after the command has died of it
OWN_SIGNAL_SECONDS = 0.5
_SIGNALLED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
# what the trainer ends with when it stopped on request, its checkpoint written
STOPPED_CODE = 75


# a step of training and its checkpoint, after a TERM; Slurm's KILL comes 30 s after it (KillWait)
SAVE_SECONDS = 25.0
# how often it is looked whether a newer attempt has taken over, and whether steps are still being done
LOOK_SECONDS = 5.0
# a step may take so many times the longest one before without being taken for a hang
SLOWER = 10
# what the worker alone handles, and everything below it ignores: Slurm sends a step's signal to every process of the
# step, and torchrun would die of it
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """TERM, INT and the early warning are remembered; the closed terminal is ignored, also by the children."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.warned = False

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = number

    def _warn(self, _number: int, _frame: FrameType | None) -> None:
        self.warned = True

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in WARNINGS:
            before[number] = signal.signal(number, self._warn)
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
    """How the tree ended. ``code`` is the command's own, None where we ended it.

    ``fenced``: the attempt that has taken over from this one. ``saved``: it stopped at Slurm's word, with a checkpoint.
    """

    code: int | None = None
    cancelled: int | None = None
    cancelled_by: str | None = None
    peer: str | None = None
    stopped: bool = False
    saved: bool = False
    fenced: int | None = None
    survivors: tuple[int, ...] = ()


class Hang:
    """Whether the trainer still does steps, by its progress file; not while it evaluates, saves, or is at its end."""

    def __init__(self, progress: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress = progress
        self.seconds = seconds
        self.clock = clock
        self._seen: tuple[object, object] | None = None
        self._since = self._looked = clock()
        self._slowest = 0.0

    def look(self) -> str | None:
        """None, or for how long nothing has moved."""
        value = rundir.read_json(self.progress) or {}
        seen = (value.get("step"), value.get("phase"))
        now = self.clock()
        if now - self._looked > 6 * LOOK_SECONDS:
            self._since += now - self._looked  # we were stopped, too: the job was suspended
        self._looked = now
        if seen != self._seen:
            if self._seen is not None and self._seen[1] is None and seen[1] is None:
                before, after = self._seen[0], seen[0]
                # between two looks there may be many
                steps = after - before if isinstance(before, int) and isinstance(after, int) else 1
                self._slowest = max(self._slowest, (now - self._since) / max(steps, 1))
            self._seen, self._since = seen, now
        idle = now - self._since
        if seen[1] is not None or idle < max(self.seconds, SLOWER * self._slowest):
            return None
        return f"no step for {idle / 60:.1f} minutes; the last one was {seen[0]}"


@dataclass
class Supervisor:
    """Watches one tree. All effects outside of it: failure files of ranks that could not write their own."""

    job: Job
    recorder: Recorder
    signals: Signals
    log: Log
    saves: bool = False  # Slurm's warning, and its TERM, make the training write a checkpoint first
    asked: bool = False  # by us, to stop
    _began: float = field(default_factory=time.monotonic)
    _failures_before: list[Failure] = field(init=False)
    _peers_before: dict[int, dict[str, Any]] = field(init=False)
    _stopped: bool = False
    _hang: Hang | None = None
    _next_look: float = 0.0
    _save_until: float = 0.0
    _termed: bool = False
    _unwritten: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._failures_before = failures.read(self.job.run, self.job.kind, self.recorder.attempt)
        self._peers_before = self.recorder.peers()

    @property
    def _rank_offset(self) -> int:
        return self.recorder.node_rank * self.job.nproc_per_node

    def run(self, tree: Tree) -> Outcome:
        """Until nothing of the tree is left. A failure anywhere ends it within GRACE + TERM seconds."""
        watch = RankWatch()
        deadline: float | None = None
        code: int | None = None
        peer: tuple[str, str] | None = None
        fenced: int | None = None
        if self.recorder.node_rank == 0 and self.job.hang_minutes is not None:
            self._hang = Hang(self.job.run.progress(self.job.kind), self.job.hang_minutes * 60)
        known_hosts = self.recorder.nodes == 1 or self.recorder.node_rank > 0 or bool(self.recorder.hosts)
        try:
            while (code := tree.poll()) is None and not self._over():
                for death in watch.wait(POLL_SECONDS):
                    self._note(death)
                if self._due() and (fenced := attempts.taken(self.job, self.recorder)) is not None:
                    break
                peer = peer or self.trouble()
                if deadline is None and (peer or self.failures()):
                    deadline = time.monotonic() + GRACE_SECONDS
                    self._note_stuck(watch)
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
            # ranks that ignore TERM would only use up the time until KILL
            survivors = tree.end(0.0 if self.saves or fenced is not None else TERM_SECONDS)
            watch.close()
        if cancelled is None and code != 0 and fenced is None:
            self._note_named()
        stopped = self._stopped or code == STOPPED_CODE
        return Outcome(
            code=code,
            cancelled=cancelled,
            cancelled_by=peer[1] if peer and peer[0] == "CANCELLED" else None,
            peer=peer[1] if peer else None,
            stopped=stopped,
            saved=self.saves and stopped and all(failure.weight > 0 for failure in self.failures()),
            fenced=fenced,
            survivors=tuple(survivors),
        )

    def _over(self) -> bool:
        """Whether a signal ends the tree now. A warning does not, nor a TERM while there is something to be saved."""
        number = self.signals.received
        told = self.signals.warned or (number == signal.SIGTERM and self._training())
        if self.saves and told and not self.asked:
            self.asked = True
            self.job.run.stop(self.job.kind).touch()
        if number == signal.SIGTERM and self.asked and not self.failures():
            if not self._termed:
                self._termed, self._save_until = True, time.monotonic() + SAVE_SECONDS
            return time.monotonic() > self._save_until
        return number is not None

    def _training(self) -> bool:
        """Whether the first step has begun: before that there is nothing to be saved."""
        value = rundir.read_json(self.job.run.progress(self.job.kind)) or {}
        return value.get("attempt") == self.recorder.attempt

    def _due(self) -> bool:
        """Every LOOK_SECONDS; then a hang is noted, too."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_SECONDS
        if self._hang is not None and self._training() and (words := self._hang.look()) and not self.asked:
            failure = Failure(None, time.time(), failures.HANG, words, host=self.recorder.host)
            place = self.job.nodes * self.job.nproc_per_node  # no rank's own
            self._say(failure, place)
        return True

    def _note_stuck(self, watch: RankWatch) -> None:
        """After a hang: which of this node's ranks cannot run."""
        if any(failure.type == failures.HANG for failure in self.failures()):
            for rank, words in watch.stuck():
                failure = Failure(rank, time.time(), failures.STUCK, words, host=self.recorder.host)
                self._say(failure, rank)

    def _ended_with_us(self, code: int) -> bool:
        """Whether the command died of the signal that ends us: Slurm sends it to every process, in any order."""
        if code in (0, STOPPED_CODE):
            return False
        deadline = time.monotonic() + (OWN_SIGNAL_SECONDS if code in _SIGNALLED else 0.0)
        while self.signals.received is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signals.received is not None and all(failure.weight > 0 for failure in self.failures())

    def over_already(self) -> Outcome | None:
        """What ends this node's part before its command has begun: a signal, or another node."""
        peer = self.trouble()
        if self.signals.received is None and peer is None and not self.failures():
            return None
        by = peer[1] if peer and peer[0] == "CANCELLED" else None
        return Outcome(cancelled=self.signals.received, cancelled_by=by, peer=peer[1] if peer else None)

    def trouble(self) -> tuple[str, str] | None:
        """The state of a watched node that ended badly, or cannot work with ours, and that in words."""
        for rank, value in self.recorder.peers().items():
            state = str(value.get("state"))
            where = f"node {rank} on {value.get('host')}"
            if state == "RUNNING":
                if (words := self._unlike(rank, value)) is not None:
                    return "FAILED", words
                # it may have ended well between the two looks, so only a second look counts
                if gone(value, self.recorder.host):
                    again = self.recorder.peers().get(rank)
                    if again and gone(again, self.recorder.host) and self._fresh(rank, again):
                        return "FAILED", f"{where}: its worker, process {value.get('pid')}, is gone"
            elif state not in ("COMPLETED", "REQUEUED") and self._fresh(rank, value):
                words = "was cancelled" if state == "CANCELLED" else f"is {state}: {value.get('reason')}"
                return state, f"{where} {words}"
        return None

    def _unlike(self, rank: int, value: dict[str, object]) -> str | None:
        ours, theirs = (self.recorder.host, self.recorder.versions), (str(value.get("host")), value.get("versions"))
        if self.recorder.node_rank == 0:
            return versions.difference(ours, (theirs[0], rank, theirs[1]))
        return versions.difference(theirs, (ours[0], self.recorder.node_rank, ours[1]))

    def failures(self) -> list[Failure]:
        """What is known on any node about this start."""
        known = failures.read(self.job.run, self.job.kind, self.recorder.attempt)
        fresh = [failure for failure in known if self._settled or failure not in self._failures_before]
        return fresh + self._unwritten

    def _say(self, failure: Failure, place: int) -> None:
        """For all nodes to see; on a full disk this node alone knows, and the others see it end."""
        try:
            failures.record(self.job.run, self.job.kind, self.recorder.attempt, failure, place)
        except PkuslurmError:
            self._unwritten.append(failure)

    def _fresh(self, rank: int, value: dict[str, Any]) -> bool:
        return self._settled or value != self._peers_before.get(rank)

    @property
    def _settled(self) -> bool:
        """Nothing that is said now is a leftover. No moment is compared: clocks differ between nodes, and jump."""
        return time.monotonic() - self._began > STALE_SECONDS

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
                self._say(failure, self._rank_offset)

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
        self._say(failure, self._rank_offset)
