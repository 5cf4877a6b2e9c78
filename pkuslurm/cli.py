"""python -m pkuslurm VERB [RUN]: what you do with runs that exist. Reading verbs load neither hydra nor submitit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from pkuslurm import __version__
from pkuslurm.errors import PkuslurmError
from pkuslurm.guard import guarded

NOT_YET = ("watch", "why")
HELPS = {
    "launch": "start a run: pkuslurm launch key=value …; launch --help",
    "runs": "all runs, newest first, and what they take on the disk",
    "status": "how a run's jobs stand, its settings and where they come from",
    "logs": "what its jobs wrote",
    "cancel": "end it: every job that has not ended becomes CANCELLED",
    "retry": "once more, from where it stood: every job that is not complete",
    "report": "write report.html anew, print its path; --export: a copy without paths and names, to be mailed",
    "merge": "run the merge again",
    "infer": "ask the questions again, or others: infer RUN prompts=[…]",
    "serve": "let its models answer, base and tuned, behind a key: a page, an OpenAI endpoint; serve RUN port=9000",
    "chat": "talk to them on the terminal",
    "fetch": "download a model, from ModelScope or Hugging Face, to where launch finds it: fetch Qwen/Qwen3-0.6B",
    "prune": "show what can be removed from complete runs; --yes removes it",
    "doctor": "what is installed where, which devices and disks are there, what to mend",
}
JSON = ("runs", "status", "logs", "cancel", "report", "serve", "prune", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code; prints every refusal as one line."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if argv and argv[0] == "launch":
        from pkuslurm.launch import main as launch

        return launch(argv[1:])
    if argv and argv[0] == "resume":
        argv = ["retry", *argv[1:]]  # an alias
    if argv and not argv[0].startswith("-"):
        _check_verb(argv[0])
    arguments, rest = _parser().parse_known_args(argv)
    verb: str = arguments.verb
    # argparse takes no further words after an option: `infer RUN --force prompts=[a]`, `logs RUN -f train`
    if any(word.startswith("-") for word in rest) or (
        rest and verb not in ("merge", "infer", "serve", "logs", "prune", "doctor")
    ):
        raise PkuslurmError(f"{verb} {' '.join(rest)}: not understood; {verb} --help lists all")
    # only now, and only this one's: `--help` and a mistyped verb answer at once
    modules = {"prune": "pkuslurm.prune", "doctor": "pkuslurm.doctor", "fetch": "pkuslurm.fetch"}
    module = modules.get(verb, "pkuslurm.verbs")
    run: int = import_module(module).main(arguments, rest)
    return run


def _check_verb(verb: str) -> None:
    if verb in NOT_YET:
        raise PkuslurmError(f"{verb}: not yet built; there are {', '.join(HELPS)}")
    if verb in HELPS:
        return
    import difflib

    near = difflib.get_close_matches(verb, (*HELPS, *NOT_YET), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(HELPS)}"
    if "=" in verb:
        hint = "settings go to launch: pkuslurm launch key=value …"
    raise PkuslurmError(f"{verb}: no such verb; {hint}")


class _Parser(argparse.ArgumentParser):
    """argparse's own mistakes take several lines, and end the process before guard sees them."""

    def error(self, message: str) -> NoReturn:
        words = "a verb is wanted: " + ", ".join(HELPS) if "VERB" in message else message
        verb = "".join(f"{word}: " for word in self.prog.split()[1:])
        raise PkuslurmError(f"{verb}{words}; --help lists all")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pkuslurm",
        description="What you do with runs that exist. `pkuslurm launch` starts one.",
        epilog="RUN: an id, the beginning of one, a path, or nothing for the newest; a point of a sweep: SWEEP/3.",
    )
    parser.add_argument("--version", action="version", version=f"pkuslurm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in HELPS.items():
        one = verbs.add_parser(verb, help=text, description=text)
        if verb not in ("doctor", "fetch"):
            one.add_argument("--run-root", help="look for runs in this folder only")
        if verb == "prune":
            one.add_argument("runs", nargs="*", metavar="RUN", help="these runs; without one: all")
        elif verb not in ("runs", "doctor", "fetch"):
            one.add_argument("run", nargs="?", metavar="RUN")
        if verb in JSON:
            one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        _OWN.get(verb, lambda _: None)(one)
    return parser


def _status(one: argparse.ArgumentParser) -> None:
    one.add_argument("--exit-code", action="store_true", help="1 if a job failed or an expectation was not met")


def _logs(one: argparse.ArgumentParser) -> None:
    one.add_argument("kind", nargs="?", help="one kind of job: prepare, train, merge, infer, report")
    one.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    one.add_argument("--all", action="store_true", help="whole files, not only the last 40 lines of each")


def _report(one: argparse.ArgumentParser) -> None:
    text = "a copy without user names, host names and paths (default: report-export.html in the run's folder)"
    one.add_argument("--export", nargs="?", const="", metavar="FILE.html", help=text)
    one.add_argument("--best", action="store_true", help="of a sweep: print the best point's merged model")
    # what the sweep's own last job adds: sweep.keep_merged
    one.add_argument("--last", action="store_true", help=argparse.SUPPRESS)


def _again(one: argparse.ArgumentParser) -> None:
    one.add_argument("settings", nargs="*", metavar="key=value", help="other settings")
    one.add_argument("--force", action="store_true", help="also where it is complete")


def _serve(one: argparse.ArgumentParser) -> None:
    text = "settings: port=9000 idle_minutes=10 engine=llamafactory, cluster.…, container.…"
    one.add_argument("settings", nargs="*", metavar="key=value", help=text)


def _chat(one: argparse.ArgumentParser) -> None:
    one.add_argument("--url", metavar="URL", help="of another machine's, through a tunnel: http://127.0.0.1:8000/v1")
    one.add_argument(
        "--key-file", metavar="FILE", help="where its key is (default: the run's; with --url $OPENAI_API_KEY)"
    )


def _fetch(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODEL", help="its id, OWNER/NAME, a preset's name, or the address of its page")
    text = "the model's folder (default: OWNER/NAME in $PKUSLURM_MODELS, else in cache_root/models)"
    one.add_argument("--to", metavar="DIR", help=text)
    text = "modelscope (default), huggingface, or a mirror's address; $MODELSCOPE_ENDPOINT and $HF_ENDPOINT are used"
    one.add_argument("--from", dest="source", metavar="HUB", help=text)
    one.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit")
    one.add_argument("--code", action="store_true", help="its *.py too, for model.trust_remote_code=true: read them")


def _prune(one: argparse.ArgumentParser) -> None:
    one.add_argument("--yes", action="store_true", help="remove it; without this it is only shown")
    one.add_argument("--older", type=float, metavar="DAYS", help="only what was not changed for so many days")
    one.add_argument("--merged", action="store_true", help="merged models too: `pkuslurm merge` makes them again")
    text = "tokenized data in the cache too that no run uses (by default: for 7 days)"
    one.add_argument("--cache", action="store_true", help=text)


def _doctor(one: argparse.ArgumentParser) -> None:
    one.add_argument("--python", metavar="PATH", help="the interpreter that has LLaMA-Factory (cluster.python)")
    text = "cluster=NAME …: a short job on two nodes (nodes=1: one) proves that preset"
    one.add_argument("settings", nargs="*", metavar="key=value", help=text)
    one.add_argument("--wait", type=float, metavar="MINUTES", help="how long that job may wait in the queue (10)")
    one.add_argument("--preset", metavar="NAME", help="write cluster=NAME from what this machine's Slurm says")
    one.add_argument("--config-dir", metavar="DIR", help="presets' folder (default: ~/.config/pkuslurm/conf)")


def _merge(one: argparse.ArgumentParser) -> None:
    _again(one)
    text = "no run: a LLaMA-Factory export YAML; its adapter is merged and proved, settings as in launch may follow"
    one.add_argument("--from-yaml", metavar="FILE", help=text)


_OWN = {"status": _status, "logs": _logs, "report": _report, "merge": _merge, "infer": _again} | {
    "serve": _serve,
    "chat": _chat,
    "fetch": _fetch,
    "prune": _prune,
    "doctor": _doctor,
}
