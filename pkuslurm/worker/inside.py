"""A command of a job's container on this node: what is here is mounted, what is not here is said in words."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pkuslurm import containers
from pkuslurm.containers import RUNTIMES, Container
from pkuslurm.errors import PkuslurmError
from pkuslurm.worker.job import Job

# Slurm's numbers of the devices that this step has, else this job
_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
# ending what a daemon runs for us
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Start:
    """What is to be started, with which environment; ``container``: inside which, as this node has it.

    ``blocked``: signals that the runtime's own program must not get.
    """

    argv: list[str]
    env: dict[str, str]
    container: Container | None = None
    blocked: tuple[signal.Signals, ...] = ()


def start(
    job: Job, command: Sequence[str], env: Mapping[str, str], name: str, deaf_to: Sequence[signal.Signals] = ()
) -> Start:
    """``command`` as this node starts it, in the job's container where it has one. Raises PkuslurmError.

    ``name`` tells this start from every other one of the job; ``deaf_to``: signals that the command must ignore.
    """
    if job.container is None:
        return Start(list(command), dict(env))
    env = _with_user(env)
    container = _on_this_node(job.container, job, env, name)
    container = replace(container, deaf_to=tuple(number.name.removeprefix("SIG") for number in deaf_to))
    mounts = _mounts(container, env)
    containers.refuse_splitting(container.runtime, mounts)
    Path(container.home).mkdir(parents=True, exist_ok=True)
    names = containers.passed(env, [*job.env, *job.env_names], container)
    argv = containers.wrap(container, command, names, mounts)
    # ch-run asks for TERM although it was ignored, and takes the image away from under the ranks
    blocked = tuple(deaf_to) if container.runtime == "charliecloud" else ()
    return Start(argv, containers.environment(container, env, names), container, blocked)


def end(started: Start) -> None:
    """What docker's daemon, or podman's monitor, still runs of it ends."""
    if started.container is not None and (command := containers.stop(started.container)) is not None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, capture_output=True, check=False, timeout=_STOP_SECONDS, env=started.env)


def _on_this_node(container: Container, job: Job, env: Mapping[str, str], name: str) -> Container:
    runtime = RUNTIMES[container.runtime]
    program = shutil.which(runtime.program, path=env.get("PATH"))
    if program is None:
        raise PkuslurmError(
            f"container.runtime={container.runtime}: {runtime.program} is not on this node "
            f"(PATH={env.get('PATH', '')}); cluster.setup=[module load …] may bring it"
        )
    if container.image.startswith("/") and not Path(container.image).exists():
        raise PkuslurmError(f"container.image={container.image}: this node has no such file")
    unique = env.get("CUDA_VISIBLE_DEVICES", "")  # names that hold everywhere; numbers may count from 0 in each job
    numbers = next((env[variable] for variable in _GPUS if env.get(variable)), "")
    gpus = unique if unique.startswith(("GPU-", "MIG-")) else numbers
    return replace(
        container,
        cwd=str(job.cwd),
        program=program,
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", f"pkuslurm-{job.run_id}-{job.kind}-{name}"),  # docker takes no others
        user=f"{os.getuid()}:{os.getgid()}",
        groups=tuple(str(group) for group in sorted(set(os.getgroups()) - {os.getgid()})),
        node=env.get("SLURMD_NODENAME", ""),
        cpus=env.get("SLURM_CPUS_PER_TASK") or env.get("SLURM_CPUS_ON_NODE") or "1",
        gpus=tuple(gpus.split(",")) if gpus else (),
        overlay=container.runtime == "charliecloud" and _offers(program, "--write-fake"),
    )


def _offers(program: str, option: str) -> bool:
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, env={"USER": "nobody"})
    return option in told.stdout


def _with_user(env: Mapping[str, str]) -> dict[str, str]:
    """charliecloud wants USER; python asks for it where the image's /etc/passwd does not know the number."""
    name = env.get("USER") or str(os.getuid())
    with suppress(KeyError):
        name = env.get("USER") or pwd.getpwuid(os.getuid()).pw_name
    return {"LOGNAME": name} | dict(env) | {"USER": name}


def _mounts(container: Container, env: Mapping[str, str]) -> list[str]:
    """The job's paths, what symbolic links lead to, and of the node's devices and drivers those that are there."""
    own = [path for mount in (*container.mounts, container.cwd, container.home) for path in _with_targets(mount)]
    there = [
        path
        for pattern in container.if_there
        for path in sorted(map(str, Path("/").glob(pattern.lstrip("/"))), key=lambda path: (len(path), path))
    ]
    return [*containers.outermost(own), *(path for path in there if _is_the_jobs(path, env))]


def _with_targets(path: str) -> Iterator[str]:
    """A model's folder in a hub's cache is full of links to files that lie elsewhere."""
    yield path
    real = os.path.realpath(path)
    if real != path:
        yield real
    with suppress(OSError), os.scandir(real) as entries:
        for entry in entries:
            if entry.is_symlink() and Path(entry.path).exists():  # a broken one is nothing that could be mounted
                yield containers.around(os.path.realpath(entry.path))


def _is_the_jobs(path: str, env: Mapping[str, str]) -> bool:
    """A device that ASCEND_RT_VISIBLE_DEVICES does not name is another job's."""
    number = re.search(r"/davinci(\d+)$", path)
    listed = re.fullmatch(r"\d+(,\d+)*", env.get("ASCEND_RT_VISIBLE_DEVICES", ""))
    return number is None or listed is None or number.group(1) in listed.group().split(",")
