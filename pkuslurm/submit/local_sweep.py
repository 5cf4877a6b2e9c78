"""The local executor of sweeps: what points share first, then the points, each in a process of its own, some at a time.

Ctrl-C (SIGINT) and SIGTERM cancel what runs and leave what is complete; a closed terminal (SIGHUP) ends nothing.
As a module it is such a process: ``python … pkuslurm.submit.local_sweep RUN_DIR kind …``.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.guard import guarded
from pkuslurm.read import proof
from pkuslurm.read.text import safe
from pkuslurm.render.render import module_command
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit import local, owner
from pkuslurm.submit.attempt_numbers import renumbering
from pkuslurm.submit.local import Cancel
from pkuslurm.submit.owner import described
from pkuslurm.submit.sweep_launcher import launching
from pkuslurm.submit.sweep_lines import Ended, Lines, Work, met, outcome
from pkuslurm.sweepdir import SweepDir, load, share_of, sweep_of
from pkuslurm.worker import marker, processes
from pkuslurm.worker.state import now
from pkuslurm.worker.unpack import unpack

# A process that was told to stop ends its workers within twice local.STOP_SECONDS.
STOP_SECONDS = 3 * local.STOP_SECONDS
_PREFIX = "pkuslurm: "


def run_sweep(sweep: SweepDir, at_once: int, points: Sequence[int], say: Callable[[str], None]) -> int:
    """Run what is not complete of ``points``, in their order, ``at_once`` at a time.

    Returns 0 (all are complete, and what was expected of them is met), 1, or 130 (cancelled: what had not begun stays
    as it was). Raises PkuslurmError where somebody else runs the sweep, or where its directory cannot be written.
    """
    owner.check_owner(sweep.own)
    try:
        with local.signals() as cancel, launching(sweep, cancel) as document:
            return _run(sweep, document, max(1, at_once), points, Lines(say), cancel)
    except OSError as error:
        raise PkuslurmError(f"{error.filename or sweep.path}: {error.strerror or error}") from None


def cancel_point(run: RunDir) -> bool:
    """Cancel one point, which may wait for its turn. False: it had ended, or nobody runs the sweep."""
    if owner.cancel(run):
        return True
    home = sweep_of(run)
    waits = not any(run.state("train").parent.glob("*.json"))
    if home is None or not waits or owner.launcher_of(home.own, load(home) or {}) is None:
        return False
    write_json(run.run_json, described(run) | {"cancelled": now()})
    return True


def cancel_sweep(sweep: SweepDir) -> bool:
    """Ask the process that runs the sweep to cancel it, and wait until it is gone. False: nobody runs it here.

    One running point is cancelled as any run (owner.cancel); the sweep then goes on with the next.
    """
    return owner.cancel_launcher(sweep.own, sweep.sweep_json, 2 * STOP_SECONDS)


@dataclass
class _Child:
    """A process of ours at ``work``; ``words`` is its stderr, ``told`` when it was asked to stop."""

    work: Work
    process: subprocess.Popen[bytes]
    words: IO[bytes]
    began: float
    told: float | None = None


@dataclass
class _Tally:
    """The points that have ended, told one by one."""

    lines: Lines
    total: int
    ended: int = 0
    complete: int = 0
    good: int = 0

    def know(self, complete: Sequence[Work]) -> None:
        """Those of which nothing is left to do."""
        self.ended = self.complete = len(complete)
        self.good = sum(map(met, complete))
        if complete:
            self.lines.line(f"[{self.ended}/{self.total}] complete already")

    def add(self, label: str, ended: Ended) -> None:
        self.ended += 1
        self.complete += ended.complete
        self.good += ended.complete and ended.passed is not False
        self.lines.line(f"[{self.ended}/{self.total}] {safe(label)}  {ended.text}")


def _run(
    sweep: SweepDir, document: Mapping[str, Any], at_once: int, points: Sequence[int], lines: Lines, cancel: Cancel
) -> int:
    processes.become_subreaper()  # what a killed child leaves behind becomes ours, and is ended
    tally = _Tally(lines, len(points))
    works = [(share_of(sweep.point(point), document), _work(sweep, point, document)) for point in points]
    for work in (work for _, work in works if work.kinds):
        known = described(work.run)
        owner.check_idle(work.run, known)  # of a launcher that was killed a moment ago
        if known.get("cancelled"):
            write_json(work.run.run_json, known | {"cancelled": None})
    try:
        unshared = _shares(sweep, {share for share, work in works if _needs_prepare(work)}, lines, cancel)
        tally.know([work for _, work in works if not work.kinds])
        ready = deque[Work]()
        for share, work in works:
            if not work.kinds:
                continue
            if share in unshared and _needs_prepare(work) and cancel.number is None:
                _verdicts(work, dict.fromkeys(work.kinds, ("SKIPPED", unshared[share])))
                tally.add(work.label, Ended(f"SKIPPED: {safe(unshared[share])}", False))
            else:
                ready.append(work)
        _work_off(ready, at_once, lines, cancel, tally.add)
        if cancel.number is not None:
            lines.line(f"cancelled; {tally.complete} of {tally.total} points are complete, a retry goes on")
    finally:
        lines.close()
        local.end_leftovers()
    return 130 if cancel.number is not None else int(tally.good < tally.total)


def _work(sweep: SweepDir, point: int, document: Mapping[str, Any]) -> Work:
    run, label = sweep.point(point), str(point)
    with suppress(LookupError, TypeError):
        label = str(document["points"][point]["label"])
    pipeline = described(run).get("pipeline") or ()
    return Work(label, run, tuple(proof.open_kinds(run, [kind for kind in pipeline if kind != "prepare"])))


def _needs_prepare(work: Work) -> bool:
    jobs = described(work.run)["jobs"]
    return any("prepare" in (jobs[kind].get("parents") or ()) for kind in work.kinds)


def _shares(sweep: SweepDir, needed: set[int], lines: Lines, cancel: Cancel) -> dict[int, str]:
    """Do what points have in common, one after another; the numbers of those that did not come about, and why."""
    runs = {number: sweep.shared(number) for number in sorted(needed)}
    missing = {number: run for number, run in runs.items() if marker.doubt(run, run.run_id, "prepare") is not None}
    for run in missing.values():
        owner.check_idle(run, described(run))
    works = {
        number: Work("prepare" if len(runs) == 1 else f"prepare {number}", run, ("prepare",))
        for number, run in missing.items()
    }
    ends: dict[str, Ended] = {}

    def tell(label: str, ended: Ended) -> None:
        ends[label] = ended
        lines.line(f"[shared] {label}  {ended.text}")

    _work_off(deque(works.values()), 1, lines, cancel, tell)
    return {
        number: f"prepare did not complete: {_reason(work.run)}"
        for number, work in works.items()
        if work.label not in ends or not ends[work.label].complete
    }


def _reason(share: RunDir) -> str:
    return str((read_json(share.state("prepare")) or {}).get("reason") or "it has not begun")


def _verdicts(work: Work, verdicts: Mapping[str, tuple[str, str]]) -> None:
    """State and reason of jobs that no worker was started for. Their files may not be there yet."""
    document = described(work.run)
    folder = work.run.state("train").parent
    folder.mkdir(mode=stat.S_IMODE(work.run.path.stat().st_mode), exist_ok=True)
    for kind, (state, reason) in verdicts.items():
        local.final(work.run, document, kind, state, reason)


def _work_off(
    waiting: deque[Work], at_once: int, lines: Lines, cancel: Cancel, tell: Callable[[str, Ended], None]
) -> None:
    """Each of ``waiting`` in a process of its own; ``tell`` hears how it ended. Returns, or raises, with none left."""
    running: list[_Child] = []
    try:
        while running or (waiting and cancel.number is None):
            while waiting and len(running) < at_once and cancel.number is None:
                work = waiting.popleft()
                if described(work.run).get("cancelled"):  # by itself, while it waited
                    tell(work.label, Ended("CANCELLED before it started", False))
                else:
                    running.append(_start(work))
            if cancel.number is not None:
                _stop(running, cancel.number)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                seconds = time.monotonic() - child.began
                tell(child.work.label, outcome(child.work, seconds, child.process.returncode, _words(child)))
            lines.tick([(child.work, child.began) for child in running])
            time.sleep(local.POLL_SECONDS)
    finally:
        while any(child.process.poll() is None for child in running):
            _stop(running)
            time.sleep(local.POLL_SECONDS)


def _start(work: Work) -> _Child:
    words = tempfile.TemporaryFile()  # not a pipe: who outlives us for a moment must be able to write  # noqa: SIM115
    process = subprocess.Popen(
        module_command(sys.executable, __spec__.name, str(work.run.path.absolute()), *work.kinds),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=words,
        env=os.environ | {"PKUSLURM_LAUNCHER_PID": str(os.getpid())},
        start_new_session=True,  # Ctrl-C reaches us alone, who end the children in order
    )
    return _Child(work, process, words, time.monotonic())


def _stop(running: Sequence[_Child], number: int = signal.SIGTERM) -> None:
    """``number`` once, which says how it was cancelled; KILL to what has not ended in time, whose workers then end by
    themselves."""
    for child in running:
        if child.told is None:
            child.told = time.monotonic()
            child.process.send_signal(number)
        elif time.monotonic() - child.told > STOP_SECONDS:
            child.process.kill()


def _words(child: _Child) -> str:
    """Its refusal, or what our own bug left; a program that it started may have written, too."""
    with child.words as stream:
        stream.seek(0)
        said = stream.read().decode("utf-8", "replace").splitlines()
    return next((line.removeprefix(_PREFIX) for line in reversed(said) if line.startswith(_PREFIX)), "")


class _Silent:
    """A watcher for a process whose parent tells what happens."""

    def started(self, kind: str) -> None: ...

    def tick(self, kind: str) -> None: ...

    def ended(self, kind: str, state: str, reason: str | None) -> None: ...


def main(argv: Sequence[str]) -> int:
    """A child: ``RUN_DIR kind …``. 0, 1 (a job failed), 130 (cancelled); a refusal is 2 and one line on stderr."""
    return guarded(lambda: _child(RunDir(Path(argv[0])), argv[1:]))


def _child(run: RunDir, kinds: Sequence[str]) -> int:
    if os.environ.get("PKUSLURM_LAUNCHER_PID", "").isdecimal():
        processes.end_with(int(os.environ["PKUSLURM_LAUNCHER_PID"]))
    kinds = proof.open_kinds(run, kinds)  # somebody else may have done it meanwhile
    if not kinds:
        return 0
    try:
        unpack(run)
    except (PkuslurmError, OSError) as error:
        skipped = dict.fromkeys(kinds[1:], ("SKIPPED", f"{kinds[0]} did not complete"))
        _verdicts(Work("", run, tuple(kinds)), {kinds[0]: ("FAILED", str(error))} | skipped)
        return 1
    return local.run_jobs(run, kinds, _Silent(), begin=renumbering(run, kinds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
