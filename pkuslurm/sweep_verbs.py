"""The verbs over a whole sweep."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import sweep as reading
from pkuslurm.rundir import RunDir
from pkuslurm.sweepdir import SweepDir

Verb = Callable[[SweepDir, argparse.Namespace], int]


def main(home: SweepDir, arguments: argparse.Namespace) -> int:
    """Do ``arguments.verb`` to the sweep. Returns the exit code."""
    verb: str = arguments.verb
    if verb not in _VERBS:
        raise PkuslurmError(f"{verb} {home.sweep_id}: this is a sweep; name one of its points, {home.sweep_id}/0")
    return _VERBS[verb](home, arguments)


def _status(home: SweepDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.read.present_sweep import show_sweep

    now = reading.read(home.path)
    if any((job.reason or "").startswith("BeginTime") for run in now.runs for job in run.jobs):
        from pkuslurm.submit.queue import lift

        for number, run in enumerate(now.runs):
            lift(home.point(number), run)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        show_sweep(now, sys.stdout)
    bad = now.state not in ("COMPLETED", "RUNNING", "PENDING") or any(run.passed is False for run in now.runs)
    return 1 if arguments.exit_code and bad else 0


def _logs(home: SweepDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.read import logs

    if arguments.follow:
        raise PkuslurmError(
            f"logs --follow: one of its points, {home.sweep_id}/0; wait=true or status follow the sweep"
        )
    logs.show_sweep_logs(home.path, sys.stdout, kind=arguments.kind, whole=arguments.all)
    return 0


def _cancel(home: SweepDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.sweep import cancel

    cancelled = cancel(home)
    now = reading.read(home.path)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        print(f"{home.sweep_id}: {now.state}" + ("" if cancelled else " (nothing of it was running)"))
    return 0


def _retry(home: SweepDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.sweep import retry

    return retry(home)


def _report(home: SweepDir, arguments: argparse.Namespace) -> int:
    from pkuslurm import keep
    from pkuslurm.read.report import sweep_page

    if arguments.export is not None:
        raise PkuslurmError(f"--export: only of a single run; {command('report', f'{home.sweep_id}/0', '--export')}")
    now = reading.read(home.path)
    if arguments.best:
        path: Path = keep.best_folder(now)
        print(json.dumps({"merged": str(path)}, ensure_ascii=False) if arguments.json else path)
        return 0
    try:
        if arguments.last:
            for line in keep.keep_merged(now):
                print(line, file=sys.stderr)
            now = reading.read(home.path)
            _keep_versions(home, now)
        path = sweep_page.write(now)
    except OSError as error:
        raise PkuslurmError(f"report: {error.filename}: {error.strerror}") from None
    print(json.dumps({"report": str(path)}, ensure_ascii=False) if arguments.json else path)
    return 0


def _keep_versions(home: SweepDir, now: reading.SweepStatus) -> None:
    """As the sweep's last job: nothing else writes its points' run.json now."""
    from pkuslurm.submit.installed import keep

    if now.document.get("executor") == "slurm":
        keep(home.own, [RunDir(run.path) for run in now.runs])


_VERBS: dict[str, Verb] = {
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "retry": _retry,
    "report": _report,
}
