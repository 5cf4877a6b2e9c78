"""How long the commands take to answer: `make bench` writes it into docs/benchmarks.md.

Each in a process of its own, ten times, in turns (so that a busy moment hits all alike); minimum and median, and the
median's ratio to a Python that does nothing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.bench.common import section, written  # noqa: E402

TIMES = 10
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "pkuslurm --help": ["-m", "pkuslurm", "--help"],
    "pkuslurm runs --json": ["-m", "pkuslurm", "runs", "--json"],
    "pkuslurm runs": ["-m", "pkuslurm", "runs"],
    "pkuslurm status": ["-m", "pkuslurm", "status"],
    "pkuslurm doctor": ["-m", "pkuslurm", "doctor"],
    "pkuslurm launch --help": ["-m", "pkuslurm", "launch", "--help"],
    "pkuslurm launch --cfg job": ["-m", "pkuslurm", "launch", "--cfg", "job"],
}


def measure(times: int = TIMES) -> dict[str, list[float]]:
    """Seconds of each command, ``times`` times; with twenty runs for those that list them."""
    from tests.read.fake_run import finished

    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number in range(20):
            finished(root / "runs", run_id=f"20261124-2010{number:02d}-tiny-identity-00{number:02d}")
        environ = os.environ | {"HOME": name, "PKUSLURM_RUN_ROOT": str(root / "runs"), "PYTHONPATH": str(REPO)}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every start compiles what it imports
        for turn in range(times + 1):
            for command, words in COMMANDS.items():
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *words], env=environ, cwd=name, capture_output=True, stdin=subprocess.DEVNULL
                )
                if turn:  # the first one warms the disk's cache and writes bytecode
                    found[command].append(time.perf_counter() - began)
                if done.returncode != 0 and "doctor" not in command:
                    raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr.decode()}")
    return found


def table(found: dict[str, list[float]]) -> str:
    """The Markdown."""
    nothing = statistics.median(next(iter(found.values())))
    lines = ["| command | min (ms) | median (ms) | × python -c pass |", "|---|---:|---:|---:|"]
    for name, seconds in found.items():
        median = statistics.median(seconds)
        lines.append(f"| `{name}` | {1000 * min(seconds):.0f} | {1000 * median:.0f} | {median / nothing:.1f} |")
    return "\n".join(lines)


HEAD = """\
{written} Each command in a process of its own, {times} times, in turns; what
counts is the ratio to a Python that does nothing, in the same run. `runs` and `status` look at twenty runs.

"""


if __name__ == "__main__":
    section("Commands", HEAD.format(written=written("tests/bench/startup.py"), times=TIMES) + table(measure()))
