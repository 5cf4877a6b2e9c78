"""What `launch` of one run costs beside importing hydra and submitit: `make bench` writes it into docs/benchmarks.md.

With a Slurm that only answers, so that what is measured is ours and what it takes to start its commands; then on the
test cluster (as root, on Debian). Every job may begin in an hour: nothing runs, and all is cancelled.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.bench import sweep  # noqa: E402
from tests.bench.common import in_turns, median, section, table, versions, written  # noqa: E402

TIMES = 7
REFERENCE = "import hydra, submitit, submitit.slurm.slurm"
PROGRAMS = ("sbatch", "scontrol", "sinfo", "squeue", "scancel", "sacct")
# it is called by each of their names, and notes how long the real one took
COUNT = """\
#!/bin/bash
began=$EPOCHREALTIME
PATH={path} "${{0##*/}}" "$@"
code=$?
echo "${{0##*/}} $began $EPOCHREALTIME" >>{log}
exit $code
"""
BAR = 2.0
HEADS = ("command", "with", "ms", "of it Slurm's commands", "calls", "× the import, without them")


def measure(here: sweep.Place) -> list[list[str]]:
    """The rows of a table: seconds and their ratio to the reference, and how often Slurm is called."""
    python, log = str(here.python), here.folder / "calls"
    words = here.words([], here.runs / "launch")
    commands: dict[str, list[str]] = {
        f'`python -c "{REFERENCE}"`': ["-c", REFERENCE],
        "`launch --cfg job`": ["-m", "pkuslurm.launch", "--cfg", "job"],
        "`launch … dry_run=true`": ["-m", "pkuslurm.launch", *words, "dry_run=true"],
        "`launch …`": ["-m", "pkuslurm.launch", *words],
    }

    def once(name: str) -> list[str]:
        before = len(_lines(log))
        sweep._checked(here, [python, *commands[name]])
        return _lines(log)[before:]

    found = in_turns({name: (lambda name=name: once(name)) for name in commands}, TIMES)
    for answer in sweep._answers(here):
        sweep._checked(here, ["scancel", answer.split()[-1]])
    first = median(next(iter(found.values())))
    rows = []
    for number, (name, pairs) in enumerate(found.items()):
        calls = pairs[0][1]
        slurm = statistics.median(sum(map(_took, lines)) for _, lines in pairs)
        own = median(pairs) - slurm
        told = "" if number else here.told
        numbers = (f"{1000 * median(pairs):.0f}", f"{1000 * slurm:.0f}", str(len(calls)), f"{own / first:.2f}")
        rows.append([name, told, *numbers])
    return rows


def _took(line: str) -> float:
    _, began, ended = line.replace(",", ".").split()
    return float(ended) - float(began)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def counting(here: sweep.Place, path: str) -> sweep.Place:
    """``here``, each Slurm command that is called noted in a file; ``path``: where the real ones are."""
    programs = here.folder / "counting"
    log = here.folder / "calls"
    text = COUNT.format(log=log, path=path)
    sweep._programs(programs, dict.fromkeys(PROGRAMS, text))

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return here.run(["env", f"PATH={programs}:{path}", *command])

    return replace(here, run=run)


HEAD = """\
{written} {versions}. In milliseconds, each command in a process of its own, median of {times}, in turns.
`launch` is of {overrides}: the whole pipeline,
until it returns with everything submitted. The bar is {bar:.0f} times the import, without what Slurm's own commands
take: what is asked before (partitions, devices), an sbatch for each job, whether all are there, the release.

"""


def text() -> str:
    rows = []
    with sweep._without("a Slurm that only answers") as here:
        rows += measure(counting(here, _path_of(here)))
    with sweep.place() as here:
        if here.told.startswith("a real"):
            rows += measure(counting(here, _path_of(here)))
    head = HEAD.format(
        written=written("tests/bench/launch.py"), versions=versions("hydra-core", "submitit"), times=TIMES, bar=BAR,
        overrides=f"`{' '.join(sweep.OVERRIDES)}`",
    )  # fmt: skip
    return head + table(HEADS, rows, 2)


def _path_of(here: sweep.Place) -> str:
    return here.run(["sh", "-c", 'printf %s "$PATH"']).stdout


if __name__ == "__main__":
    section("Launch", text())
