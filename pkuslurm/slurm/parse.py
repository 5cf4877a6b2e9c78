"""Slurm's answers as values. Pure: text in, rows out; only the columns that ``commands`` asks for.

The JSON output is not used: its schema changes with every release, and 22.05's squeue --json ignores -j.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime

# `|` separates: reasons hold spaces and commas. The name comes last, for it may hold anything.
SQUEUE_FORMAT = "%i|%T|%S|%e|%N|%u|%r|%j"
SACCT_FORMAT = "JobID,State,ExitCode,Start,End,NodeList,Reason,JobName"

# Slurm's state → the contract's. What is not here stays as it is.
STATES = {
    "CONFIGURING": "RUNNING",
    "COMPLETING": "RUNNING",
    "SIGNALING": "RUNNING",
    "STAGE_OUT": "RUNNING",
    "RESIZING": "RUNNING",
    "SUSPENDED": "RUNNING",
    "STOPPED": "RUNNING",
    "BOOT_FAIL": "NODE_FAIL",
    "DEADLINE": "TIMEOUT",
    "REQUEUE_HOLD": "PENDING",
    "REQUEUE_FED": "PENDING",
    "SPECIAL_EXIT": "PENDING",
    "RESV_DEL_HOLD": "PENDING",
    "REVOKED": "CANCELLED",
}
_ELEMENTS = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9})(?::(?P<step>[0-9]{1,9}))?)?")
# more digits are no number of Slurm's, and int() refuses thousands of them
_WHOLE = re.compile(r"[0-9]{1,18}")
# Slurm's own upper limit of MaxArraySize
MOST_ELEMENTS = 4_000_001
# what squeue says of a job that Slurm has held after that; its owner may release it
LAUNCH_FAILED = "launch failed requeued held"
# Of the contract's words: not ended.
ALIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Row:
    """One job as Slurm has it. ``state`` is the contract's word, ``said`` Slurm's own ("CANCELLED by 1000").

    Times are ISO 8601 with this machine's zone; of a pending job ``started`` is when Slurm expects to start it.
    """

    job_id: str
    name: str
    state: str
    said: str
    started: str | None = None
    finished: str | None = None
    nodes: str = ""
    reason: str = ""
    exit_code: int | None = None
    user: str = ""

    @property
    def held(self) -> bool:
        """Until its owner lets it go: submitted so, or taken off a node that could not start it (a failed prolog)."""
        return self.state == "PENDING" and self.reason.startswith(("JobHeldUser", LAUNCH_FAILED))

    @property
    def orphaned(self) -> bool:
        """Killed by Slurm itself while it waited, for a dependency that can no longer come true.

        squeue, which alone gives the user, tells by the reason; sacct by naming nobody ("CANCELLED by 1000").
        """
        if self.state != "CANCELLED" or " by " in self.said:
            return False
        if self.user:
            return "DependencyNeverSatisfied" in self.reason
        return self.started is None or "Dependency" in self.reason


def state(word: str) -> str:
    """The contract's word for Slurm's, which may go on ("CANCELLED by 1234", "CANCELLED+")."""
    first = word.split()[0].rstrip("+") if word.split() else ""
    return STATES.get(first, first)


def squeue(text: str) -> list[Row]:
    """Rows of ``squeue -h -o SQUEUE_FORMAT``; of an array one for each element, ``A_1``."""
    rows = []
    for fields in _lines(text, SQUEUE_FORMAT.count("|")):
        job_id, word, start, end, nodes, user, reason, name = fields
        verdict = state(word)
        rows.append(
            Row(
                job_id,
                name,
                verdict,
                word,
                moment(start),
                moment(end) if verdict not in ALIVE else None,  # else the limit's end
                "" if nodes in ("n/a", "(null)") else nodes,
                "" if reason == "None" else reason,
                None,
                user,
            )
        )
    return list(_by_element(rows))


def sacct(text: str) -> list[Row]:
    """Rows of ``sacct -X -P -n -o SACCT_FORMAT``; what it tells of many pending elements at once holds for each."""
    rows = []
    for job_id, word, code, start, end, nodes, reason, name in _lines(text, SACCT_FORMAT.count(",")):
        rows.append(
            Row(
                job_id,
                name,
                state(word),
                word,
                moment(start),
                moment(end),
                "" if nodes == "None assigned" else nodes,
                "" if reason == "None" else reason,
                exit_code(code),
            )
        )
    return list(_by_element(rows))


def _by_element(rows: Iterable[Row]) -> Iterator[Row]:
    # an element's own row comes last and counts: 25.11 leaves it in the row of the pending ones, too
    for row in sorted(rows, key=lambda row: "_[" not in row.job_id):
        if "_[" not in row.job_id:
            yield row
            continue
        array, _, rest = row.job_id.partition("_")
        for number in elements(rest):
            yield replace(row, job_id=f"{array}_{number}")


def elements(text: str) -> list[int]:
    """The numbers of ``[0-3,7,10-20:5%2]``; ``%2`` is how many may run at once. What says nothing is left out.

    A long list ends in ``...`` (SLURM_BITSTR_LEN): what is cut off is not known.
    """
    found: list[int] = []
    for part in text.strip().strip("[]").partition("%")[0].split(","):
        match = _ELEMENTS.fullmatch(part.strip())
        if match is None:
            continue
        first = int(match["first"])
        last = int(match["last"] or first)
        if last - first < MOST_ELEMENTS:  # else it is none of Slurm's lines
            found += range(first, last + 1, int(match["step"] or 1) or 1)
    return found


def _lines(text: str, bars: int) -> Iterator[list[str]]:
    for line in text.split("\n"):
        fields = line.split("|", bars)
        if len(fields) == bars + 1:
            yield [field.strip() for field in fields]


def exit_code(text: str) -> int | None:
    """``3:0`` → 3, ``0:9`` (signal 9) → 137, as a shell has it; None for anything else."""
    code, _, number = text.partition(":")
    left, right = whole(code), whole(number)
    if left is None or right is None:
        return None
    return left or (128 + right if right else 0)


def whole(text: str) -> int | None:
    """A number as Slurm prints one; None for anything else, such as a line that is no answer of Slurm's."""
    return int(text) if _WHOLE.fullmatch(text) else None


