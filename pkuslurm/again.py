"""merge and infer once more, on a run that exists: with the same settings, or with others.

A failed try takes nothing away: what was complete before is complete again afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.read import proof, pruned, report, status
from pkuslurm.read.closing import closing, show_model
from pkuslurm.retry import renew, set_apart
from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.screen import Screen
from pkuslurm.submit.local import run_jobs
from pkuslurm.submit.owner import check_owner
from pkuslurm.worker import marker

if TYPE_CHECKING:
    from pkuslurm.compose import Composed


def again(run: RunDir, kind: str, settings: Sequence[str], force: bool) -> int:
    """Run job ``kind`` of ``run``; a complete one only with ``force`` or other settings. Its exit code."""
    from pkuslurm.submit.alone import check_place

    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.run_id}: this run has no {kind} job")
    check_owner(run)
    check_place(run)
    complete = marker.doubt(run, run.run_id, kind) is None
    gone = pruned.read(run)
    proved = proof.marker_of(run, run.run_id, kind, gone)[0] is not None  # also where prune took what it made
    if complete and not settings and not force:
        print(f"{run.run_id}: {kind} is complete; --force does it again", file=sys.stderr)
        print(run.path)
        return 0
    for parent in job.get("parents") or ():
        if marker.doubt(run, run.run_id, parent) is not None:
            if proof.marker_of(run, run.run_id, parent, gone)[0] is not None:
                raise PkuslurmError(
                    f"{run.run_id}: what {parent} made was pruned; `pkuslurm {parent} {run.run_id}` first"
                )
            raise PkuslurmError(f"{run.run_id}: {kind} needs {parent}, which is not complete")
    texts = _texts(run, kind, settings) if settings else {}
    attempt = status.last_attempt(run.path, kind) + 1
    anew = json.loads(texts.pop(f"jobs/{kind}.json", "null")) or job
    redo = _Redo(run, kind, texts, dict(anew) | {"first_attempt": attempt})
    if (read_json(run.run_json) or {}).get("executor") == "slurm":
        return _on_slurm(redo, keep_old=complete or proved)
    try:
        code = run_jobs(run, (kind,), Screen(run, (kind,)), begin=redo.begin)
    finally:
        redo.end(keep_old=complete or proved)
    if code == 0 and (kept := redo.keep_answers(attempt - 1)):
        print(f"the earlier answers are kept in {kept}", file=sys.stderr)
    if code == 0:
        report.write(run.path)  # it shows the answers and proofs that have just changed
    elif complete:
        print(f"{run.run_id}: the earlier {kind} stays as it was", file=sys.stderr)
    if code == 0 and kind == "merge":
        show_model(run, status.read(run.path), sys.stderr)
    passed = closing(run, sys.stderr) if kind == "infer" and code == 0 else None
    print(run.path)
    return 1 if code == 0 and passed is False else code


def _on_slurm(redo: _Redo, keep_old: bool) -> int:
    """Submitted under its next key; the report is written anew by `pkuslurm report` when it has ended."""
    from pkuslurm.submit import queue, slurm
    from pkuslurm.submit.alone import alone

    run, kind = redo.run, redo.kind
    with alone(run) as document:
        queue.adopt(document)
        if kind in (living := queue.alive(document)):
            raise PkuslurmError(
                f"{run.run_id}: {kind} ({living[kind]}) still waits or runs; let it end, or cancel it first"
            )
        set_apart(run, document, (kind,))
        redo.begin()
        renew(run, document["jobs"][kind], kind, attempt=redo.attempt)
        document["cancelled"] = None
        write_json(run.run_json, document)
        try:
            slurm.send(run, document, (kind,))
        except slurm.Refused:
            redo.end(keep_old)  # nothing of it is in the queue
            raise
    print(f"submitted {kind} as {document['jobs'][kind]['job_id']}", file=sys.stderr)
    print(run.path)
    return 0


@dataclass
class _Redo:
    """The change of a run's files for another try, made once the run is ours, and taken back where it failed."""

    run: RunDir
    kind: str
    texts: dict[str, str]
    job: dict[str, object]
    before: dict[Path, str] = field(default_factory=dict)
    answers: str | None = None

    @property
    def attempt(self) -> int:
        return int(str(self.job["first_attempt"]))

    @property
    def _aside(self) -> Path:
        return self.run.done(self.kind).with_name(f".{self.kind}.before.json")

    def begin(self) -> None:
        if self._aside.exists() and not self.run.done(self.kind).exists():
            os.replace(self._aside, self.run.done(self.kind))  # a try before this one was killed
        changed = [self.run.path / name for name in self.texts]
        for file in (*changed, self.run.job(self.kind), self.run.state(self.kind), self.run.run_json):
            with suppress(OSError, UnicodeDecodeError):
                self.before[file] = file.read_text(encoding="utf-8")
        if self.kind == "infer":
            with suppress(OSError, UnicodeDecodeError):
                self.answers = self.run.answers.read_text(encoding="utf-8")
        for name, text in self.texts.items():
            write_text(self.run.path / name, text)
        write_json(self.run.job(self.kind), self.job)
        with suppress(FileNotFoundError):
            os.replace(self.run.done(self.kind), self._aside)

    def keep_answers(self, attempt: int) -> Path | None:
        """Answers that this try has replaced by others stay beside them, under the number of their attempt."""
        if self.answers is None or self.answers == self.run.answers.read_text(encoding="utf-8"):
            return None
        kept = self.run.answers.with_name(f"answers.{attempt}.jsonl")
        write_text(kept, self.answers)
        return kept

    def end(self, keep_old: bool) -> None:
        """``keep_old``: there was a complete result before, which a failed try must leave as it was."""
        if keep_old and self._aside.exists() and not self.run.done(self.kind).exists():
            document = read_json(self.run.run_json) or {}
            ours = json.loads(self.before.get(self.run.run_json, "{}")).get("launcher")
            if document.get("launcher") not in (None, ours):
                return  # somebody else has the run now (owner.Replaced)
            for file, text in self.before.items():
                write_text(file, text)
            document = read_json(self.run.run_json) or {}
            write_json(self.run.run_json, document | {"launcher": None})
            os.replace(self._aside, self.run.done(self.kind))
        with suppress(FileNotFoundError):
            self._aside.unlink()


