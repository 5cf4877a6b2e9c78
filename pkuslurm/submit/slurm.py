"""A run's jobs as Slurm jobs. The only module that knows submitit, whose version and private calls tests hold.

submitit writes and submits scripts; what runs is our worker, given as a command line: no pickle on the shared disk, the
worker's own exit code, and an accepted job that outlives a killed launcher. Before sbatch is called the job's key (its
name) is in run.json: sbatch can fail and still have submitted, and then the job is found by its key, never sent again.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.render.render import module_command
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.slurm.environment import leaking
from pkuslurm.submit import refusals
from pkuslurm.submit.alone import alone
from pkuslurm.worker import marker

# for so long the controller is asked whether it has the job
FIND_SECONDS = 60.0
# a job that the controller does not show twice, so far apart, was not taken
ABSENT_SECONDS = 3.0


def script(jobs: Sequence[Mapping[str, Any]], dependencies: Sequence[str], hold: bool) -> str:
    """The sbatch script of a job file's job, or of several in one allocation (cluster.pack), one after another.

    It is the text that is submitted, and that a dry run prints. Pure.
    """
    largest = max(jobs, key=lambda job: int(job["nodes"]))
    command = " &&\n".join(_command(job) for job in jobs)
    text: str = submitit_slurm._make_sbatch_string(
        command=command, folder=_folder(largest), **_parameters(largest, dependencies, hold)
    )
    return text


def groups(jobs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """What goes to Slurm as one job: each by itself, or all."""
    return [list(jobs)] if jobs and jobs[0]["request"].get("pack") else [[job] for job in jobs]


def _folder(job: Mapping[str, Any]) -> Path:
    return RunDir(Path(job["run_dir"])).logs / ".slurm"


def _parameters(job: Mapping[str, Any], dependencies: Sequence[str], hold: bool) -> dict[str, Any]:
    """submitit's parameters. Nothing is left to its defaults (5 minutes, USR2@90, wckey) or to the user's shell."""
    request, options = job["request"], dict(job["request"]["options"])
    known = submitit_slurm._get_default_parameters()
    # as submitit knows them; what it does not know it passes through
    asked = {name: options.pop(name) for name in list(options) if name in known}
    further = {
        "chdir": job["run_dir"],
        "kill-on-invalid-dep": "yes",  # else an orphan waits for ever
        "requeue": True,  # also where the site's default is not to: after a node's failure Slurm does it by itself
        "output": str(_folder(job) / f"{'pack' if request.get('pack') else job['kind']}-%j.out"),
    }
    if hold:
        further["hold"] = True  # released when the chain is whole
    if dependencies:
        asked["dependency"] = "afterok:" + ":".join(dependencies)
    return {
        "time": None,
        "wckey": None,
        "signal_delay_s": request["signal_seconds"],
        "stderr_to_stdout": True,
        "use_srun": False,  # ours has more to say
        **asked,
        "job_name": job["key"],
        "nodes": job["nodes"],
        "ntasks_per_node": 1,
        "setup": _setup(job),
        "additional_parameters": options | further,
    }


def _setup(job: Mapping[str, Any]) -> list[str]:
    """cluster.setup, each line's failure an end in words; then where the ranks meet."""
    lines = [f"umask {job['request']['umask']}"]  # srun makes the logs
    for text in job["request"]["setup"]:
        if all(not line.strip() or line.strip().startswith("#") for line in text.splitlines()):
            continue  # bash takes no { } with nothing in it
        words = shlex.quote(f"pkuslurm: cluster.setup failed: {text}")
        lines += ["{", text, f"}} || {{ echo {words} >&2; exit 1; }}"]
    if job["nodes"] > 1:
        head = shlex.join(module_command(job["worker"][0], "pkuslurm.worker.head"))
        lines += ["# MASTER_ADDR and MASTER_PORT: this first node's address, and a port that is free on it"]
        lines += [f"PKUSLURM_MASTER=$({head}) || exit 1", "export PKUSLURM_MASTER"]
    return lines


def _command(job: Mapping[str, Any]) -> str:
    """One task a node. Since 22.05 srun takes no --cpus-per-task from the job; a binding would put all ranks on it."""
    run, nodes = RunDir(Path(job["run_dir"])), job["nodes"]
    words = [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *("--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL", "--input=none", "--unbuffered"),
        *("--open-mode=append", f"--output={run.logs / job['kind']}-%j_%t.log"),
    ]
    if cpus := job["request"]["options"].get("cpus_per_task"):
        words.append(f"--cpus-per-task={cpus}")
    return shlex.join([*words, *job["worker"]])


