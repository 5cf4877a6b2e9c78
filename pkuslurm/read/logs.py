"""A run's logs on the screen: what failed first, made harmless, and followed while the job works."""

from __future__ import annotations

import codecs
import math
import re
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from pkuslurm import sweepdir
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import rules, script_log, status, sweep
from pkuslurm.read.changes import stamps
from pkuslurm.read.text import safe
from pkuslurm.rundir import KINDS, RunDir, read_json
from pkuslurm.worker import failures

POLL_SECONDS = 0.5
# Slurm is asked again after so long, or when a state file has changed
SLURM_SECONDS = 30.0
CHUNK = 1 << 20
# of each file, unless all is asked for
LAST_LINES = 40
_NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<job>.+)_(?P<rank>\d+)\.log")
# what Slurm itself and the job's script said, before the worker began or after it
_SCRIPT = re.compile(r"(?P<kind>[a-z]+)-(?P<job>\d+(?:_\d+)?)\.out")
# of a sweep's points that did not complete
MOST_NAMED = 8


def show_logs(path: Path, stream: TextIO, kind: str | None = None, follow: bool = False, whole: bool = False) -> None:
    """A run's logs, the failing job's and in it the failing node's first; of each the last lines, or the ``whole``.

    ``follow``: also what is written until the job ``kind`` (without one: the run) has ended. Raises PkuslurmError
    where there is nothing to show.
    """
    if kind is not None and kind not in KINDS:
        raise PkuslurmError(f"logs {kind}: kinds of jobs are {', '.join(KINDS)}")
    run, printers = RunDir(path), dict[Path, _Printer]()
    heading = _Heading(stream)
    now, asked, before = status.read(path), time.monotonic(), _stamps(run)
    wait = SLURM_SECONDS if now.document.get("executor") == "slurm" else 0.0
    first = True
    while True:
        # asked before the files are read: what a job wrote before its end is not missed
        if time.monotonic() - asked >= wait or _stamps(run) != before:
            now, asked, before = status.read(path), time.monotonic(), _stamps(run)
        last = not follow or not _goes_on(now, kind)
        for file in log_files(run, now, kind):
            if file not in printers:
                printers[file] = _Printer(file, heading)
                if first and not whole:  # what begins later is seen from its beginning
                    printers[file].skip(LAST_LINES)
            printers[file].more()
            if last:
                printers[file].end()
        first = False
        if last:
            break
        time.sleep(POLL_SECONDS)
    if not printers:
        raise PkuslurmError(f"logs: {run.run_id} has none yet" + (f" of {kind}" if kind else ""))


def show_sweep_logs(path: Path, stream: TextIO, kind: str | None = None, whole: bool = False) -> None:
    """Which points did not complete, the logs of the first that failed, and those of the sweep's own jobs.

    Raises PkuslurmError where there is nothing to show.
    """
    if kind is not None and kind not in KINDS:
        raise PkuslurmError(f"logs {kind}: kinds of jobs are {', '.join(KINDS)}")
    now = sweep.read(path)
    heading = _Heading(stream, path)
    printers = [_Printer(file, heading) for file in sweep_log_files(now, kind)]
    broken = [index for index, run in enumerate(now.runs) if run.state not in sweep.FINE]
    if not broken and not printers:
        one = f"; of one point: {command('logs', f'{now.sweep_id}/0')}" if now.runs else ""
        raise PkuslurmError(f"logs: {now.sweep_id} has none of its own yet" + (f" of {kind}" if kind else "") + one)
    named = ", ".join(map(str, broken[:MOST_NAMED])) + (", …" if len(broken) > MOST_NAMED else "")
    told = f"{len(broken)} of {len(now.runs)} points did not complete: {named}" if broken else "no point has failed"
    one = command("logs", f"{now.sweep_id}/{broken[0] if broken else 0}")
    stream.write(f"{told}; of one: {safe(one)}\n")
    stream.write("\n" if printers else "")
    for printer in printers:
        if not whole:
            printer.skip(LAST_LINES)
        printer.more()
        printer.end()


def sweep_log_files(now: sweep.SweepStatus, kind: str | None = None) -> list[Path]:
    """Of the point that failed first, then of the sweep's own jobs; what points share is told once."""
    broken = [run for run in now.runs if run.state in rules.BROKEN]
    first = min(broken, key=lambda run: sweep.ended(run) or math.inf, default=None)
    own = tuple(job for job in now.jobs if job.kind != "prepare")
    itself = status.RunStatus(now.sweep_id, now.path, now.state, None, own)
    found: dict[Path, Path] = {}
    for run in (*([first] if first else []), *now.shares, itself):
        for file in log_files(RunDir(run.path), run, kind):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def log_files(run: RunDir, now: status.RunStatus, kind: str | None = None) -> list[Path]:
    """In the order to read them: the jobs that failed first, in each the node that failed first, then the rest."""
    failed = [job.kind for job in now.jobs if job.state in rules.BROKEN]
    order = list(dict.fromkeys([*failed, *(job.kind for job in now.jobs), *KINDS]))
    found: list[tuple[int, bool, str, int, Path]] = []
    for file in _logs(run):
        match = _NAME.fullmatch(file.name)
        if match and match["kind"] in order and kind in (None, match["kind"]):
            rank = int(match["rank"])
            blamed = match["kind"] in failed and rank == _failing_node(run, now, match["kind"])
            found.append((order.index(match["kind"]), not blamed, _natural(match["job"]), rank, file))
    for file in _scripts(run, now):
        match = _SCRIPT.fullmatch(file.name)
        if match and match["kind"] in (*order, "pack") and kind in (None, match["kind"]):
            if script_log.says_nothing(file):
                continue
            place = order.index(match["kind"]) if match["kind"] in order else 0
            found.append((place, True, _natural(match["job"]), 10**6, file))
    return [file for *_, file in sorted(found)]


