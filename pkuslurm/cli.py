"""python -m pkuslurm VERB [RUN]: what you do with runs that exist. Reading verbs load neither hydra nor submitit."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pkuslurm import __version__
from pkuslurm.errors import PkuslurmError
from pkuslurm.guard import guarded
from pkuslurm.read import find, logs, present, report, status
from pkuslurm.rundir import KINDS, RunDir

NOT_YET = ("retry", "resume", "serve", "chat", "doctor", "fetch", "prune", "watch", "why")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code; prints every refusal as one line."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if argv and argv[0] == "launch":
        from pkuslurm.launch import main as launch

        return launch(argv[1:])
    if argv and argv[0] in NOT_YET:
        raise PkuslurmError(f"{argv[0]}: not yet built; there are runs, status, logs, cancel, report, merge, infer")
    arguments, rest = _parser().parse_known_args(argv)
    # argparse takes no further words after an option: `infer RUN --force prompts=[a]`, `logs RUN -f train`
    if any(word.startswith("-") for word in rest) or (rest and arguments.verb not in ("merge", "infer", "logs")):
        raise PkuslurmError(f"{arguments.verb} {' '.join(rest)}: not understood; {arguments.verb} --help lists all")
    if arguments.verb == "logs" and arguments.run in KINDS and arguments.kind is None:
        arguments.run, arguments.kind = None, arguments.run  # `logs train`: of the newest run
    if arguments.verb == "logs" and rest:
        arguments.kind = rest[0]
    elif rest:
        arguments.settings += rest
    roots = [Path(arguments.run_root).absolute()] if arguments.run_root else None
    if arguments.verb == "runs":
        return _runs(roots, arguments.json)
    if (
        arguments.verb in ("merge", "infer")
        and re.match(r"[\w.]+=", arguments.run or "")
        and not Path(arguments.run).exists()
    ):
        # `infer prompts=…` without RUN: the newest run, and a setting
        arguments.settings.insert(0, arguments.run)
        arguments.run = None
    run = RunDir(find.find(arguments.run, find.roots(roots, os.environ)))
    verbs = {"status": _status, "logs": _logs, "cancel": _cancel, "report": _report, "merge": _again, "infer": _again}
    return verbs[arguments.verb](run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pkuslurm",
        description="What you do with runs that exist. `pkuslurm launch` starts one.",
        epilog="RUN: an id, the beginning of one, a path, or nothing for the newest.",
    )
    parser.add_argument("--version", action="version", version=f"pkuslurm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    helps = {
        "runs": "all runs, newest first",
        "status": "how a run's jobs stand",
        "logs": "what its jobs wrote",
        "cancel": "end it: every job that has not ended becomes CANCELLED",
        "report": "write report.html anew, print its path",
        "merge": "run the merge again",
        "infer": "ask the questions again, or others: infer RUN prompts=[…]",
    }
    for verb, text in helps.items():
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("--run-root", help="look for runs in this folder only")
        if verb != "runs":
            one.add_argument("run", nargs="?", metavar="RUN")
        if verb in ("runs", "status", "logs", "cancel", "report"):
            one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if verb == "status":
            one.add_argument("--exit-code", action="store_true", help="1 if a job failed or an expectation was not met")
        if verb == "logs":
            one.add_argument("kind", nargs="?", help="one kind of job: prepare, train, merge, infer, report")
            one.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
        if verb in ("merge", "infer"):
            one.add_argument("settings", nargs="*", metavar="key=value", help="other settings")
            one.add_argument("--force", action="store_true", help="also where it is complete")
    return parser


def _runs(roots: list[Path] | None, as_json: bool) -> int:
    found = find.list_runs(find.roots(roots, os.environ))
    if as_json:
        print(json.dumps([item.to_json() for item in found], ensure_ascii=False))
    else:
        present.show_runs(found, sys.stdout)
    return 0


def _status(run: RunDir, arguments: argparse.Namespace) -> int:
    now = status.read(run.path)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        present.show_status(now, sys.stdout)
    bad = now.state not in ("COMPLETED", "RUNNING", "PENDING") or now.passed is False
    return 1 if arguments.exit_code and bad else 0


def _logs(run: RunDir, arguments: argparse.Namespace) -> int:
    if arguments.json:
        files = logs.log_files(run, status.read(run.path), arguments.kind)
        print(json.dumps({"run_id": run.run_id, "logs": [str(file) for file in files]}, ensure_ascii=False))
    else:
        logs.show_logs(run.path, sys.stdout, kind=arguments.kind, follow=arguments.follow)
    return 0


def _cancel(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.submit.local import cancel

    cancelled = cancel(run)
    now = status.read(run.path)
    if arguments.json:
        print(json.dumps(now.to_json(), ensure_ascii=False))
    else:
        print(f"{run.run_id}: {now.state}" + ("" if cancelled else " (nothing of it was running)"))
    return 0


def _report(run: RunDir, arguments: argparse.Namespace) -> int:
    try:
        path = report.write(run.path)
    except OSError as error:
        raise PkuslurmError(f"report: {error.filename}: {error.strerror}") from None
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0


def _again(run: RunDir, arguments: argparse.Namespace) -> int:
    from pkuslurm.again import again

    return again(run, arguments.verb, arguments.settings, arguments.force)
