"""What a sweep costs before anything runs: `make bench` writes it into docs/benchmarks.md, under its own heading.

`launch -m` beside a loop that launches each point by itself, both on the test cluster (as root, on Debian), else with
an sbatch that only answers. Every job may begin in an hour: nothing runs, and all is cancelled after it was counted.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.bench.common import section, written  # noqa: E402

SIZES = (10, 100, 1000)
LOOPS = (10, 100)  # a thousand launches, one by one, would take a quarter of an hour; ten times a hundred is told
TIMES = 3
OVERRIDES = ("cluster=ascend", "cluster.accelerator=cpu", "model=tiny", "nodes=2")
LATER = "cluster.extra.begin=now+1hour"
PARTS = ("compose", "check", "write")
BAR = 10.0  # ms a point for all three together

SBATCH = """\
#!/bin/sh
answer=$({real} "$@") || exit
echo "$answer"
echo "$answer" >>{log}
"""
# a cluster that takes everything, and knows what it took
FAKES = {
    "sbatch": (
        'id=$(( $(wc -l <"{log}") + 1 )); for script; do :; done; '
        """echo "$id|PENDING|N/A|N/A||$(id -un)|None|$(sed -n 's/^#SBATCH --job-name=//p' "$script")" >>{log}.queue; """
        'echo "Submitted batch job $id"'
    ),
    "squeue": "cat {log}.queue",
    "scontrol": (
        "case $2 in config) echo 'MaxArraySize = 1001' ;; partition) echo "
        "'PartitionName=npu Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4' ;; esac"
    ),
    **dict.fromkeys(("scancel", "sinfo"), ":"),
}


@dataclass(frozen=True)
class Place:
    """Where it is measured. ``run``: a command as who launches; ``log``: what sbatch answered, line by line."""

    told: str
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
    python: Path
    source: Path
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "sbatch.log"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def words(self, rates: Sequence[str], at: Path) -> list[str]:
        return [*OVERRIDES, LATER, f"run_root={at}", f"cache_root={self.folder}/cache", *rates]


@dataclass(frozen=True)
class Cost:
    seconds: float
    sbatch: int
    files: int
    size: int


@contextmanager
def place() -> Iterator[Place]:
    """The test cluster, where it can be had."""
    from tests.cluster.up import lacking

    if lacks := lacking():
        with _without(f"an sbatch that only answers (a real one needs {'; '.join(lacks)})") as fake:
            yield fake
        return
    from tests.cluster.fixture import cluster

    with cluster() as slurm:
        folder, programs = slurm.shared("pkalice") / f"bench-{os.getpid()}", slurm.shared("common") / "bench"
        slurm.run("pkalice", ["mkdir", str(folder)])
        _programs(programs, {"sbatch": SBATCH.format(real=shutil.which("sbatch"), log=folder / "sbatch.log")})
        env = {"PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        version = slurm.ask("sbatch", "--version").split()[-1]
        try:
            yield Place(
                f"a real Slurm {version} on the same machine",
                lambda command: slurm.run("pkalice", command, env=env, timeout=None),
                slurm.python,
                slurm.source,
                folder,
            )
        finally:
            for left in (folder, programs):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _without(told: str) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, fakes = folder / "sbatch.log", folder / "fakes"
        log.touch()
        texts = {program: "#!/bin/sh\n" + text.replace("{log}", str(log)) + "\n" for program, text in FAKES.items()}
        _programs(fakes, texts)
        _programs(folder / "programs", {"sbatch": SBATCH.format(real=fakes / "sbatch", log=log)})
        path = f"{folder / 'programs'}:{fakes}:{os.environ['PATH']}"
        env = os.environ | {"HOME": name, "PATH": path, "PYTHONPATH": str(REPO)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)

        def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command, env=env, cwd=name, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL
            )

        yield Place(told, run, Path(sys.executable), REPO, folder)


def _programs(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(mode=0o755, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def rates(count: int) -> list[str]:
    return [f"{number}e-6" for number in range(1, count + 1)]


def swept(here: Place, count: int) -> Cost:
    """One `launch -m`."""
    words = here.words([f"train.learning_rate={','.join(rates(count))}"], here.runs / f"sweep-{count}")
    return _cost(here, [str(here.python), "-m", "pkuslurm.launch", "-m", *words], here.runs / f"sweep-{count}")


def one_by_one(here: Place, count: int) -> Cost:
    """A shell's loop."""
    words = here.words([], here.runs / f"loop-{count}")
    body = 'python=$1; shift; n=$1; shift; while [ "$n" -gt 0 ]; do "$python" -m pkuslurm.launch "$@" '
    loop = body + '"train.learning_rate=${n}e-6" >/dev/null || exit; n=$((n - 1)); done'
    return _cost(here, ["sh", "-c", loop, "sh", str(here.python), str(count), *words], here.runs / f"loop-{count}")


