"""serve and chat: a run's models behind a key, as a job on its cluster or here, and a talk with them."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shlex
import socket
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm import keys, reach
from pkuslurm.again import recompose
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.plan.inputs import Inputs, Prompt
from pkuslurm.plan.plan import serving
from pkuslurm.preflight.resolve import interpreter
from pkuslurm.preflight.slurm import check_slurm
from pkuslurm.read import endpoint as endpoints
from pkuslurm.read import find, proof, pruned, status
from pkuslurm.read.endpoint import Endpoint
from pkuslurm.read.rules import ENDED
from pkuslurm.read.text import safe
from pkuslurm.render.render import render_serve
from pkuslurm.retry import renew, set_apart
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.submit.attempt_numbers import next_attempt
from pkuslurm.submit.local import run_jobs
from pkuslurm.submit.owner import check_owner, launcher_of
from pkuslurm.worker import marker

KIND = "serve"
COMMAND = command()
# what a run leaves to be decided when it is served
SETTINGS = ("serve", "cluster", "container")
# a look at the files; a question to Slurm, which is asked by everybody
LOOK_SECONDS, ASK_SECONDS = 0.5, 5.0


def serve(run: RunDir, settings: Sequence[str], as_json: bool) -> int:
    """Start the run's endpoint, say how it is reached. Here it goes on until it is stopped. Returns the exit code."""
    from pkuslurm.submit.alone import check_place

    check_owner(run)
    check_place(run)
    document = read_json(run.run_json) or {}
    teller = _Teller(run, as_json)
    if (there := _answering(run)) is not None:
        if settings:
            raise PkuslurmError(f"{run.run_id}: it is served already; for other settings cancel that first")
        teller.tell(there)
        return 0
    on_slurm = document.get("executor") == "slurm"
    if not on_slurm and (running := launcher_of(run, document)) is not None:
        raise PkuslurmError(f"{run.run_id}: it is being worked on (pid {running[0]}); wait, or cancel it first")
    job = _job(run, settings, teller.key_file)
    if on_slurm:
        return _on_slurm(run, job, teller)
    ours: list[Path] = []

    def begin() -> None:
        _begin(run, job)
        ours.append(teller.key_file)

    try:
        return run_jobs(run, (KIND,), _Watcher(run, teller), begin)
    finally:
        for file in ours:  # not the key of another one, who was quicker
            file.unlink(missing_ok=True)


def chat(run: RunDir | None, arguments: argparse.Namespace) -> int:
    """Talk to ``run``'s endpoint, or to the one at --url, on the terminal. Returns the exit code."""
    from pkuslurm import chat as terminal

    if arguments.url is not None:
        place = arguments.key_file or "$OPENAI_API_KEY"
        server = terminal.Server(_v1(arguments.url), keys.given(arguments.key_file), place)
        return terminal.talk(server, terminal.models(server))
    assert run is not None
    check_owner(run)  # the key would be sent to wherever another user's files say
    there = _answering(run)
    if there is None:
        raise PkuslurmError(
            f"{run.run_id}: nothing answers for it now; in another terminal: {COMMAND} serve {run.run_id}"
        )
    file = Path(arguments.key_file) if arguments.key_file else keys.file_of(run, os.environ)
    return terminal.main(there, keys.read(file), run.run_id, str(file))


def _v1(url: str) -> str:
    """An endpoint's URL, also where the page's was given."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in url
    except ValueError:  # a port that is none
        good = False
    if not good:
        raise PkuslurmError(f"--url {url}: no URL of an endpoint, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1"


def newest(places: Sequence[Path]) -> RunDir | None:
    """The newest run of this user's that answers now."""
    for path in find.runs(places):
        run = RunDir(path)
        if run.endpoint.exists() and path.stat().st_uid == os.getuid() and _answering(run) is not None:
            return run
    return None


