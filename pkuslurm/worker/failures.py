"""The first failure of an attempt: which of many dying ranks is to be blamed.

When one rank dies, its peers fail a moment later ("Connection closed by peer") and can be the first to say
so. So failures are ordered by kind before they are ordered by time. All nodes read the same files,
state/failures/<kind>-<attempt>-<rank>.json, and therefore blame the same rank. A rank writes its own when it
raises; the worker writes it for a rank that could not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pkuslurm import rundir
from pkuslurm.rundir import RunDir
from pkuslurm.worker.state import save

# what ranks say when *another* rank went away
_SYMPTOMS = re.compile(
    r"connection (closed|reset|refused)|connection was likely closed|broken pipe|remote process exited"
    r"|received signal|signalexception|connection aborted",
    re.IGNORECASE,
)
_TORCHRUN = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: \d+\)")
_EXCEPTION = re.compile(r"^(?:\[rank(\d+)\]: ?)?((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Timeout))(?:: (.*))?$")
_LONGEST = 300

# what a payload ends with when the mistake is the user's
REFUSAL_CODE = 2
# the type of a failure that is a payload's refusal in words
REFUSED = "refused"
# what the worker itself finds out: no steps any more, and which rank it is that cannot run
HANG, STUCK = "hang", "stuck"
# a device of a node does not work: before the command was started
NODE = "node"
_MEMORY = re.compile(r"out of memory|OutOfMemoryError", re.IGNORECASE)
LESS_MEMORY = "lower train.per_device_train_batch_size (and raise gradient_accumulation_steps), or train.cutoff_len"


@dataclass(frozen=True)
class Failure:
    """``code`` as subprocess has it (negative: a signal); None for an exception."""

    rank: int | None
    time: float
    type: str
    message: str
    host: str | None = None
    code: int | None = None

    @property
    def weight(self) -> int:
        """0 a cause, 1 a bare exit code or a hang, 2 an abort (often a watchdog's), 3 what befalls the others."""
        if self.type == NODE:
            return 0
        if self.code is not None and self.code < 0:
            return {-signal.SIGTERM: 3, -signal.SIGABRT: 2}.get(self.code, 0)
        if _SYMPTOMS.search(f"{self.type}: {self.message}"):
            return 3
        return 1 if self.type in ("exit", HANG) else 0

    def __str__(self) -> str:
        line = self.message.strip().split("\n")[0]
        if self.type in (REFUSED, NODE):
            return line
        if self.type == HANG:
            return f"it hangs: {line}"
        if self.type == STUCK:
            return f"rank {self.rank} on {self.host} hangs: {line}"
        if _MEMORY.search(f"{self.type}: {line}"):
            who = "" if self.rank is None else f"rank {self.rank}: "
            return f"{who}{self.type}: {line[:120]}; {LESS_MEMORY}"
        if self.code is not None and self.type in ("signal", "exit"):
            who = "the command" if self.rank is None else f"rank {self.rank}"
            hint = f": {line}" if line and self.type == "exit" else ""
            return f"{who}{f' on {self.host}' if self.host else ''} {describe(self.code)}{hint}"[:_LONGEST]
        who = "" if self.rank is None else f"rank {self.rank}: "
        return f"{who}{self.type}{f': {line}' if line else ''}"[:_LONGEST]


def describe(code: int) -> str:
    """``was killed by signal 9 (SIGKILL)`` or ``ended with exit code 3``."""
    if code < 0:
        name = str(-code)
        with suppress(ValueError):
            name = f"{-code} ({signal.Signals(-code).name})"
        return f"was killed by signal {name}"
    # shells and container runtimes report their child's signal this way
    with suppress(ValueError):
        return f"ended with exit code {code} (as after signal {code - 128}, {signal.Signals(code - 128).name})"
    return f"ended with exit code {code}"


def file(run: RunDir, kind: str, attempt: int, rank: int) -> Path:
    return run.failures / f"{kind}-{attempt}-{rank}.json"


def record(run: RunDir, kind: str, attempt: int, failure: Failure, place: int) -> None:
    """Say for a rank what it could not say itself; what it said itself stays.

    ``place`` is the rank whose file is used if the failure's own rank is not known. Raises PkuslurmError on a
    full disk.
    """
    path = file(run, kind, attempt, place if failure.rank is None else failure.rank)
    if rundir.read_json(path) is None:
        save(
            path,
            {
                "rank": failure.rank,
                "time": failure.time,
                "type": failure.type,
                "message": failure.message,
                "log": "",
                "host": failure.host,
                "code": failure.code,
            },
        )


def forget(run: RunDir, kind: str, attempt: int, ranks: Iterable[int]) -> None:
    """Remove what an earlier start of the same attempt left about ``ranks``."""
    for rank in ranks:
        file(run, kind, attempt, rank).unlink(missing_ok=True)


def read(run: RunDir, kind: str, attempt: int) -> list[Failure]:
    """What is known on any node; torn files are left out."""
    found = []
    for path in sorted(run.failures.glob(f"{kind}-{attempt}-*.json")):
        value = rundir.read_json(path)
        if value is None:
            continue
        rank, time, code = value.get("rank"), value.get("time"), value.get("code")
        found.append(
            Failure(
                rank=rank if isinstance(rank, int) else None,
                time=float(time) if isinstance(time, int | float) and abs(time) < 1e12 else 0.0,
                type=str(value.get("type") or "Exception"),
                message=str(value.get("message") or ""),
                host=str(value["host"]) if value.get("host") else None,
                code=code if isinstance(code, int) else None,
            )
        )
    return found


def first(failures: Iterable[Failure]) -> Failure | None:
    """The one to show: the earliest of the weightiest kind."""
    return min(failures, key=lambda failure: (failure.weight, failure.time), default=None)


def named_by_torchrun(text: str, rank_offset: int) -> tuple[int, int] | None:
    """Rank and exit code that torchrun's ``failed (exitcode: …)``, or prefork's, in a node's log names.

    ``rank_offset`` is the global rank of the node's local rank 0.
    """
    match = _TORCHRUN.search(text)
    return (rank_offset + int(match[2]), int(match[1])) if match else None


def of_rank(rank: int | None, code: int, text: str, moment: float, host: str) -> Failure:
    """The failure of a process that ended with ``code``; rank None: of the command itself.

    By a signal, by a refusal, by the exception that the log ``text`` shows for it, or, if nothing tells more,
    by that exit code.
    """
    if code < 0:
        return Failure(rank, moment, "signal", "", host, code)
    if code == REFUSAL_CODE and (words := refusal(text)):
        return Failure(rank, moment, REFUSED, words, host, code)
    if exception := _exception(rank, text):
        return Failure(rank, moment, *exception, host, code)
    return Failure(rank, moment, "exit", (last_line(text) or "") if rank is None else "", host, code)


def _exception(rank: int | None, text: str) -> tuple[str, str] | None:
    """Type and message of what ``rank`` raised; a traceback without ``[rankN]:`` may be anyone's."""
    found = []
    for match in filter(None, map(_EXCEPTION.match, text.splitlines())):
        # a ChildFailedError is torchrun's, about somebody else
        if match[1] in (None, str(rank)) and not match[2].endswith("ChildFailedError"):
            found.append((match[2].rpartition(".")[2], match[3] or ""))
    causes = [pair for pair in found if not _SYMPTOMS.search(": ".join(pair))] or found
    # of a chain of tracebacks the last one is what it died of
    return causes[-1] if causes else None


def refusal(text: str) -> str | None:
    """The words of a payload that refused (exit code 2): its last line that begins ``pkuslurm: ``."""
    lines = [line for line in text.splitlines() if line.startswith("pkuslurm: ")]
    return lines[-1].removeprefix("pkuslurm: ").strip() if lines else None


def last_line(text: str) -> str | None:
    """The last line that says something (torchrun ends with rules of = and -)."""
    for line in reversed(text.splitlines()):
        if line.strip(" \t=-*~\r") and not line.startswith("pkuslurm worker:"):
            return line.strip()[:_LONGEST]
    return None


def read_log(path: Path, start: int, most: int = 1 << 20) -> str:
    """What ``path`` holds from byte ``start``, at most its last ``most`` bytes; "" where there is no log."""
    try:
        with path.open("rb") as log:
            end = log.seek(0, 2)
            log.seek(max(min(start, end), end - most))
            return log.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
