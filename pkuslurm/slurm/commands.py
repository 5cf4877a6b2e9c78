"""The only caller of squeue, sacct, scontrol, scancel and sinfo.

A command that failed or did not answer gives None, which never means "the job has ended".
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pkuslurm.errors import PkuslurmError
from pkuslurm.slurm import crane, parse
from pkuslurm.slurm.environment import clean
from pkuslurm.slurm.parse import Row

# Slurm's own commands give up after 10 s (MessageTimeout); a hung file system must not hold us for ever
SECONDS = 30.0
# whoever has a SLURM_CONF that leads nowhere would wait for a minute
ASKED_SECONDS = 10.0
LIFT_SECONDS = 5.0
RELEASE_TRIES, RELEASE_PAUSE = 3, 3.0  # more of them, seconds between them
UNKNOWN_ID = "Invalid job id specified"
# of an array of which some have ended, the others' line may come last
_GONE = re.compile(
    rf"{UNKNOWN_ID}|already (finished|completed|completing)|no longer pending|: No error$", re.IGNORECASE
)
# its last words, of 22.05 and later and of those before
_UNCONFIGURED = re.compile(
    r"configuration source|slurm\.conf.*(No such file|not found)|open slurm\.conf", re.IGNORECASE
)
# without it sacct tells, in some of its forms, of nothing before midnight
SINCE = "2000-01-01"
# so many ids to a command line: Linux takes 128 kB for one argument
PIECE = 5000


@dataclass(frozen=True)
class Answer:
    """``rows`` by job id. ``complete``: Slurm answered, so that an id which is missing is unknown to it."""

    rows: dict[str, Row]
    complete: bool
    problem: str = ""


def present() -> bool:
    """Whether this machine can submit."""
    return not crane.is_crane() and all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol", "scancel"))


def configured() -> bool:
    """Whether Slurm's commands know of a cluster (a slurm.conf, or a controller that hands one out); it may be away."""
    return not _UNCONFIGURED.search(_run(["scontrol", "show", "partition", "-o"], ASKED_SECONDS).problem)


def answers() -> bool:
    """Whether there is a controller that talks to us."""
    return present() and _run(["sinfo", "-h", "-o", "%P"], ASKED_SECONDS).out is not None


def queue(job_ids: Sequence[str]) -> Answer:
    """Jobs that the controller still knows, ended ones (MinJobAge, 5 minutes by default) included. One call.

    Of an array (``A`` or an element ``A_1`` of it) all elements are told.
    """
    if not job_ids:
        return Answer({}, True)
    rows: dict[str, Row] = {}
    for piece in _arrays(job_ids):
        done = _run(["squeue", "-h", "-r", "-t", "all", "-o", parse.SQUEUE_FORMAT, "-j", piece])
        # the words for a single id that was purged; several of which one is known list that one
        if done.out is None and UNKNOWN_ID not in done.problem:
            return Answer({}, False, done.problem)
        rows |= {row.job_id: row for row in parse.squeue(done.out or "")}
    return Answer(rows, True)


def accounting(job_ids: Sequence[str]) -> Answer:
    """The same from accounting, which remembers for months, but lags by seconds and is not everywhere."""
    if not job_ids:
        return Answer({}, True)
    if shutil.which("sacct") is None:
        return Answer({}, False, "there is no sacct")
    rows: dict[str, Row] = {}
    for piece in _arrays(job_ids):
        done = _run(["sacct", "-X", "-P", "-n", "-S", SINCE, "-o", parse.SACCT_FORMAT, "-j", piece])
        if done.out is None:
            return Answer({}, False, done.problem)
        rows |= {row.job_id: row for row in parse.sacct(done.out)}
    return Answer(rows, True)


def _arrays(job_ids: Sequence[str]) -> list[str]:
    """Each array once, not its thousands of elements by name; as lists that a command line holds."""
    ids = list(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))
    return [",".join(ids[at : at + PIECE]) for at in range(0, len(ids), PIECE)]


def by_name(name: str) -> Answer:
    """This user's jobs called ``name``, ended ones included; by the key a submission is found whose reply was lost."""
    user = str(os.getuid())
    done = _run(["squeue", "-h", "-r", "-t", "all", "-o", parse.SQUEUE_FORMAT, "-u", user, "-n", name])
    if done.out is None:
        return Answer({}, False, done.problem)
    return Answer({row.job_id: row for row in parse.squeue(done.out) if row.name == name}, True)