def moment(text: str) -> str | None:
    """Slurm's local time as ISO 8601 with zone; None for N/A, Unknown, None."""
    try:
        return datetime.fromisoformat(text).astimezone().isoformat() if text else None
    except (ValueError, OverflowError, OSError):  # a year that has no time of this machine's
        return None


@dataclass(frozen=True)
class Partition:
    """What a partition allows: minutes, nodes; None: no limit."""

    name: str
    state: str
    max_minutes: int | None
    max_nodes: int | None
    total_nodes: int
    default: bool


def partitions(text: str) -> list[Partition]:
    """Of ``scontrol show partition -o``."""
    found = []
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in values:
            continue
        found.append(
            Partition(
                values["PartitionName"],
                values.get("State", "UP"),
                minutes(values.get("MaxTime", "UNLIMITED")),
                whole(values.get("MaxNodes", "UNLIMITED")),
                whole(values.get("TotalNodes", "0")) or 0,
                values.get("Default") == "YES",
            )
        )
    return found


_TIME = re.compile(r"(?:(?P<days>[0-9]{1,9})-)?(?P<rest>[0-9]{1,9}(?::[0-9]{1,9}){0,2})")


def minutes(text: str) -> int | None:
    """Slurm's forms of a time (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up; None: no limit, no time."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None
    numbers = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, mins, seconds = [*numbers, 0, 0][:3]
        hours += 24 * int(match["days"])
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, [*numbers, 0][:2]
    return hours * 60 + mins + (seconds > 0)