def _logs(run: RunDir) -> list[Path]:
    """A point's prepare is done where its share is."""
    home = run.home("prepare")
    return [*run.logs.glob("*.log"), *(home.logs.glob("prepare-*.log") if home != run else ())]


def _scripts(run: RunDir, now: status.RunStatus) -> list[Path]:
    """What Slurm and the scripts said; of arrays the sweep's folder has everybody's, so they are found by their ids."""
    own = [] if sweepdir.is_sweep(run.path) else [*(run.logs / ".slurm").glob("*.out")]
    named = (script_log.find(run, job.kind, job.job_id) for job in now.jobs)
    return list({file.resolve(): file for file in (*own, *named) if file is not None}.values())


def _stamps(run: RunDir) -> list[tuple[str, int]]:
    home = run.home("prepare")
    return stamps(run) + (stamps(home) if home != run else [])


def _failing_node(run: RunDir, now: status.RunStatus, kind: str) -> int | None:
    job = now.job(kind)
    first = failures.first(failures.read(run, kind, job.attempt)) if job else None
    if first is None or first.rank is None:
        return None
    described = read_json(run.job(kind)) or {}
    per_node = described.get("nproc_per_node")
    return first.rank // per_node if isinstance(per_node, int) and per_node > 0 else first.rank


def _natural(text: str) -> str:
    """Sorts ``local-10`` after ``local-9``."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), text)


def _goes_on(now: status.RunStatus, kind: str | None) -> bool:
    job = now.job(kind) if kind else None
    return (job.state if job else now.state) in ("RUNNING", "PENDING", "REQUEUED", "PREEMPTED")


class _Heading:
    """Names the file whenever the next text is another one's; where several runs' are shown, from ``base`` on."""

    def __init__(self, stream: TextIO, base: Path | None = None) -> None:
        self.stream = stream
        self.base = base
        self.last: Path | None = None

    def write(self, file: Path, text: str) -> None:
        if self.last != file:
            self.stream.write(("" if self.last is None else "\n") + f"==> {safe(self._name(file))} <==\n")
            self.last = file
        self.stream.write(text)
        self.stream.flush()

    def _name(self, file: Path) -> str:
        below = self.base is not None and file.is_relative_to(self.base)
        return str(file.relative_to(self.base)) if self.base and below else file.name


class _Printer:
    """Prints what is new in one file, whole lines at a time."""

    def __init__(self, file: Path, heading: _Heading) -> None:
        self.file = file
        self.heading = heading
        self.offset = 0
        self.rest = ""
        # a character may have been half written when we looked
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def skip(self, most: int) -> None:
        """Begin at the last ``most`` lines that are there now, and say what is left out."""
        self.offset, before = _last_lines(self.file, most)
        if before:
            many = f"{before} line{'s' if before > 1 else ''}"
            self.heading.write(self.file, f"… {many} before, all of it: {safe(self.file.absolute())}\n")

    def more(self) -> None:
        try:
            with self.file.open("rb") as source:
                source.seek(self.offset)
                while data := source.read(CHUNK):
                    self.offset += len(data)
                    self._show(self.decoder.decode(data))
        except OSError as error:
            raise PkuslurmError(f"logs: {self.file}: {error.strerror}") from None

    def _show(self, text: str) -> None:
        whole, newline, self.rest = (self.rest + text).rpartition("\n")
        if len(self.rest) > CHUNK:
            whole, newline, self.rest = whole + newline + self.rest, "", ""
        if whole or newline:
            self.heading.write(self.file, safe(last_of_each_bar(whole), keep="\n\t") + newline)

    def end(self) -> None:
        """What stands there without a newline is shown too."""
        if self.rest:
            self.heading.write(self.file, safe(last_of_each_bar(self.rest), keep="\n\t") + "\n")
            self.rest = ""


def _last_lines(file: Path, most: int) -> tuple[int, int]:
    """Where the last ``most`` lines begin, and how many are before them."""
    starts: deque[int] = deque(maxlen=most)
    offset, count, ended = 0, 0, True
    try:
        with file.open("rb") as source:
            while piece := source.readline(CHUNK):
                if ended:
                    starts.append(offset)
                    count += 1
                offset, ended = offset + len(piece), piece.endswith(b"\n")
    except OSError as error:
        raise PkuslurmError(f"logs: {file}: {error.strerror}") from None
    return (starts[0], count - len(starts)) if starts else (0, 0)


def last_of_each_bar(text: str) -> str:
    """A progress bar overwrites its line by carriage returns: keep what would stand there in the end."""
    return "\n".join(
        next((part for part in reversed(line.split("\r")) if part), "") if "\r" in line else line
        for line in text.split("\n")
    )