def ask(*words: str) -> str | None:
    """What a question prints that changes nothing (``site`` asks them); None: it was not answered."""
    return _run(words).out


def partitions() -> list[parse.Partition] | None:
    out = _run(["scontrol", "show", "partition", "-o"]).out
    return None if out is None else parse.partitions(out)


def most_elements() -> int | None:
    """How many elements an array can have (MaxArraySize); None: the controller does not say."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).out or "", re.MULTILINE)
    return parse.whole(found[1]) if found else None


def accounts() -> list[str]:
    """The accounts that this user may charge; empty where there is no accounting."""
    if shutil.which("sacctmgr") is None:
        return []
    try:
        user = pwd.getpwuid(os.getuid()).pw_name  # not $USER, which su may have left
    except KeyError:
        return []
    out = _run(["sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account"]).out
    return sorted(set((out or "").split()))


def release(job_id: str) -> None:
    """Let a held job go; one that has ended meanwhile needs none of that. Raises PkuslurmError."""
    done = _run(["scontrol", "release", job_id])
    for _ in range(RELEASE_TRIES):
        if done.out is not None or _GONE.search(done.problem):
            break
        # a controller that was away answers in its first seconds with "Unexpected message received"
        time.sleep(RELEASE_PAUSE)
        done = _run(["scontrol", "release", job_id])
    if done.out is None and not _GONE.search(done.problem):
        raise PkuslurmError(f"scontrol release {job_id}: {done.problem}")


def begin_now(job_id: str, without: Sequence[str] = ()) -> bool:
    """Lift the two minutes that Slurm holds a requeued job, as its owner may; keep it from the nodes ``without``.

    False: it is too early, or Slurm would not; the job starts by itself, later. While it still ends, Slurm says yes and
    does nothing; in the second in which it was requeued it would start it with a credential that it has just revoked,
    and the job would be dead ("Killing non-startable batch job").
    """
    out = _run(["squeue", "-h", "-j", job_id, "-o", "%T|%r|%V"]).out or ""
    word, reason, requeued = [*out.strip().split("|"), "", "", ""][:3]  # a requeue sets the time of submission anew
    since = parse.moment(requeued)
    if word != "PENDING" or reason != "BeginTime" or since is None:
        return False
    if (datetime.now().astimezone() - datetime.fromisoformat(since)).total_seconds() < LIFT_SECONDS:
        return False
    if without:
        _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(without)}"])
    return _run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"]).out is not None


def nodes_up(partition: str | None) -> list[str]:
    """The nodes of a partition (None: of the default one) that answer."""
    if partition is None:
        partition = next((one.name for one in partitions() or [] if one.default), None)
    out = (
        _run(["sinfo", "-h", "-N", "-r", "-t", "idle,mix,alloc,comp", "-p", partition, "-o", "%N"]).out
        if partition
        else None
    )
    return sorted({*(out or "").split()})


def cancel(job_ids: Iterable[str]) -> None:
    """scancel. Raises PkuslurmError with Slurm's words; an id that has ended already is fine."""
    ids = list(job_ids)
    if not ids:
        return
    for at in range(0, len(ids), PIECE):
        done = _run(["scancel", *ids[at : at + PIECE]])
        if done.out is None and UNKNOWN_ID not in done.problem:
            raise PkuslurmError(f"scancel {' '.join(ids[:10])}{' …' if len(ids) > 10 else ''}: {done.problem}")


@dataclass(frozen=True)
class _Done:
    out: str | None
    problem: str = ""


def _run(argv: Sequence[str], seconds: float = SECONDS) -> _Done:
    try:
        done = subprocess.run(
            list(argv),
            env=clean(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except FileNotFoundError:
        return _Done(None, f"there is no {argv[0]} on this machine")
    except subprocess.TimeoutExpired:
        return _Done(None, f"{argv[0]} did not answer within {seconds:.0f} s")
    except OSError as error:
        return _Done(None, f"{argv[0]}: {error.strerror or error}")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return _Done(None, lines[-1].strip() if lines else f"{argv[0]} ended with {done.returncode}")
    return _Done(done.stdout)
