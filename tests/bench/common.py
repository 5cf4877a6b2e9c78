"""What all benchmarks share: this machine in words, runs in turns, and a section each of docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

REPO = Path(__file__).parents[2]
FILE = REPO / "docs" / "benchmarks.md"
HEAD = """\
# Benchmarks

`make bench` measures all of it anew, and each section is written by the script that it names, side by side with what it
is compared to. Seconds depend on the machine; what counts is the ratio.
"""
# how the sections follow each other; any other comes after them
ORDER = ("Commands", "Launch", "Many runs", "Start-up", "Training", "Merges", "Asking", "Sweeps")
Result = TypeVar("Result")


def machine() -> str:
    """This machine, as a reader of the numbers wants to know it."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    cpu = models[0].strip() if models else platform.machine()
    return f"{os.cpu_count()} × {cpu}, Python {platform.python_version()}, Linux {platform.release()}"


def versions(*names: str) -> str:
    """``torch 2.11.0, transformers 5.6.0``: of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def in_turns(
    actions: Mapping[str, Callable[[], Result]], times: int, warm: bool = True
) -> dict[str, list[tuple[float, Result]]]:
    """Every action ``times`` times, one after another, so that a busy moment hits all alike: seconds, result.

    ``warm``: one round before that is not counted (the disk's cache, bytecode).
    """
    found: dict[str, list[tuple[float, Result]]] = {name: [] for name in actions}
    for turn in range(times + warm):
        for name, action in actions.items():
            began = time.perf_counter()
            result = action()
            if turn >= warm:
                found[name].append((time.perf_counter() - began, result))
    return found


def median(pairs: Sequence[tuple[float, object]]) -> float:
    """The median of the seconds that ``in_turns`` found."""
    return statistics.median(seconds for seconds, _ in pairs)


def written(script: str) -> str:
    """The first words of a section: which script (``tests/bench/merge.py``) wrote it, when and where."""
    return f"`python {script}` on {date.today()}: {machine()}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the others numbers."""
    marks = ["---" if number < left else "---:" for number in range(len(head))]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]]) + "\n"


def section(name: str, text: str, file: Path = FILE) -> None:
    """Replace the section ``## name`` of the benchmarks by ``text``, which stands below that heading; print it."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    parts = re.split(r"(?m)^## (.+)\n", before)
    found = dict(zip(parts[1::2], parts[2::2], strict=True)) | {name: text}
    names = sorted(found, key=lambda one: (ORDER.index(one) if one in ORDER else len(ORDER), one))
    bodies = "".join(f"\n## {one}\n\n{found[one].strip()}\n" for one in names)
    file.write_text(HEAD + bodies, encoding="utf-8")
    print(f"## {name}\n\n{text.strip()}\n\n→ {file}", flush=True)
