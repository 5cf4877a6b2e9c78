"""Before the launcher, on each node: what is installed, and whether its devices are there and compute.

A bad card makes a rank hang at its first touch, and all other ranks with it, until somebody looks. Here it costs a
minute at most, and names its node.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import PAYLOAD
from pkuslurm.worker import devices, ending, inside, requeue, versions
from pkuslurm.worker.accelerators import ACCELERATORS
from pkuslurm.worker.job import Job
from pkuslurm.worker.processes import end_with
from pkuslurm.worker.supervise import Outcome, Supervisor

SECONDS = 60.0  # to each step: a cold network disk is slow to load torch, sixteen cards take their time
VERSIONS_SECONDS = 20.0  # nothing hangs on them
# who needs longer (a cold network disk): cluster.env.DEVICE_PROBE_SECONDS=180; 0: devices are not tried
VARIABLE = "DEVICE_PROBE_SECONDS"
# these compute on the devices that they are given
KINDS = ("train", "infer")
_MARK = "pkuslurm-probe "
_POLL_SECONDS = 0.1
_IMAGE_SECONDS = 1800.0
_TERM_SECONDS = 2.0


class BadNode(Exception):
    """A device of this node does not work; another node may do."""


@dataclass(frozen=True)
class Told:
    """What the probe said. ``step``: what it was at when it ended or was ended; ``last``: its last line on stderr."""

    versions: Mapping[str, str] = field(default_factory=dict)
    count: int | None = None
    device: int | None = None
    step: str = ""
    error: str | None = None
    done: bool = False
    code: int | None = None
    last: str = ""


def look(job: Job, supervisor: Supervisor, env: Mapping[str, str], name: str) -> tuple[dict[str, str], Outcome | None]:
    """What this node has, said and written down; the environment with its devices; where all is over already, how.

    ``name`` tells this start from every other one of the job. Raises BadNode for a device that fails or hangs,
    PkuslurmError for what no other node would cure.
    """
    recorder = supervisor.recorder
    env, found = environment(job, env, recorder.host)
    if job.accelerator not in (None, "cpu"):
        names = ",".join(found.names) if found.names is not None else "not named"
        ending.say(f"devices: {job.accelerator} {names} ({found.source})")
    seen = check(job, env, found, recorder.host, name, supervisor.over_already)
    if seen is None:
        return env, supervisor.over_already() or Outcome()
    ending.say(f"versions: {versions.line(seen) or f'{job.command[0]} does not tell'}")
    recorder.versions = seen
    recorder.write("RUNNING")
    return env, None


def environment(job: Job, env: Mapping[str, str], host: str) -> tuple[dict[str, str], devices.Devices]:
    """``env`` with what names this job's devices here; the devices. Raises PkuslurmError: too many, or too few."""
    if job.accelerator is None:
        return dict(env), devices.Devices((), "")
    found = devices.find(job.accelerator, env, lambda: requeue.details(env), host)
    if job.accelerator != "cpu":
        words = devices.problem(job.accelerator, found, None, job.devices, host, job.alone)
        if words is None and found.names is None and not devices.count_files(job.accelerator):
            words = devices.problem(job.accelerator, found, 0, job.devices, host, job.alone)
        if words is not None:
            raise PkuslurmError(words)
    kept = {name: value for name, value in env.items() if name not in found.hidden}
    return kept | dict(found.env), found


def check(
    job: Job, env: Mapping[str, str], found: devices.Devices, host: str, name: str, over: Callable[[], Any]
) -> dict[str, str] | None:
    """The versions on this node, its devices tried; None: ``over()`` says that it is not worth it any more."""
    seconds = _seconds(env)
    tried = job.accelerator if job.accelerator not in (None, "cpu") and job.kind in KINDS and seconds else None
    words = [str(PAYLOAD.with_name("probe.py")), tried or "versions"]
    began = time.monotonic()
    start = inside.start(job, [job.command[0], *words], env, f"{name}-probe")
    try:
        told = _run(start.argv, job, start.env, (seconds or SECONDS) if tried else VERSIONS_SECONDS, over)
    finally:
        inside.end(start)
    if told is None:
        return None
    if tried is not None:
        _judge(job, tried, told, found, host, time.monotonic() - began)
    return dict(told.versions)


