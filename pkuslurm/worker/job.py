"""The job file, all that a worker is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.containers import RUNTIMES, Container
from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import KINDS, RunDir, read_json
from pkuslurm.worker.accelerators import ACCELERATORS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One job of a run as jobs/<kind>.json holds it.

    ``max_attempts``, ``hang_minutes``: None: it neither goes on by itself nor is watched for a hang (a job by hand).
    ``accelerator``: None in a job file of before it had one. ``devices``: how many this job has on each node, None: at
    least one. ``exclusive``: nobody else is on its nodes; ``alone``: or Slurm was asked for no devices at all.
    ``env_names``: variables that get the value of another one of the job's environment (secrets are never written).
    """

    run_id: str
    kind: str
    run: RunDir
    parents: tuple[str, ...]
    nodes: int
    nproc_per_node: int
    first_attempt: int
    command: tuple[str, ...]
    env: Mapping[str, str]
    env_names: Mapping[str, str]
    unset: tuple[str, ...]
    expect: Mapping[str, Any]
    cwd: Path
    max_attempts: int | None = None
    hang_minutes: float | None = None
    container: Container | None = None
    accelerator: str | None = None
    devices: int | None = None
    exclusive: bool = False
    alone: bool = True


def load(path: Path) -> Job:
    """Read a job file. Raises PkuslurmError, naming the file and the field, when it cannot be used."""
    value = read_json(path)
    if value is None:
        raise PkuslurmError(f"job file {path}: is not there, or holds no whole JSON object")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise PkuslurmError(
            f"job file {path}: schema_version is {value.get('schema_version')!r}, "
            f"this pkuslurm knows {SCHEMA_VERSION}; use the version that wrote it"
        )
    fields = _Fields(path, value)
    kind = fields.text("kind")
    if kind not in KINDS:
        raise PkuslurmError(f"job file {path}: kind {kind!r} is none of {', '.join(KINDS)}")
    run_dir = Path(fields.text("run_dir"))
    if not run_dir.is_absolute():
        raise PkuslurmError(f"job file {path}: run_dir {str(run_dir)!r} must be absolute")
    command = fields.texts("command")
    if not command:
        raise PkuslurmError(f"job file {path}: command is empty")
    env, env_names = fields.names("env"), fields.names("env_names")
    expect = value.get("expect") or {}
    if not isinstance(expect, dict):
        raise PkuslurmError(f"job file {path}: expect must be an object")
    resume = value.get("resume") or {}
    if not isinstance(resume, dict):
        raise PkuslurmError(f"job file {path}: resume must be an object")
    return Job(
        run_id=fields.text("run_id"),
        kind=kind,
        run=RunDir(run_dir),
        parents=fields.texts("parents"),
        nodes=fields.count("nodes"),
        nproc_per_node=fields.count("nproc_per_node"),
        first_attempt=fields.count("first_attempt"),
        command=command,
        env=env,
        env_names=env_names,
        unset=fields.texts("unset"),
        expect=expect,
        cwd=Path(str(value.get("cwd") or run_dir)),
        max_attempts=_Fields(path, resume).count("max_attempts") if "max_attempts" in resume else None,
        hang_minutes=_Fields(path, resume).number("hang_minutes"),
        container=container_of(path, value.get("container")),
        accelerator=_accelerator(path, value.get("accelerator")),
        devices=fields.count("devices") if value.get("devices") is not None else None,
        exclusive=(exclusive := _options(value).get("exclusive") is True),
        alone=exclusive or not any(name.startswith(_DEVICE_OPTIONS) for name in _options(value)),
    )


# sbatch's options that ask for devices
_DEVICE_OPTIONS = ("gres", "gpus", "tres_per")


def _options(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Slurm was asked for; nothing where it is not ours to know."""
    request = value.get("request")
    options = request.get("options") if isinstance(request, dict) else None
    return options if isinstance(options, dict) else {}


def _accelerator(path: Path, name: object) -> str | None:
    if name is not None and name not in ACCELERATORS:
        raise PkuslurmError(f"job file {path}: accelerator {name!r} is none of {', '.join(ACCELERATORS)}")
    return str(name) if name is not None else None


def container_of(path: Path, value: object) -> Container | None:
    """The container that ``value`` of the job file at ``path`` describes; None: none. Raises PkuslurmError."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PkuslurmError(f"job file {path}: container must be an object, or null")
    fields = _Fields(path, value)
    if (runtime := fields.text("runtime")) not in RUNTIMES:
        raise PkuslurmError(f"job file {path}: container.runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
    return Container(
        runtime=runtime,
        image=fields.text("image"),
        accelerator=fields.text("accelerator"),
        mounts=fields.texts("mounts"),
        if_there=fields.texts("if_there"),
        home=fields.text("home"),
    )


@dataclass(frozen=True)
class _Fields:
    path: Path
    value: Mapping[str, Any]

    def text(self, name: str) -> str:
        word = self.value.get(name)
        if not isinstance(word, str) or not word:
            raise PkuslurmError(f"job file {self.path}: {name} is {word!r}, must be a text")
        return word

    def texts(self, name: str) -> tuple[str, ...]:
        words = self.value.get(name, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise PkuslurmError(f"job file {self.path}: {name} is {words!r}, must be a list of texts")
        return tuple(words)

    def names(self, name: str) -> dict[str, str]:
        words = self.value.get(name, {})
        if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
            raise PkuslurmError(f"job file {self.path}: {name} must map names to strings")
        return words

    def number(self, name: str) -> float | None:
        value = self.value.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise PkuslurmError(f"job file {self.path}: {name} is {value!r}, must be a number over 0, or null")
        return value

    def count(self, name: str) -> int:
        number = self.value.get(name, 1)
        if type(number) is not int or number < 1:
            raise PkuslurmError(f"job file {self.path}: {name} is {number!r}, must be a whole number from 1")
        return number
