"""A run's logs on the screen: what failed first, made harmless, and followed while the job works."""

from __future__ import annotations

import codecs
import re
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import rules, script_log, status
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
_SCRIPT = re.compile(r"(?P<kind>[a-z]+)-(?P<job>\d+)\.out")


def show_logs(path: Path, stream: TextIO, kind: str | None = None, follow: bool = False, whole: bool = False) -> None:
    """A run's logs, the failing job's and in it the failing node's first; of each the last lines, or the ``whole``.

    ``follow``: also what is written until the job ``kind`` (without one: the run) has ended. Raises PkuslurmError
    where there is nothing to show.
    """
    if kind is not None and kind not in KINDS:
        raise PkuslurmError(f"logs {kind}: kinds of jobs are {', '.join(KINDS)}")
    run, printers = RunDir(path), dict[Path, _Printer]()
    heading = _Heading(stream)
    now, asked, before = status.read(path), time.monotonic(), stamps(run)
    wait = SLURM_SECONDS if now.document.get("executor") == "slurm" else 0.0
    first = True
    while True:
        # asked before the files are read: what a job wrote before its end is not missed
        if time.monotonic() - asked >= wait or stamps(run) != before:
            now, asked, before = status.read(path), time.monotonic(), stamps(run)
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


def log_files(run: RunDir, now: status.RunStatus, kind: str | None = None) -> list[Path]:
    """In the order to read them: the jobs that failed first, in each the node that failed first, then the rest."""
    failed = [job.kind for job in now.jobs if job.state in rules.BROKEN]
    order = list(dict.fromkeys([*failed, *(job.kind for job in now.jobs), *KINDS]))
    found: list[tuple[int, bool, str, int, Path]] = []
    for file in run.logs.glob("*.log"):
        match = _NAME.fullmatch(file.name)
        if match and match["kind"] in order and kind in (None, match["kind"]):
            rank = int(match["rank"])
            blamed = match["kind"] in failed and rank == _failing_node(run, now, match["kind"])
            found.append((order.index(match["kind"]), not blamed, _natural(match["job"]), rank, file))
    for file in (run.logs / ".slurm").glob("*.out"):
        match = _SCRIPT.fullmatch(file.name)
        if match and match["kind"] in (*order, "pack") and kind in (None, match["kind"]):
            if script_log.says_nothing(file):
                continue
            place = order.index(match["kind"]) if match["kind"] in order else 0
            found.append((place, True, _natural(match["job"]), 10**6, file))
    return [file for *_, file in sorted(found)]


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
    """Names the file whenever the next text is another one's."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last: Path | None = None

    def write(self, file: Path, text: str) -> None:
        if self.last != file:
            self.stream.write(("" if self.last is None else "\n") + f"==> {safe(file.name)} <==\n")
            self.last = file
        self.stream.write(text)
        self.stream.flush()


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
