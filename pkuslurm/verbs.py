"""The verbs over one run or over the list of runs: what the command line asked for, done, printed."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pkuslurm import sweep_verbs
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import endpoint, find, present, status
from pkuslurm.rundir import KINDS, RunDir, read_json
from pkuslurm.sweepdir import SweepDir, is_sweep
from pkuslurm.worker.unpack import unpack

ACTING = ("cancel", "retry", "merge", "infer", "serve")


def main(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Do ``arguments.verb``; ``rest``: words that argparse left over. Returns the exit code."""
    verb: str = arguments.verb
    if verb == "logs" and arguments.run in KINDS and arguments.kind is None:
        arguments.run, arguments.kind = None, arguments.run  # `logs train`: of the newest run
    if verb == "logs" and rest:
        arguments.kind = rest[0]
    elif rest:
        arguments.settings += rest
    if verb == "merge" and arguments.from_yaml is not None:
        from pkuslurm.merging import merge_yaml

        return merge_yaml(arguments.from_yaml, filter(None, [arguments.run, *arguments.settings]), arguments.run_root)
    places = roots(arguments)
    if verb == "runs":
        return _runs(places, arguments)
    if verb == "chat" and (arguments.url is not None or arguments.run is None):
        from pkuslurm import serving

        served = None if arguments.url is not None else serving.newest(places)
        if arguments.url is not None or served is not None:
            return serving.chat(served, arguments)
    if (
        verb in ("merge", "infer", "serve")
        and re.match(r"[\w.]+=", arguments.run or "")
        and not os.path.lexists(arguments.run)
    ):
        # `infer prompts=…` without RUN: the newest run, and a setting
        arguments.settings.insert(0, arguments.run)
        arguments.run = None
    if verb == "report" and arguments.run is None and arguments.export and not _is_page(arguments.export):
        arguments.run, arguments.export = arguments.export, ""  # `report --export RUN`
    run = RunDir(find.find(arguments.run, places, find.memory(os.environ)))
    find.check(run.path)
    if verb in ACTING and arguments.run is None and not getattr(arguments, "json", False):
        # the newest may lie in another folder than one thinks
        print(f"newest run: {present.safe(run.path)}", file=sys.stderr)
    if is_sweep(run.path):
        return sweep_verbs.main(SweepDir(run.path), arguments)
    if verb == "report" and (arguments.best or arguments.last):
        raise PkuslurmError(f"report --best: {run.run_id} is a single run; name a sweep")
    if verb in ACTING and run.path.stat().st_uid == os.getuid():
        unpack(run)
    verbs = {"status": _status, "logs": _logs, "cancel": _cancel, "report": _report, "merge": _again, "infer": _again}
    verbs |= {"retry": _retry, "serve": _serve, "chat": _chat}
    return verbs[verb](run, arguments)


def roots(arguments: argparse.Namespace) -> list[Path]:
    """Where the command line, the environment and memory say that runs are."""
    given = [Path(arguments.run_root).absolute()] if arguments.run_root else None
    return find.roots(given, os.environ)


def _runs(places: Sequence[Path], arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    found = find.list_runs(places, find.memory(os.environ))
    if arguments.json:
        print(json.dumps([item.to_json() for item in found], ensure_ascii=False))
    else:
        present.show_runs(found, sys.stdout, began)
        if not found and arguments.run_root is None and find.state_file(os.environ) is None:
            print("HOME is not set, so no launch is remembered here: name the folder of runs with --run-root")
    return 0


def _status(run: RunDir, arguments: argparse.Namespace) -> int:
    now = status.read(run.path)
    if any((job.reason or "").startswith("BeginTime") for job in now.jobs):
        from pkuslurm.submit.queue import lift

        lift(run, now)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        present.show_status(now, sys.stdout)
        if (there := endpoint.read(run, now.jobs)) is not None:
            told = f"served at {there.page_url}; {command('serve', run.run_id)} tells how to reach it"
            print(f"\n{present.safe(told)}")
    bad = now.state not in ("COMPLETED", "RUNNING", "PENDING") or now.passed is False
    return 1 if arguments.exit_code and bad else 0


def _logs(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.read import logs

    if arguments.json:
        files = logs.log_files(run, status.read(run.path), arguments.kind)
        print(json.dumps({"run_id": run.run_id, "logs": [str(file) for file in files]}, ensure_ascii=False))
    else:
        logs.show_logs(run.path, sys.stdout, kind=arguments.kind, follow=arguments.follow, whole=arguments.all)
    return 0


def _cancel(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.submit.alone import check_original
    from pkuslurm.submit.owner import check_owner

    check_owner(run)
    check_original(run)
    if (read_json(run.run_json) or {}).get("executor") == "slurm":
        from pkuslurm.submit.queue import cancel
    elif run.is_point:
        from pkuslurm.submit.local_sweep import cancel_point as cancel
    else:
        from pkuslurm.submit.owner import cancel

    served = endpoint.read(run, status.read(run.path).jobs) is not None
    cancelled = cancel(run)
    now = status.read(run.path)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        said = " (it is no longer served)" if served else "" if cancelled else " (nothing of it was running)"
        print(f"{run.run_id}: {now.state}{said}")
    return 0


def _retry(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.retry import retry

    return retry(run)


def _report(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.read import report

    if os.environ.get("PKUSLURM_ATTEMPT") and (read_json(run.run_json) or {}).get("executor") == "slurm":
        from pkuslurm.submit.installed import keep

        keep(run, [run])  # as the run's last job: nothing else writes run.json now
    try:
        if arguments.export is None:
            path = report.write(run.path)
        else:
            path = _export_file(run, arguments.export)
            report.export(run.path, path)
    except OSError as error:
        raise PkuslurmError(f"report: {error.filename}: {error.strerror}") from None
    print(json.dumps({"report": str(path)}, ensure_ascii=False) if arguments.json else path)
    return 0


def _export_file(run: RunDir, given: str) -> Path:
    if not given:
        return run.report.with_name("report-export.html")
    if not _is_page(given):
        raise PkuslurmError(f"--export {given}: it writes a page; give a name that ends in .html")
    return Path(given).expanduser().absolute()


def _is_page(name: str) -> bool:
    return name.lower().endswith((".html", ".htm")) and not os.path.isdir(name)


def _again(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.again import again

    _check_settings(arguments.settings)
    return again(run, arguments.verb, arguments.settings, arguments.force)


def _serve(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.serving import serve

    _check_settings(arguments.settings)
    return serve(run, arguments.settings, arguments.json)


def _chat(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.serving import chat

    return chat(run, arguments)


def _check_settings(settings: Sequence[str]) -> None:
    stray = next((item for item in settings if "=" not in item and not item.startswith("~")), None)
    if stray is not None:
        raise PkuslurmError(
            f"{stray}: RUN comes first, and a setting is typed as key=value; one with spaces needs quotes: "
            "'prompts=[Who am I?]'"
        )
