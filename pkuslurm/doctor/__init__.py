"""doctor: what is installed where, which devices and disks are there, what stands in the way, and how to mend it.

``doctor cluster=NAME`` tries that preset on real nodes (trial); ``doctor --preset NAME`` writes one (preset).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pkuslurm.doctor import interpreter, places, site, software
from pkuslurm.doctor.check import Check
from pkuslurm.errors import PkuslurmError
from pkuslurm.read.text import safe, width

NO_TRAINER = "launch refuses with this Python, which has no LLaMA-Factory; name one that has it: cluster.python=PATH"


def main(arguments: argparse.Namespace, rest: Sequence[str] = ()) -> int:
    """The verb. Returns 1 if something that pkuslurm needs is missing, else 0."""
    words = [*arguments.settings, *rest]
    directory = Path(arguments.config_dir) if arguments.config_dir else None
    _check_words(arguments, words)
    if arguments.preset:
        from pkuslurm.doctor import preset

        preset.say(preset.write(arguments.preset, directory, os.environ), arguments.preset)
        return 0
    if words:
        from pkuslurm.doctor import trial  # hydra and submitit, which doctor alone does without

        if arguments.python:
            words.append(f"cluster.python={arguments.python}")
        wait = trial.WAIT_MINUTES if arguments.wait is None else arguments.wait
        checks = trial.examine(words, os.environ, wait, [directory] if directory else [])
    else:
        checks = examine(os.environ, arguments.python)
    if arguments.json:
        print(json.dumps([check.to_json() for check in checks], ensure_ascii=False))
    else:
        untrained = any(check.check == software.TRAINER and not check.ok for check in checks)
        good = NO_TRAINER if untrained else "everything that pkuslurm needs is here"
        _show(checks, *(("a run can start there", "not right") if words else (good, "missing")))
    return 1 if any(check.needed and not check.ok for check in checks) else 0


def _check_words(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    bare = next((word for word in words if "=" not in word and not word.startswith("~")), None)
    if bare is not None:
        raise PkuslurmError(f"doctor {bare}: settings are key=value; did you mean cluster={bare}?")
    if arguments.preset and words:
        raise PkuslurmError(
            f"doctor --preset {arguments.preset} {words[0]}: --preset takes no settings; change its file"
        )
    if arguments.wait is not None and not 0 <= arguments.wait < 100_000:
        raise PkuslurmError(f"--wait {arguments.wait:g}: minutes, 0 or more")
    if not words and arguments.wait is not None:
        raise PkuslurmError("--wait: it belongs to doctor cluster=NAME")


def examine(environ: Mapping[str, str], program: str | None = None) -> list[Check]:
    """Everything that is looked at, in the order to read it."""
    chosen = places.defaults(environ)
    named = program or places.python(environ, chosen)
    python = interpreter.look(shutil.which(named) or os.path.expanduser(named)) if named else interpreter.own()
    groups: tuple[Callable[[], Iterator[Check]], ...] = (
        software.own,
        lambda: software.training(python, named, environ),
        site.hardware,
        lambda: site.programs(environ),
        lambda: places.folders(environ, chosen),
        lambda: site.surroundings(environ),
    )
    return [check for group in groups for check in group()]


def _show(checks: list[Check], good: str, wrong: str) -> None:
    try:
        marks = {"good": "✓", "bad": "✗", "note": "!"}
        "✓✗".encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        marks = {"good": "ok", "bad": "NO", "note": "!"}
    wide = max(len(check.check) for check in checks)
    # a file or a pipe gets each check on one line
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for check in checks:
        mark = marks["good" if check.ok else "bad" if check.needed else "note"]
        print(_hanging(f"{mark:<2} {check.check:<{wide}}  ", safe(check.detail), columns))
        if check.remedy:
            print(_hanging(f"   {'':<{wide}}  -> ", safe(check.remedy), columns))
    bad = [check.check for check in checks if check.needed and not check.ok]
    notes = sum(not check.ok and not check.needed for check in checks)
    told = f"{wrong}: {', '.join(bad)}" if bad else good
    print(f"{told}" + (f"; {notes} note{'s' if notes > 1 else ''}" if notes else ""))


def _hanging(before: str, text: str, columns: int) -> str:
    """``text`` behind ``before``, what does not fit into ``columns`` (0: all does) below its beginning."""
    room = columns - len(before) if columns > len(before) + 20 else width(text)
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip(" ")
        if lines[-1] and width(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return before + f"\n{'':<{len(before)}}".join(lines)
