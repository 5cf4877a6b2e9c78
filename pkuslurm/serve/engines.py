"""The engines as processes: started together, their output shown, ended with nothing left behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import read_json
from pkuslurm.serve import sharing
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.requests import ENGINES
from pkuslurm.serve.spec import Model, Spec
from pkuslurm.serve.upstream import Address
from pkuslurm.worker import inside, network
from pkuslurm.worker.devices import count_files
from pkuslurm.worker.guard import VARIABLE, Guard
from pkuslurm.worker.job import Job
from pkuslurm.worker.processes import become_subreaper, end_with, sweep

# the worker gives us 3 s after its TERM; the folder and the endpoint's file must be gone by then
TERM_SECONDS = 2.0
KILL_SECONDS = 5.0
LAST_LINES = 5
# what a payload ends with when it refuses, its words in its last line
_REFUSED = 2
_MARK = "pkuslurm: "
_LONGEST = 1 << 16
# of the worker's own meeting, which is none of the engines'
_NOT_THEIRS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES", "NPROC_PER_NODE")
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Engine:
    """One model's engine. ``last``: its last lines; ``chosen``: what payload/serve.py has chosen, once it has."""

    model: Model
    kind: str
    start: inside.Start
    address: Address
    file: Path
    popen: subprocess.Popen[bytes]
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    reader: threading.Thread | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model.name

    def look(self) -> bool:
        """Whether it has chosen: then it is known where it listens."""
        value = None if self.chosen else read_json(self.file)
        if value is not None:
            self.chosen, self.kind = value, str(value.get("engine"))
            if self.kind not in ENGINES:
                self.kind = "command"  # one that we know nothing of
            if value.get("listens") == "socket":
                self.address = replace(self.address, port=None)
            else:
                self.address = replace(self.address, socket=None)
        return bool(self.chosen)


class Engines:
    """All of them; made on the main thread while it is the only one: a fork knows no other."""

    def __init__(self, spec: Spec, folder: Path, secret: str, environ: Mapping[str, str]) -> None:
        """Start one for each model. ``folder``: of our own, for sockets and what they are told; ``secret``: the door's
        key, which is not to be in what they print. Raises PkuslurmError."""
        become_subreaper()
        self._token = uuid.uuid4().hex
        self._guard = Guard(self._token)
        self._secrets = [secret]
        self.all: list[Engine] = []
        found = sharing.shares(spec.device, len(spec.models), environ, spec.job.devices, count_files)
        seed = os.getpid()
        try:
            for model, share in zip(spec.models, found, strict=True):
                port = network.free_port(seed)
                seed = port - network.FIRST_PORT + 1
                self.all.append(self._start(spec, model, share, folder, port, environ))
        except BaseException:
            self.end()
            raise
        for engine in self.all:
            engine.reader = threading.Thread(target=self._show, args=(engine,), daemon=True)
            engine.reader.start()

    def _start(
        self, spec: Spec, model: Model, share: sharing.Share, folder: Path, port: int, environ: Mapping[str, str]
    ) -> Engine:
        address = Address(secrets.token_urlsafe(32), str(folder / f"{model.name}.sock"), port)
        self._secrets.append(address.key)
        file = folder / f"{model.name}.spec.json"
        chosen = folder / f"{model.name}.json"
        told = dict(spec.own) | {
            **{"name": model.name, "path": model.path, "socket": address.socket, "port": port, "key": address.key},
            **{"share": share.engines, "same_ids": _same_ids(spec.infer_result), "chosen": str(chosen)},
        }
        _write(file, json.dumps({"kind": "serve", "payload": told}, ensure_ascii=False))
        env = {name: value for name, value in environ.items() if name not in _NOT_THEIRS}
        env |= {**share.env, VARIABLE: self._token}
        command = [spec.python, spec.payload, "serve", str(file)]
        start = inside.start(_with(spec.job, folder), command, env, f"{_attempt(environ)}-{model.name}", _WARNINGS)
        return Engine(model, spec.engine, start, address, chosen, _popen(start, spec.job.cwd))

    def _show(self, engine: Engine) -> None:
        """Each line on our stderr, after the model's name."""
        output: IO[bytes] = engine.popen.stdout  # type: ignore[assignment]  # it is a pipe
        while data := output.readline(_LONGEST):
            line = data.decode("utf-8", errors="replace").rstrip("\r\n")
            for secret in self._secrets:
                line = line.replace(secret, "(key)")
            with suppress(OSError, ValueError):
                print(f"[{engine.name}] {line}", file=sys.stderr, flush=True)
            if shown := printable(line.rpartition("\r")[2]).strip():
                engine.last.append(shown)

    def raise_for_dead(self) -> None:
        """Raise Failed, or PkuslurmError where it refused, if one has ended: none of them does so by itself."""
        for engine in self.all:
            if (code := engine.popen.poll()) is not None:
                if engine.reader is not None:
                    engine.reader.join(timeout=1.0)  # its last words may still be in the pipe
                raise dead(engine.name, engine.kind, code, list(engine.last))

    def end(self) -> None:
        """TERM to everything below us, KILL to what is left; what a daemon runs for us ends, too."""
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if not sweep(number, seconds, self._reap, self._guard.pid):
                break
        for engine in self.all:
            inside.end(engine.start)
        self._guard.dismiss()

    def _reap(self) -> None:
        for engine in self.all:
            engine.popen.poll()


def dead(name: str, kind: str, code: int, last: Sequence[str]) -> Exception:
    """What an engine's end means for us; ``code`` as subprocess has it (negative: a signal)."""
    words = next((line for line in reversed(last) if line.startswith(_MARK)), None)
    if code == _REFUSED and words is not None:
        return PkuslurmError(f"the engine of {name}: {words.removeprefix(_MARK)}")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = f"its last lines: {' | '.join(last)}" if last else "it has said nothing"
    return Failed(f"the engine of {name} ({kind}) {how}; {lines}")


def printable(text: str) -> str:
    """``text`` with what a terminal would obey shown instead."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _same_ids(infer_result: Path) -> bool | None:
    """Whether the saved chat template made the same token ids as the training's; None: nobody has looked."""
    equal = (read_json(infer_result) or {}).get("token_ids_equal")
    return equal[0] == equal[1] if isinstance(equal, list) and len(equal) == 2 else None


def _with(job: Job, folder: Path) -> Job:
    """The job with ``folder`` in its container, too."""
    if job.container is None:
        return job
    return replace(job, container=replace(job.container, mounts=(*job.container.mounts, str(folder))))


def _attempt(environ: Mapping[str, str]) -> str:
    return environ.get("PKUSLURM_ATTEMPT") or "1"


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _popen(start: inside.Start, cwd: Path) -> subprocess.Popen[bytes]:
    door = os.getpid()

    def end_with_the_door() -> None:
        for number in _WARNINGS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, start.blocked)
        end_with(door)  # a TERM; whoever does not heed it is killed by the guard

    try:
        return subprocess.Popen(
            start.argv,
            cwd=cwd,
            env=start.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_the_door,
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PkuslurmError(f"cannot start {start.argv[0]!r}: {why}") from None