class _Executor(submitit_slurm.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit's, handed a script that is finished, and kept from what the user's shell says about submissions."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self._text = text

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

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
    try:
        for group in groups([_read_job(run, kind) for kind in kinds if jobs[kind].get("job_id") is None]):
            _submit_group(run, document, group)
        for kind in kinds:
            if jobs[kind].get("held"):
                commands.release(jobs[kind]["job_id"])
                jobs[kind]["held"] = False
                write_json(run.run_json, document)
    except (PkuslurmError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, Refused) and _taken_back(jobs, kinds):
            raise
        done = [kind for kind in kinds if jobs[kind].get("job_id")]
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise PartlySubmitted(
            f"{run.run_id}: {why}; submitted so far: {', '.join(done) or 'nothing'}, and held until all are; "
            f"go on with: pkuslurm retry {shlex.quote(run.run_id)}"
        ) from None


class Refused(PkuslurmError):
    """Slurm will never take it as it is, and nothing of its chain is in the queue."""


def _read_job(run: RunDir, kind: str) -> dict[str, Any]:
    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.job(kind)}: it cannot be read")
    return job


def _submit_group(run: RunDir, document: dict[str, Any], group: Sequence[Mapping[str, Any]]) -> None:
    """Submit what becomes one Slurm job, after the parents that are not complete yet."""
    own = [job["kind"] for job in group]
    entries = [document["jobs"][kind] for kind in own]
    key = group[0]["key"]
    outside = [name for job in group for name in job["parents"] if name not in own]
    waiting = [name for name in outside if marker.doubt(run, run.run_id, name) is not None]
    parents = [str(document["jobs"][name]["job_id"]) for name in waiting]
    before = entries[0].get("asked") is not None  # an earlier launcher asked and did not live to hear the answer
    for entry in entries:
        entry.update(key=key, asked=_now(), held=not parents)
    write_json(run.run_json, document)
    job_id = _find(key) if before else None
    if job_id is None:
        job_id = _sbatch(group[0], script(group, parents, hold=not parents))
    for entry, job in zip(entries, group, strict=True):
        entry.update(job_id=job_id, first_attempt=job["first_attempt"])
    write_json(run.run_json, document)


def _sbatch(job: Mapping[str, Any], text: str, again: bool = True) -> str:
    folder = _folder(job)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    quiet = io.StringIO()
    try:
        # Ctrl-C reaches sbatch too, which then would not tell whether it has submitted; `retry` finds it by its key
        with _interrupted_later(), contextlib.redirect_stderr(quiet):
            return str(_Executor(folder, text)._submit_command("").job_id)
    except FailedJobError as error:
        words = str(error) or quiet.getvalue()
        if refusals.certain(words):
            refused = refusals.in_words(job, words)
            raise (PkuslurmError if refusals.for_now(words) else Refused)(refused) from None
    except FailedSubmissionError as error:
        words = str(error)  # it went well, and said so in words of the site's own
    job_id = _find(job["key"])
    if job_id is not None:
        return job_id
    if again:
        return _sbatch(job, text, again=False)
    raise PkuslurmError(f"Slurm did not take {job['kind']} ({refusals.summary(words)})")


def _find(key: str) -> str | None:
    """The job called ``key``; None: Slurm has none. Raises PkuslurmError where the controller does not say."""
    deadline = time.monotonic() + FIND_SECONDS
    absent = False
    while True:
        answer = commands.by_name(key)
        if answer.rows:
            return next(iter(answer.rows))
        if answer.complete and absent:
            return None
        absent = answer.complete
        if time.monotonic() > deadline:
            raise PkuslurmError(f"the controller does not answer ({answer.problem})")
        time.sleep(ABSENT_SECONDS)


def _taken_back(jobs: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> bool:
    """Cancel what of this submission is in the queue: it is held, so nothing of it has run."""
    try:
        commands.cancel(str(jobs[kind]["job_id"]) for kind in kinds if jobs[kind].get("job_id"))
    except PkuslurmError:
        return False
    return True


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


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
