"""Where a run's models answer, as long as they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pkuslurm.read.job import JobStatus
from pkuslurm.read.values import moment, number, text, whole
from pkuslurm.rundir import RunDir, read_json


@dataclass(frozen=True)
class Endpoint:
    """What the door has published. ``ends``: the job's time limit; ``notes``: what was not compared, and why."""

    host: str
    port: int
    models: tuple[str, ...]
    engine: str
    node: str
    ends: str | None
    idle_minutes: float | None
    notes: tuple[str, ...]

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    @property
    def page_url(self) -> str:
        return f"http://{self.host}:{self.port}/"


def read(run: RunDir, jobs: Sequence[JobStatus]) -> Endpoint | None:
    """The endpoint of ``run``, if its serve job runs and it is this attempt's: a killed door leaves its file behind."""
    serve = next((job for job in jobs if job.kind == "serve"), None)
    value = read_json(run.endpoint)
    if serve is None or serve.state != "RUNNING" or value is None or whole(value.get("attempt")) != serve.attempt:
        return None
    return parse(value)


def parse(value: dict[str, Any]) -> Endpoint | None:
    """The endpoint that the file's object describes; None: it describes none. The directory may be another user's."""
    host, port, models = text(value.get("host")), whole(value.get("port")), value.get("models")
    if host is None or port is None or not isinstance(models, list) or not models:
        return None
    engine = value.get("engine")
    engine = engine if isinstance(engine, dict) else {}
    notes = value.get("notes")
    return Endpoint(
        host=host,
        port=port,
        models=tuple(str(name) for name in models),
        engine=" ".join(str(engine[name]) for name in ("name", "version", "dtype") if engine.get(name)),
        node=text(value.get("node")) or host,
        ends=moment(value.get("ends")),
        idle_minutes=number(value.get("idle_minutes")),
        notes=tuple(str(note) for note in notes) if isinstance(notes, list) else (),
    )