class _Teller:
    """Says once how the endpoint is reached: to people on stderr, to programs in one line on stdout."""

    def __init__(self, run: RunDir, as_json: bool) -> None:
        self.run = run
        self.key_file = keys.file_of(run, os.environ)
        self.as_json = as_json or not sys.stdout.isatty()
        self.told = False

    def tell(self, there: Endpoint) -> None:
        self.told = True
        here = reach.Here(getpass.getuser(), socket.getfqdn(), os.environ, COMMAND)
        merged = Path(_tuned(self.run) or self.run.merged)
        if self.as_json:
            try:
                print(json.dumps(reach.document(there, self.key_file, here), ensure_ascii=False), flush=True)
            except OSError as error:  # nobody reads it: the models answer all the same
                say(f"stdout: {error.strerror}; what it would have said stands here")
        say(reach.headline(there, self.run.run_id))
        for line in reach.lines(there, self.key_file, merged, self.run.run_id, here):
            say(f"  {line}")
        for note in there.notes:
            say(f"  note: {safe(note)}")
        say(f"  {COMMAND} cancel {shlex.quote(self.run.run_id)} ends it")


def say(line: str) -> None:
    """A line for people; a terminal that went away ends nothing."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class _Watcher:
    """The local executor's: the endpoint is told as soon as it answers."""

    def __init__(self, run: RunDir, teller: _Teller) -> None:
        self.run, self.teller = run, teller

    def started(self, kind: str) -> None:
        say("loading the models; Ctrl-C ends it")

    def tick(self, kind: str) -> None:
        if not self.teller.told and (there := _published(self.run)) is not None:
            self.teller.tell(there)

    def ended(self, kind: str, state: str, reason: str | None) -> None:
        say(_ended(self.run, state, reason))


def _ended(run: RunDir, state: str, reason: str | None) -> str:
    if state == "CANCELLED":
        return f"{run.run_id}: serve was stopped"
    if state == "COMPLETED":
        return f"{run.run_id}: serve has ended by itself: {(read_json(run.result(KIND)) or {}).get('ended', 'done')}"
    log = run.log(KIND, status.read(run.path).job(KIND).job_id or "", 0)  # type: ignore[union-attr]  # it has just been
    return safe(f"{run.run_id}: serve {state}: {reason or 'no reason is known'}; see {log}")


def _published(run: RunDir) -> Endpoint | None:
    """The endpoint of the attempt that is being waited for."""
    value, job = read_json(run.endpoint) or {}, read_json(run.job(KIND)) or {}
    fresh = isinstance(value.get("attempt"), int) and value["attempt"] >= int(job.get("first_attempt") or 1)
    return endpoints.parse(value) if fresh else None


def _answering(run: RunDir) -> Endpoint | None:
    return endpoints.read(run, status.read(run.path).jobs)


def _job(run: RunDir, settings: Sequence[str], key: Path) -> dict[str, Any]:
    """jobs/serve.json for the next attempt. Raises PkuslurmError for what cannot be served, or a wrong setting."""
    full = [item if "." in item.partition("=")[0] else f"{KIND}.{item}" for item in settings]
    for item in full:
        if item.partition(".")[0].lstrip("+~") not in SETTINGS:
            raise PkuslurmError(f"{item}: only serve.…, cluster.… and container.… can be said here")
    asked = _asked(run)
    config = recompose(run, full).config
    launched = (read_json(run.run_json) or {}).get("executor")
    if config.cluster.executor != launched:
        raise PkuslurmError(
            f"cluster.executor={config.cluster.executor}: this run's are {launched}; it is served where it was made"
        )
    inputs = Inputs(
        model_path=asked["tuned"] if "train" not in config.pipeline.jobs else asked["base"],
        template=asked["template"],
        dataset_name="",
        dataset_info={},
        dataset_file="",
        formatting="alpaca",
        prompts=tuple(Prompt(one["prompt"], None, one.get("system")) for one in asked.get("prompts") or ()),
        adapter=None,
        base=asked.get("base"),
        python=interpreter(config),
    )
    plan = serving(config)
    if config.cluster.executor == "slurm":
        check_slurm(plan)
    job = render_serve(plan, inputs, run, sys.executable, str(key))
    return job | {"first_attempt": next_attempt(run, KIND) if run.job(KIND).exists() else 1}