def _cost(here: Place, command: Sequence[str], root: Path) -> Cost:
    before = len(_answers(here))
    began = time.perf_counter()
    _checked(here, command)
    seconds = time.perf_counter() - began
    answers = _answers(here)[before:]
    found = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    _checked(here, ["scancel", *(answer.split()[-1] for answer in answers)])
    return Cost(seconds, len(answers), len(found), sum(path.lstat().st_size for path in found))


def _answers(here: Place) -> list[str]:
    return here.log.read_text(encoding="utf-8").splitlines() if here.log.exists() else []


def _checked(here: Place, command: Sequence[str]) -> str:
    done = here.run(command)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:300]}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def parts(here: Place, count: int, times: int = TIMES) -> dict[str, float]:
    """Seconds of composing, checking and writing, in a process that has everything imported; medians."""
    found = []
    for turn in range(times):
        words = here.words([f"train.learning_rate={','.join(rates(count))}"], here.runs / f"parts-{count}-{turn}")
        script = here.source / "tests" / "bench" / "sweep.py"
        found.append(json.loads(_checked(here, [str(here.python), str(script), "--parts", *words])))
    return {part: statistics.median(one[part] for one in found) for part in PARTS}


class _Written(BaseException):
    """All files are there: far enough."""


def time_parts(words: Sequence[str]) -> dict[str, float]:
    """The launch of this sweep up to its submission: how long each part took."""
    from pkuslurm import launch, launch_sweep

    spent = dict.fromkeys(PARTS, 0.0)

    def timed(module: object, name: str, part: str, last: bool = False) -> None:
        real = getattr(module, name)

        def instead(*given: object) -> object:
            began = time.perf_counter()
            answer = real(*given)
            spent[part] += time.perf_counter() - began
            if last:
                raise _Written
            return answer

        setattr(module, name, instead)

    timed(launch, "compose_sweep", "compose")
    timed(launch_sweep, "ready", "check")
    timed(launch_sweep, "sweep_files", "write")
    timed(launch_sweep, "create", "write", last=True)
    try:
        sys.exit(launch.main(["-m", *words]))
    except _Written:
        return spent


HEAD = """\
{written} With {told}.
`launch -m {overrides} train.learning_rate=…`,
the whole pipeline, until it returns; nothing has run yet. Beside it a shell's loop over single launches, in the same
run; its numbers for 1,000 are ten times those for 100. Links are counted as files.

"""
FOOT = """
Of it composing, checking and writing, in ms a point (median of {times}; the bar is {bar:.0f} together for 1,000;
with few of them what is done once, Hydra's start above all, weighs):

"""


def table(sweeps: dict[int, Cost], loops: dict[int, Cost]) -> str:
    """The Markdown; loops that were not run are told from the largest that was."""
    lines = [
        "| points | | seconds | sbatch calls | files | KB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    most = max(loops)
    for count, cost in sweeps.items():
        lines.append(f"| {count:,} | `launch -m` | {_cells(cost)} |")
        by = count // most if count not in loops else 1
        loop = loops.get(count, loops[most])
        told = Cost(loop.seconds * by, loop.sbatch * by, loop.files * by, loop.size * by)
        lines.append(f"| | one by one{'' if count in loops else ' (× ' + str(by) + ')'} | {_cells(told)} |")
    return "\n".join(lines) + "\n"


def _cells(cost: Cost) -> str:
    return f"{cost.seconds:.1f} | {cost.sbatch:,} | {cost.files:,} | {cost.size / 1024:,.0f}"


def parts_table(found: dict[int, dict[str, float]]) -> str:
    lines = [f"| points | {' | '.join(PARTS)} | together |", "|---:|---:|---:|---:|---:|"]
    for count, spent in found.items():
        cells = [1000 * spent[part] / count for part in PARTS]
        lines.append(f"| {count:,} | {' | '.join(f'{cell:.1f}' for cell in [*cells, sum(cells)])} |")
    return "\n".join(lines) + "\n"


def measured() -> str:
    with place() as here:
        parts(here, SIZES[0], 1)  # warms the disk's cache and writes bytecode
        loops = {count: one_by_one(here, count) for count in LOOPS}
        sweeps = {count: swept(here, count) for count in SIZES}
        spent = {count: parts(here, count) for count in SIZES}
    head = HEAD.format(written=written("tests/bench/sweep.py"), told=here.told, overrides=" ".join(OVERRIDES))
    return head + table(sweeps, loops) + FOOT.format(times=TIMES, bar=BAR) + parts_table(spent)


def main() -> None:
    section("Sweeps", measured())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parts"]:
        print(json.dumps(time_parts(sys.argv[2:])))
    else:
        main()
