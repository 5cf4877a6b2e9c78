"""The door from its job file to its end. Everything that waits does so on other threads; this one watches."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import write_json
from pkuslurm.serve import access, door, endpoint, limits, ready, spec
from pkuslurm.serve.behind import Behind
from pkuslurm.serve.door import Door
from pkuslurm.serve.engines import Engine, Engines
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.folder import folder
from pkuslurm.serve.spec import Spec
from pkuslurm.serve.upstream import ask, listeners

POLL_SECONDS = 0.1
# how often it is said that a model is still being loaded
PATIENCE_SECONDS = 60.0
ANSWER_SECONDS = 30.0
# the largest models load within half an hour from a slow disk; one that hangs must not hold its device to the job's end
LOAD_SECONDS = 3600.0
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def run(job_file: Path, environ: Mapping[str, str]) -> int:
    """Serve until nobody asks any more (0) or a signal comes (128 and its number, as the worker expects it of a command
    that a signal has ended). Raises PkuslurmError for a refusal, Failed where something broke."""
    with _signals() as stop:
        asked = spec.read(job_file)
        key = access.read_key(asked.key_file)
        with suppress(FileNotFoundError):
            asked.ended.unlink()
        host = endpoint.address(asked.bind, environ)
        behind = Behind(key, asked.names, asked.training)
        server = door.bind(host, asked.port, behind)
        try:
            return _serve(asked, server, host, environ, stop)
        finally:
            server.server_close()


class _Stop:
    number: int | None = None


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()

    def remember(number: int, frame: FrameType | None) -> None:
        stop.number = stop.number or number

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(asked: Spec, server: Door, host: str, environ: Mapping[str, str], stop: _Stop) -> int:
    published: dict[str, Any] = {}
    with folder() as place:
        engines: Engines | None = None
        try:
            engines = Engines(asked, place, server.behind.key, environ)
            threading.Thread(target=server.serve_forever, args=(0.5,), daemon=True).start()
            return _watch(asked, server, host, environ, stop, engines, published)
        finally:
            endpoint.remove(asked.endpoint, published)  # first: nobody is to be sent here any more
            if engines is not None:
                engines.end()


def _watch(
    asked: Spec,
    server: Door,
    host: str,
    environ: Mapping[str, str],
    stop: _Stop,
    engines: Engines,
    published: dict[str, Any],
) -> int:
    preparing = _Preparing(asked, engines)
    preparing.start()
    while stop.number is None:
        engines.raise_for_dead()
        if preparing.error is not None:
            time.sleep(POLL_SECONDS)
            engines.raise_for_dead()  # one that broke off is better explained by its end
            raise preparing.error
        if preparing.found is not None and not published:
            found = preparing.found.document()
            tuned = next(one for one in engines.all if one.name == "tuned")
            published |= endpoint.document(asked, host, server.server_port, environ, tuned.chosen, found)
            _open(asked, server, engines, published)
            endpoint.write(asked.endpoint, published)
            say(f"serving {', '.join(asked.names)} at {published['base_url']}")
        if published and asked.idle_seconds is not None and server.behind.activity.idle() > asked.idle_seconds:
            return _idle(asked)
        time.sleep(POLL_SECONDS)
    say(f"stopped by {signal.Signals(stop.number).name}")
    return 128 + stop.number


def _open(asked: Spec, server: Door, engines: Engines, published: Mapping[str, Any]) -> None:
    """From now on questions are answered."""
    behind = server.behind
    behind.limits = {one.name: limits.read(one.path) for one in asked.models}
    behind.engines = {one.name: one.kind for one in engines.all}
    behind.info = {
        "run_id": asked.job.run_id,
        "models": list(asked.names),
        "prompts": [prompt["prompt"] for prompt in asked.prompts],
        "engine": published["engine"],
        "ends": published["ends"],
        "idle_minutes": published["idle_minutes"],
    }
    behind.activity.touch()
    behind.addresses = {one.name: one.address for one in engines.all}  # last: by this the door knows


def _idle(asked: Spec) -> int:
    words = f"nobody has asked for {(asked.idle_seconds or 0) / 60:g} minutes"
    say(f"{words}: it ends, and frees its place")
    try:
        write_json(asked.ended, {"ended": words})
    except OSError as error:
        raise PkuslurmError(f"{asked.ended}: cannot be written: {error.strerror or error}") from None
    return 0


class _Preparing(threading.Thread):
    """Waits for the engines, then checks them: ``found`` or ``error`` tells when it is done."""

    def __init__(self, asked: Spec, engines: Engines, limit: float = LOAD_SECONDS) -> None:
        super().__init__(daemon=True)
        self.began, self.limit = time.monotonic(), limit
        self.asked, self.engines = asked, engines
        self.found: ready.Findings | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for engine in self.engines.all:
                self._await(engine)
            self.found = ready.check(self.asked, self.engines.all, say)
        except Exception as error:  # raised again where it is watched
            self.error = error

    def _await(self, engine: Engine) -> None:
        said = time.monotonic()
        while not (engine.look() and _answers(engine)):
            now = time.monotonic()
            if now - self.began > self.limit:
                raise Failed(
                    f"the engine of {engine.name} ({engine.kind}) has not answered for {self.limit / 60:g} minutes "
                    "since its start: it hangs, or its model loads too slowly"
                )
            if now - said > PATIENCE_SECONDS:
                said = now
                say(f"{engine.name} is still being loaded, since {(now - self.began) / 60:.0f} minutes")
            time.sleep(POLL_SECONDS)


def _answers(engine: Engine) -> bool:
    """Whether it is there. Raises Failed where another user's process has taken its port: that one gets no key."""
    if engine.address.port is not None:
        for table in _TABLES:
            with suppress(OSError):  # there need be no IPv6
                for user in listeners(engine.address.port, table.read_text(encoding="ascii")) - {os.geteuid()}:
                    raise Failed(
                        f"{engine.name}: user {user} has taken port {engine.address.port} of its engine; serve anew"
                    )
    try:
        return ask(engine.address, "GET", "/v1/models", timeout=ANSWER_SECONDS)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def say(line: str) -> None:
    with suppress(OSError):
        print(f"pkuslurm: {line}", file=sys.stderr, flush=True)
