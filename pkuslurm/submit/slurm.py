"""A run's jobs as Slurm jobs. The only module that knows submitit, whose version and private calls tests hold.

submitit writes and submits scripts; what runs is our worker, given as a command line: no pickle on the shared disk, the
worker's own exit code, and an accepted job that outlives a killed launcher. Before sbatch is called the job's key (its
name) is in run.json: sbatch can fail and still have submitted, and then the job is found by its key, never sent again.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.paths import command
from pkuslurm.render.render import module_command
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.slurm.environment import leaking
from pkuslurm.submit import refusals
from pkuslurm.submit.alone import alone
from pkuslurm.submit.identity import check_there, find, take_back
from pkuslurm.submit.setup import setup_lines
from pkuslurm.worker import marker


@dataclass(frozen=True)
class Array:
    """Many points' jobs of one kind as one array: element i works in the directory of line i of ``table``."""

    sweep: Path
    table: Path
    count: int
    at_once: int | None = None


@dataclass(frozen=True)
class Submission:
    """One sbatch. ``jobs``: the job file of the one job, or those of a chain in one allocation (cluster.pack).

    ``dependency`` is Slurm's expression; ``jobs`` of an ``array`` are those of its first element.
    """

    key: str
    jobs: Sequence[Mapping[str, Any]]
    dependency: str = ""
    hold: bool = False
    array: Array | None = None

    @property
    def largest(self) -> Mapping[str, Any]:
        return max(self.jobs, key=lambda job: int(job["nodes"]))

    @property
    def name(self) -> str:
        return "pack" if self.largest["request"].get("pack") else str(self.largest["kind"])

    @property
    def place(self) -> Path:
        return self.array.sweep if self.array else Path(self.largest["run_dir"])

    @property
    def folder(self) -> Path:
        return RunDir(self.place).logs / ".slurm"


def script(submission: Submission) -> str:
    """The sbatch script: the text that is submitted, and that a dry run prints. Pure."""
    array = submission.array
    command = " &&\n".join(_command(job, array) for job in submission.jobs)
    count = {"map_count": array.count, "array_parallelism": array.at_once or array.count} if array else {}
    text: str = submitit_slurm._make_sbatch_string(
        command=command, folder=submission.folder, **count, **_parameters(submission)
    )
    return text


