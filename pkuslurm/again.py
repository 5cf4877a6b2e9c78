"""merge and infer once more, on a run that exists: with the same settings, or with others."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import report, status
from pkuslurm.read.closing import closing
from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.screen import Screen
from pkuslurm.submit.local import run_jobs
from pkuslurm.worker import marker


def again(run: RunDir, kind: str, settings: Sequence[str], force: bool) -> int:
    """Run job ``kind`` of ``run``; a complete one only with ``force`` or other settings. Its exit code."""
    job = read_json(run.job(kind))
    if job is None:
        raise PkuslurmError(f"{run.run_id}: this run has no {kind} job")
    if run.path.stat().st_uid != os.getuid():
        raise PkuslurmError(f"{run.run_id}: it belongs to another user; its jobs are not run by you")
    complete = marker.doubt(run, run.run_id, kind) is None
    if complete and not settings and not force:
        print(f"{run.run_id}: {kind} is complete; --force does it again", file=sys.stderr)
        print(run.path)
        return 0
    for parent in job.get("parents") or ():
        if marker.doubt(run, run.run_id, parent) is not None:
            raise PkuslurmError(f"{run.run_id}: {kind} needs {parent}, which is not complete")
    last = status.last_attempt(run.path, kind)
    anew = dict(_with(run, kind, settings)) if settings else job
    write_json(run.job(kind), anew | {"first_attempt": last + 1})
    aside = run.done(kind).with_name(f".{kind}.before.json")
    with suppress(FileNotFoundError):
        os.replace(run.done(kind), aside)
    code = run_jobs(run, (kind,), Screen(run, (kind,)))
    if code != 0 and complete and not run.done(kind).exists():
        os.replace(aside, run.done(kind))  # what was there is whole still: the failed try took nothing away
    with suppress(FileNotFoundError):
        aside.unlink()
    if code == 0:
        report.write(run.path)  # it shows the answers and proofs that have just changed
    passed = closing(run, sys.stderr) if kind == "infer" and code == 0 else None
    print(run.path)
    return 1 if code == 0 and passed is False else code


def _with(run: RunDir, kind: str, settings: Sequence[str]) -> Mapping[str, Any]:
    """The job file for other settings; what belongs to it (config.yaml, merge.yaml) is written too."""
    from pkuslurm.compose import reload
    from pkuslurm.plan.plan import plan
    from pkuslurm.preflight.resolve import resolve
    from pkuslurm.render.render import render

    full = [item if "." in item.partition("=")[0] else f"{kind}.{item}" for item in settings]
    for item in full:
        if not item.startswith(f"{kind}."):
            raise PkuslurmError(f"{item}: only {kind}.… can be changed here; launch a new run for the rest")
    document = read_json(run.run_json) or {}
    os.chdir(document.get("cwd") or ".")  # relative paths in config.yaml start where the run was launched
    try:
        kept = run.config_yaml.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise PkuslurmError(f"{run.config_yaml}: it cannot be read, so other settings cannot be put to it") from None
    composed = reload(kept, full)
    config = replace(composed.config, cache_root=os.path.abspath(os.path.expanduser(composed.config.cache_root)))
    steps = plan(config)
    files = render(steps, resolve(config, os.environ, lenient=False), run, composed.yaml, sys.executable)
    for name in ("config.yaml", *(["merge.yaml"] if kind == "merge" else [])):
        write_text(run.path / name, files.texts[name])
    return files.jobs[kind]