def _texts(run: RunDir, kind: str, settings: Sequence[str]) -> dict[str, str]:
    """The files that other settings change: the job's, config.yaml, merge.yaml."""
    from pkuslurm.plan.plan import plan
    from pkuslurm.preflight.resolve import resolve
    from pkuslurm.render.render import render

    full = [item if "." in item.partition("=")[0] else f"{kind}.{item}" for item in settings]
    for item in full:
        if not item.startswith(f"{kind}."):
            raise PkuslurmError(f"{item}: only {kind}.… can be changed here; launch a new run for the rest")
    composed = recompose(run, full)
    config = composed.config
    steps = plan(config)
    files = render(steps, resolve(config, os.environ, lenient=False), run, composed.yaml, sys.executable)
    names = ["config.yaml", f"jobs/{kind}.json", *(["merge.yaml"] if kind == "merge" else [])]
    return {name: files.texts[name] for name in names}


def recompose(run: RunDir, settings: Sequence[str]) -> Composed:
    """The run's configuration with other ``settings``, as composed. Raises PkuslurmError."""
    from pkuslurm.compose import reload

    try:
        kept = run.config_yaml.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise PkuslurmError(f"{run.config_yaml}: it cannot be read, so other settings cannot be put to it") from None
    document = read_json(run.run_json) or {}
    with suppress(OSError, TypeError):
        os.chdir(document.get("cwd") or ".")  # relative paths in config.yaml start where the run was launched
    composed = reload(kept, settings)
    return replace(composed, config=replace(composed.config, cache_root=absolute(composed.config.cache_root)))