def groups(jobs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """What goes to Slurm as one job: each by itself, or all."""
    return [list(jobs)] if jobs and jobs[0]["request"].get("pack") else [[job] for job in jobs]


def _parameters(submission: Submission) -> dict[str, Any]:
    """submitit's parameters. Nothing is left to its defaults (5 minutes, USR2@90, wckey) or to the user's shell."""
    job = submission.largest
    request, options = job["request"], dict(job["request"]["options"])
    known = submitit_slurm._get_default_parameters()
    # as submitit knows them; what it does not know it passes through
    asked = {name: options.pop(name) for name in list(options) if name in known}
    further = {
        "chdir": str(submission.place),
        "kill-on-invalid-dep": "yes",  # else an orphan waits for ever
        "requeue": True,  # also where the site's default is not to: after a node's failure Slurm does it by itself
        "output": str(submission.folder / f"{submission.name}-{'%A_%a' if submission.array else '%j'}.out"),
    }
    if submission.hold:
        further["hold"] = True  # released when the chain is whole
    if submission.dependency:
        asked["dependency"] = submission.dependency
    return {
        "time": None,
        "wckey": None,
        "signal_delay_s": request["signal_seconds"],
        "stderr_to_stdout": True,
        "use_srun": False,  # ours has more to say
        **asked,
        "job_name": submission.key,
        "nodes": job["nodes"],
        "ntasks_per_node": 1,
        "setup": _setup(job, submission.array),
        "additional_parameters": options | further,
    }


def _setup(job: Mapping[str, Any], array: Array | None) -> list[str]:
    """Of an array's element its directory; cluster.setup, each line's failure an end in words; where the ranks meet."""
    lines = [f"umask {job['request']['umask']}"]  # srun makes the logs
    if array is not None:
        sweep, table = shlex.quote(str(array.sweep)), shlex.quote(str(array.table))
        lines += [
            f'PKUSLURM_RUN=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {table}) && '
            f'cd {sweep}/"${{PKUSLURM_RUN:?is not in the table}}" && mkdir -p logs || exit 1'
        ]
    lines += setup_lines(job["request"]["setup"])
    if job["nodes"] > 1:
        head = shlex.join(module_command(job["worker"][0], "pkuslurm.worker.head"))
        lines += ["# MASTER_ADDR and MASTER_PORT: this first node's address, and a port that is free on it"]
        lines += [f"PKUSLURM_MASTER=$({head}) || exit 1", "export PKUSLURM_MASTER"]
    return lines


def _command(job: Mapping[str, Any], array: Array | None) -> str:
    """One task a node. Since 22.05 srun takes no --cpus-per-task from the job; a binding would put all ranks on it."""
    run, kind, nodes = RunDir(Path(job["run_dir"])), job["kind"], job["nodes"]
    words = [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *("--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL", "--input=none", "--unbuffered"),
        "--open-mode=append",
    ]
    if cpus := job["request"]["options"].get("cpus_per_task"):
        words.append(f"--cpus-per-task={cpus}")
    if array is None:
        return shlex.join([*words, f"--output={run.logs / kind}-%j_%t.log", *job["worker"]])
    here = f'{shlex.quote(str(array.sweep))}/"$PKUSLURM_RUN"'
    return (
        f"{shlex.join(words)} --output={here}/logs/{kind}-%A_%a_%t.log "
        f"{shlex.join(job['worker'][:-1])} {here}/jobs/{kind}.json"
    )


class _Executor(submitit_slurm.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit's, handed a script that is finished, and kept from what the user's shell says about submissions."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self._text = text

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """submitit takes the first "job 77" of all that is printed; a site's own sbatch may speak of others before."""
        text = string.decode("utf-8", "replace") if isinstance(string, bytes) else string
        found = re.findall(r"Submitted batch job ([0-9]{1,18})\b", text)
        if len(set(found)) != 1:
            raise FailedSubmissionError(f"sbatch printed {text.strip()[:200]!r}")
        return str(found[0])

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["env", *(f"--unset={name}" for name in leaking(os.environ)), "sbatch", str(submission_file_path)]


def submit(run: RunDir, kinds: Sequence[str]) -> None:
    """``send`` for a run that no other command has in hand."""
    with alone(run) as document:
        send(run, document, kinds)


def send(run: RunDir, document: dict[str, Any], kinds: Sequence[str]) -> None:
    """Submit those of ``kinds`` that have no job yet, each after its parents, and let the first ones go.

    ``document`` is run.json, which is ours ``alone``. Raises PartlySubmitted where it can go on later (``retry``),
    Refused where Slurm will not have it.
    """
    jobs: dict[str, dict[str, Any]] = document["jobs"]
    new = [kind for kind in kinds if jobs[kind].get("job_id") is None or jobs[kind].get("held")]
    try:
        for group in groups([_read_job(run, kind) for kind in kinds if jobs[kind].get("job_id") is None]):
            _submit_group(run, document, group)
        check_there(jobs[kind] for kind in new)
        for kind in kinds:
            if jobs[kind].get("held"):
                commands.release(jobs[kind]["job_id"])
                jobs[kind]["held"] = False
                write_json(run.run_json, document)
    except (PkuslurmError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, Refused) and take_back(jobs[kind] for kind in kinds):
            raise
        done = [kind for kind in kinds if jobs[kind].get("job_id")]
        raise PartlySubmitted(
            f"{run.run_id}: {why(error)}; submitted so far: {', '.join(done) or 'nothing'}, and held until all are; "
            f"go on with: {command('retry', run.run_id)}"
        ) from None


class Refused(PkuslurmError):
    """Slurm will never take it as it is, and nothing of its chain is in the queue."""


class Full(PkuslurmError):
    """A limit on how many jobs one may have in the queue: later it will be taken."""


def why(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)


def _read_job(run: RunDir, kind: str) -> dict[str, Any]:
    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    return job


def _submit_group(run: RunDir, document: dict[str, Any], group: Sequence[Mapping[str, Any]]) -> None:
    """Submit what becomes one Slurm job, after the parents that are not complete yet."""
    own = [job["kind"] for job in group]
    entries = [document["jobs"][kind] for kind in own]
    outside = [name for job in group for name in job["parents"] if name not in own]
    waiting = [name for name in outside if marker.doubt(run, run.run_id, name) is not None]
    after = ":".join(str(document["jobs"][name]["job_id"]) for name in waiting)
    submission = Submission(group[0]["key"], group, f"afterok:{after}" if after else "", hold=not after)
    hand_in(submission, entries, lambda: write_json(run.run_json, document))
    for entry, job in zip(entries, group, strict=True):
        entry["first_attempt"] = job["first_attempt"]
    write_json(run.run_json, document)


def hand_in(submission: Submission, entries: Sequence[dict[str, Any]], save: Callable[[], object]) -> None:
    """Submit it, or find it where an earlier launcher asked and did not live to hear the answer.

    The key is written into ``entries`` (of a description that ``save`` writes) before sbatch is called, the id after.
    """
    before = entries[0].get("asked") is not None
    for entry in entries:
        entry.update(key=submission.key, asked=_now(), held=submission.hold)
    save()
    job_id = find(submission.key) if before else None
    if job_id is None:
        job_id = _sbatch(submission, script(submission))
    for entry in entries:
        entry["job_id"] = job_id
    save()


def _sbatch(submission: Submission, text: str, again: bool = True) -> str:
    submission.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    quiet = io.StringIO()
    try:
        # Ctrl-C reaches sbatch too, which then would not tell whether it has submitted; `retry` finds it by its key
        with _interrupted_later(), _private(), contextlib.redirect_stderr(quiet):
            return str(_Executor(submission.folder, text)._submit_command("").job_id)
    except FailedJobError as error:
        words = str(error) or quiet.getvalue()
        if refusals.parent_gone(words):
            lost = f"Slurm has lost what {submission.name} waits for: its controller was started anew meanwhile"
            raise PkuslurmError(lost) from None
        if refusals.certain(words):
            refused = refusals.in_words(submission.largest, words)
            raise (Full if refusals.for_now(words) else Refused)(refused) from None
    except FailedSubmissionError as error:
        words = str(error)  # it went well, and said so in words of the site's own
    job_id = find(submission.key)
    if job_id is not None:
        return job_id
    if again:
        return _sbatch(submission, text, again=False)
    raise PkuslurmError(f"Slurm did not take {submission.name} ({refusals.summary(words)})")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """The script is this user's alone, and so is what the job prints: Slurm makes that file by the umask of sbatch."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C takes effect at the end; a program that is started here inherits the mask, and never sees it."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            raise KeyboardInterrupt