def _judge(job: Job, accelerator: str, told: Told, found: devices.Devices, host: str, seconds: float) -> None:
    row = ACCELERATORS[accelerator]
    which = f"{accelerator} {_name(found, told.device)}" if told.device is not None else f"its {accelerator} devices"
    if told.error is not None and told.device is None:
        raise PkuslurmError(
            f"node {host}: {job.command[0]} cannot use {accelerator} ({told.step}): {told.error}; "
            "what it needs must be loaded there (cluster.setup, cluster.env)"
        )
    if told.error is not None:
        raise BadNode(f"node {host}: {which} does not work: {told.error}; see {row.smi} there")
    if told.code is None and not told.versions:
        raise BadNode(
            f"node {host}: {job.command[0]} did not start within {seconds:.0f} s "
            f"(cluster.env.{VARIABLE}=180 gives a slow disk longer)"
        )
    if told.code is None:
        step = f"{told.step} takes" if told.step and told.device is None else "a small sum takes"
        raise BadNode(
            f"node {host}: {which} hang{'s' if told.device is not None else ''}: {step} more than {seconds:.0f} s; "
            f"see {row.smi} there (cluster.env.{VARIABLE}=180 gives a slow disk longer)"
        )
    if told.count is not None:
        words = devices.problem(accelerator, found, told.count, job.devices, host, job.alone)
        if words is not None:
            raise PkuslurmError(words)
    if not told.done:
        ended = f"the probe ended with {told.code}{': ' + told.last if told.last else ''}"
        if told.device is not None:  # a driver that kills its process
            raise BadNode(f"node {host}: {which} does not work: {ended}; see {row.smi} there")
        raise PkuslurmError(f"node {host}: {job.command[0]} cannot use {accelerator}: {ended}")


def _name(found: devices.Devices, number: int) -> str:
    """Slurm's, or the site's, name of torch's device ``number``."""
    named = found.names is not None and number < len(found.names)
    return f"device {found.names[number]}" if named and found.names else f"device {number}"


def _seconds(env: Mapping[str, str]) -> float:
    text = env.get(VARIABLE, "")
    if not text:
        return SECONDS
    with suppress(ValueError):
        if 0 <= (seconds := float(text)) < 86400:
            return seconds
    raise PkuslurmError(f"{VARIABLE}={text}: it must be a number of seconds; 0: devices are not tried")


def _run(argv: list[str], job: Job, env: Mapping[str, str], seconds: float, over: Callable[[], Any]) -> Told | None:
    """Run the probe; what hangs is killed, and not waited for where the kernel holds it."""
    worker = os.getpid()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                argv,
                cwd=job.cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                preexec_fn=lambda: end_with(worker),  # the worker has one thread
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PkuslurmError(f"cannot start {argv[0]!r}: {why}") from None
        # an image that must be fetched or unpacked first is not the python's fault
        deadline = time.monotonic() + (seconds if job.container is None else _IMAGE_SECONDS)
        code: int | None = None
        told = 0
        while code is None and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_POLL_SECONDS)
            if (size := os.fstat(out.fileno()).st_size) > told:  # a step further
                told, deadline = size, time.monotonic() + seconds
            if code is None and over():
                _end(process)
                return None
        if code is None:
            _end(process)
        return _read(out, errors, code)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_SECONDS)
            return


def _read(out: IO[bytes], errors: IO[bytes], code: int | None) -> Told:
    value: dict[str, Any] = {}
    for line in _text(out).splitlines():
        if _MARK in line:  # a library may have written before it without a line's end
            with suppress(ValueError):
                found = json.loads(line.partition(_MARK)[2])
                value |= found if isinstance(found, dict) else {}
    versions = value.get("versions")
    said = [line.strip() for line in _text(errors).splitlines() if line.strip()]
    return Told(
        versions={str(name): str(word) for name, word in versions.items()} if isinstance(versions, dict) else {},
        count=value["count"] if isinstance(value.get("count"), int) else None,
        device=value["device"] if isinstance(value.get("device"), int) else None,
        step=str(value.get("step") or "starting python"),
        error=str(value["error"]) if value.get("error") else None,
        done="done" in value,
        code=code,
        last=said[-1][:300] if said else "",
    )


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode("utf-8", errors="replace")
