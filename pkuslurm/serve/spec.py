"""What the job file asks of the door, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import read_json
from pkuslurm.serve.requests import Training
from pkuslurm.worker.accelerators import ACCELERATORS
from pkuslurm.worker.job import Job, container_of, load

ENGINES = ("auto", "vllm", "transformers", "llamafactory", "command")
BINDS = ("loopback", "cluster")
FIRST_PORT = 8000
# handed on to the engines as they are
_ENGINES_OWN = ("template", "default_system", "trust_remote_code", "enable_thinking", "engine", "command", "device")


@dataclass(frozen=True)
class Model:
    """``name``: base or tuned, as clients call it."""

    name: str
    path: str


@dataclass(frozen=True)
class Spec:
    """The job, with its engines' container, and the payload of jobs/serve.json.

    ``own``: what every engine is told; ``ended``: where it is written why the door has ended by itself.
    """

    job: Job
    models: tuple[Model, ...]
    own: Mapping[str, Any]
    device: str
    engine: str
    training: Training
    python: str
    payload: str
    key_file: Path
    bind: str
    port: int
    idle_seconds: float | None
    prompts: tuple[Mapping[str, Any], ...]
    infer_result: Path
    answers: Path
    endpoint: Path
    ended: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)


def read(path: Path) -> Spec:
    """The job file at ``path``. Raises PkuslurmError, naming the field, when it cannot be used."""
    job = load(path)
    payload = (read_json(path) or {}).get("payload")
    if not isinstance(payload, dict):
        raise PkuslurmError(f"job file {path}: payload is {payload!r}, must be an object")
    fields = _Fields(path, payload)
    command = fields.words("command")
    engine = fields.one_of("engine", ENGINES)
    if (engine == "command") != bool(command):
        raise PkuslurmError(
            f"job file {path}: payload.command is {command!r}: it goes with engine command, and only so"
        )
    ended = job.expect.get("file")
    return Spec(
        job=replace(job, container=container_of(path, payload.get("container"))),
        models=fields.models(),
        own={name: payload[name] for name in _ENGINES_OWN if name in payload},
        device=fields.one_of("device", tuple(ACCELERATORS)),
        engine=engine,
        training=Training(fields.text_or_none("default_system"), fields.true_or_false("enable_thinking")),
        python=fields.text("python"),
        payload=fields.absolute("payload"),
        key_file=Path(fields.absolute("key_file")),
        bind=fields.one_of("bind", BINDS),
        port=fields.port("port"),
        idle_seconds=fields.minutes("idle_minutes"),
        prompts=fields.prompts(),
        infer_result=Path(fields.absolute("infer_result")),
        answers=Path(fields.absolute("answers")),
        endpoint=Path(fields.absolute("endpoint")),
        ended=Path(ended) if isinstance(ended, str) and Path(ended).is_absolute() else job.run.result(job.kind),
    )


@dataclass(frozen=True)
class _Fields:
    path: Path
    value: Mapping[str, Any]

    def refuse(self, name: str, want: str) -> PkuslurmError:
        return PkuslurmError(f"job file {self.path}: payload.{name} is {self.value.get(name)!r}, must be {want}")

    def text(self, name: str) -> str:
        word = self.value.get(name)
        if not isinstance(word, str) or not word:
            raise self.refuse(name, "a text")
        return word

    def text_or_none(self, name: str) -> str | None:
        return self.text(name) if self.value.get(name) not in (None, "") else None

    def true_or_false(self, name: str) -> bool | None:
        value = self.value.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def absolute(self, name: str) -> str:
        word = self.text(name)
        if not Path(word).is_absolute():
            raise self.refuse(name, "an absolute path")
        return word

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        word = self.value.get(name)
        if word not in known:
            raise self.refuse(name, f"one of {', '.join(known)}")
        return str(word)

    def words(self, name: str) -> list[str]:
        words = self.value.get(name) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise self.refuse(name, "a list of words, or null")
        return words

    def port(self, name: str) -> int:
        number = self.value.get(name)
        if number is None:
            return FIRST_PORT
        if type(number) is not int or not 1 <= number <= 65535:
            raise self.refuse(name, "a port from 1 to 65535, or null")
        return number

    def minutes(self, name: str) -> float | None:
        number = self.value.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or number <= 0):
            raise self.refuse(name, "a number over 0, or null")
        return None if number is None else 60.0 * number

    def models(self) -> tuple[Model, ...]:
        rows = self.value.get("models")
        try:
            models = tuple(Model(str(row["name"]), str(row["path"])) for row in rows or ())
        except (TypeError, KeyError):
            raise self.refuse("models", "a list of objects with name and path") from None
        names = [model.name for model in models]
        if "tuned" not in names or len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise self.refuse("models", "a list with tuned in it, each name once")
        return models

    def prompts(self) -> tuple[Mapping[str, Any], ...]:
        rows = self.value.get("prompts") or []
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows
        ):
            raise self.refuse("prompts", "a list of objects with a prompt")
        return tuple(rows)