def _asked(run: RunDir) -> Mapping[str, Any]:
    """What the run's infer job asks, or would; refused where there is no whole model to be served."""
    infer = (read_json(run.job("infer")) or {}).get("payload")
    merge = read_json(run.job("merge"))
    if merge is not None and marker.doubt(run, run.run_id, "merge") is not None:
        had = proof.marker_of(run, run.run_id, "merge", pruned.read(run))[0] is not None
        why = "its merged model was pruned" if had else "merge is not complete"
        raise PkuslurmError(f"{run.run_id}: {why}; first: pkuslurm {'merge' if had else 'retry'} {run.run_id}")
    if infer is None and merge is not None:
        payload = merge["payload"]
        infer = {"base": payload["base"], "tuned": payload["merged"], "template": _template(run)}
    if infer is None:
        raise PkuslurmError(f"{run.run_id}: it makes no whole model; launch one with pipeline=train_merge or full")
    if infer.get("tuned_adapter"):
        raise PkuslurmError(f"{run.run_id}: an adapter over a model is asked, not served; merge it first")
    if not Path(infer["tuned"], "config.json").is_file():
        raise PkuslurmError(f"{run.run_id}: its model {infer['tuned']} is not there any more; put it back")
    if infer.get("base") and not Path(infer["base"], "config.json").is_file():
        say(safe(f"the base model {infer['base']} is not there any more: tuned answers alone"))
        infer = {**infer, "base": None}
    return dict(infer)


def _tuned(run: RunDir) -> str | None:
    models = ((read_json(run.job(KIND)) or {}).get("payload") or {}).get("models") or []
    return next((str(one["path"]) for one in models if one.get("name") == "tuned"), None)


def _template(run: RunDir) -> str:
    """The template of a run that asks no questions: as its train.yaml has it, or the YAML of a merge alone."""
    file = run.train_yaml if run.train_yaml.is_file() else run.merge_yaml
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("template:"):
            return line.partition(":")[2].strip().strip("'\"")
    raise PkuslurmError(f"{file}: it names no template")


def _begin(run: RunDir, job: Mapping[str, Any]) -> None:
    """The run's files for the next attempt, once nobody else is at it: who is would lose its key."""
    run.done(KIND).unlink(missing_ok=True)
    run.endpoint.unlink(missing_ok=True)
    keys.make(Path(job["payload"]["key_file"]))
    write_json(run.job(KIND), job)


def _entry(document: dict[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = document["jobs"].setdefault(
        KIND, {"job_id": None, "key": job.get("key"), "parents": job["parents"], "num_nodes": 1}
    )
    entry["first_attempt"] = job["first_attempt"]
    return entry


def _on_slurm(run: RunDir, job: dict[str, Any], teller: _Teller) -> int:
    from pkuslurm.submit import queue, slurm
    from pkuslurm.submit.alone import alone, check_place

    check_place(run)
    with alone(run) as document:
        before = document["jobs"].get(KIND)
        queue.adopt(document)
        living = queue.alive(document)
        if KIND not in living:
            entry = _entry(document, job)
            set_apart(run, document, (KIND,))
            _begin(run, job)
            if before is not None and entry.get("asked"):
                renew(run, entry, KIND, attempt=job["first_attempt"])
            write_json(run.run_json, document)
            slurm.send(run, document, (KIND,))
        job_id = document["jobs"][KIND]["job_id"]
    say(f"{'waiting for' if KIND in living else 'submitted'} serve as {job_id}; Ctrl-C stops waiting, not the job")
    try:
        return _wait(run, teller)
    except KeyboardInterrupt:
        say(f"job {job_id} goes on; {COMMAND} serve {run.run_id} looks again, {COMMAND} cancel {run.run_id} ends it")
        return 130


def _wait(run: RunDir, teller: _Teller) -> int:
    """Until the endpoint answers, or its job has ended."""
    shown = ""
    while True:
        now = status.read(run.path)
        job = now.job(KIND)
        if (there := endpoints.read(run, now.jobs)) is not None:
            teller.tell(there)
            return 0
        if job is not None and job.state in ENDED:
            say(_ended(run, job.state, job.reason))
            return 1
        if job is not None and (line := f"serve {job.state}" + (f": {job.reason}" if job.reason else "")) != shown:
            shown = line
            say(safe(line))
        deadline = time.monotonic() + ASK_SECONDS
        while time.monotonic() < deadline and _published(run) is None:
            time.sleep(LOOK_SECONDS)
