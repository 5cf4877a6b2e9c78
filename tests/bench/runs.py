"""`runs` and `status` over many runs: `make bench` writes it into docs/benchmarks.md.

Finished runs in one folder and fifty that live in a queue (an squeue that answers at once, and counts), no process in
any; each command in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.bench.common import in_turns, median, section, table, written  # noqa: E402

SIZES = (100, 1000, 10000)
LIVING, TIMES = 50, 5
COMMANDS = {
    "`runs --json`": ["runs", "--json"],
    "`runs`": ["runs"],
    "`status` of the newest": ["status"],
    "`status RUN`": ["status", "20261101-000000"],
}


def measure(folder: Path, count: int) -> list[list[str]]:
    from tests.read.many_runs import counted, finish, living

    root = folder / "runs"
    finish(root, count)
    living(root, LIVING)
    path, log = counted(folder / "programs")
    environ = os.environ | {
        "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "PKUSLURM_RUN_ROOT": str(root), "PATH": path,
        "PYTHONPATH": str(REPO),
    }  # fmt: skip
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    calls: dict[str, int] = {}

    def once(name: str) -> None:
        log.write_text("", encoding="utf-8")
        words = [sys.executable, "-m", "pkuslurm", *COMMANDS[name]]
        subprocess.run(words, env=environ, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, check=True)
        calls[name] = len(log.read_text(encoding="utf-8").splitlines())

    once("`status RUN`")  # bytecode
    shutil.rmtree(folder / "state", ignore_errors=True)
    began = time.perf_counter()
    once("`runs --json`")
    rows = [[f"{count:,}", "`runs --json`, the first time", f"{time.perf_counter() - began:.2f}", "1"]]
    found = in_turns({name: (lambda name=name: once(name)) for name in COMMANDS}, TIMES)
    rows += [["", name, f"{median(pairs):.2f}", str(calls[name])] for name, pairs in found.items()]
    return rows


HEAD = """\
{written} Finished runs beside {living} living ones;
median of {times}, in turns, in seconds. `runs` measures the disk for a second at most, its own time included; the
first time each finished run is read and its proofs are hashed, then only the files that prove it are looked up
(none is opened). The bar is 1.5 s and one call of Slurm for 10,000.

"""


def text() -> str:
    rows = []
    for count in SIZES:
        with tempfile.TemporaryDirectory() as name:
            rows += measure(Path(name), count)
    head = HEAD.format(written=written("tests/bench/runs.py"), living=LIVING, times=TIMES)
    return head + table(("finished runs", "command", "seconds", "calls of Slurm"), rows, 2)


if __name__ == "__main__":
    section("Many runs", text())
