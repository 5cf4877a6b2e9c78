"""From a training's start to its first optimizer step, by three launchers: `make bench` writes docs/benchmarks.md.

    python tests/bench/prefork.py [CASE …]     (nodes x ranks a node: 1x1 1x2 1x4 2x2; all, where none is named)

The tiny model, nodes as process trees on this machine. Three times each, in turns, and once more to the end, when its
memory and the files that it opens are counted and the losses compared. PKUSLURM_BENCH=FOLDER keeps what was prepared
and measured, so that the cases can be measured one by one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pkuslurm.rundir import RunDir
from pkuslurm.worker.processes import descendants
from tests.again import copied
from tests.bench.common import REPO, section, table, written

MAIN = REPO / "pkuslurm" / "payload" / "__main__.py"
TIMES = 3
STEPS = 6
CASES = {"1x1": (1, 1), "1x2": (1, 2), "1x4": (1, 4), "2x2": (2, 2)}
SEED, TORCHRUN, PREFORK = LAUNCHERS = ("llamafactory-cli", "torchrun", "prefork")
# of llamafactory-cli's time, prefork's may be so much
BARS = {"1x1": 0.6, "1x2": 0.6, "1x4": 0.4, "2x2": 0.6}
# the environment of a job, which llamafactory-cli gets as well
DROPPED = re.compile(r"PYTHONDONTWRITEBYTECODE|(SLURM|PKUSLURM|TORCHELASTIC)_.*")


@dataclass
class Whole:
    """A run to its end. ``pss``: MB, the most at one moment; ``opened``: files; ``torch``: its imports."""

    pss: float
    opened: int | None
    torch: int | None
    losses: list[str]


def commands(launcher: str, job: Path, case: str, port: int) -> list[tuple[list[str], dict[str, str]]]:
    """For each node: what is started there, and what is added to its environment."""
    nodes, ranks = CASES[case]
    yaml, found = json.loads(job.read_text(encoding="utf-8"))["payload"]["yaml"], []
    for node in range(nodes):
        given = {"NNODES": nodes, "NODE_RANK": node, "NPROC_PER_NODE": ranks, "MASTER_PORT": port}
        environ = {name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"}
        words = [word for name, value in environ.items() for word in (f"--{name.lower()}", value)]
        found.append(
            {
                SEED: ([str(Path(sys.executable).with_name(SEED)), "train", yaml], environ | {"FORCE_TORCHRUN": "1"}),
                TORCHRUN: ([sys.executable, "-m", "torch.distributed.run", *words, str(MAIN), "train", str(job)], {}),
                PREFORK: ([sys.executable, "-u", str(MAIN), "prefork", *words, "train", str(job)], {}),
            }[launcher]
        )
    return found


class Training:
    """One start of all nodes."""

    def __init__(self, run: Path, folder: Path, launcher: str, case: str, before: Sequence[str] = ()) -> None:
        job = copied(run, folder, logging_steps=1)
        self.log = RunDir(folder).adapter / "trainer_log.jsonl"
        environ = {name: value for name, value in os.environ.items() if not DROPPED.fullmatch(name)}
        environ |= json.loads(job.read_text(encoding="utf-8"))["env"] | {"OMP_NUM_THREADS": "1"}
        environ |= {"PKUSLURM_ATTEMPT": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.began = time.perf_counter()
        self.nodes = []
        for number, (words, more) in enumerate(commands(launcher, job, case, _free_port())):
            with (folder / f"log.{number}").open("wb") as log:
                words = [word.format(number) for word in before] + words
                process = subprocess.Popen(words, env=environ | more, cwd=folder, stdout=log, stderr=log)
            self.nodes.append(process)

    def ended(self) -> bool:
        codes = [node.poll() for node in self.nodes]
        if any(codes):
            logs = [file.read_text(encoding="utf-8", errors="replace") for file in self.log.parents[1].glob("log.*")]
            raise RuntimeError(f"it ended with {codes}:\n{''.join(logs)[-3000:]}")
        return all(code == 0 for code in codes)

    def first_step(self) -> float:
        while not (self.log.exists() and b'"loss"' in self.log.read_bytes()):
            if self.ended():
                break
            time.sleep(0.02)
        return time.perf_counter() - self.began

    def kill(self) -> None:
        for process in descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait()

    def losses(self) -> list[str]:
        found = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        return [f"{line['loss']} {line['lr']}" for line in found if "loss" in line]


def seconds(run: Path, launcher: str, case: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        training = Training(run, Path(name), launcher, case)
        try:
            return training.first_step()
        finally:
            training.kill()


def whole(run: Path, launcher: str, case: str) -> Whole:
    strace = shutil.which("strace")
    with tempfile.TemporaryDirectory() as name:
        calls = Path(name) / "calls.{}"
        before = [strace, "-f", "-qq", "--seccomp-bpf", "-e", "trace=open,openat", "-o", str(calls)] if strace else []
        training, most = Training(run, Path(name), launcher, case, before), 0.0
        try:
            while not training.ended():
                most = max(most, sum(_pss(process.pid) for process in descendants(os.getpid())))
                time.sleep(0.3)
        finally:
            training.kill()
        text = "".join(file.read_text(errors="replace") for file in Path(name).glob("calls.*"))
        opened = [line for line in text.splitlines() if "open" in line and " = -1 " not in line]
        imports = [line for line in opened if "/torch/__pycache__/__init__." in line]
        counted = (len(opened), len(imports)) if strace else (None, None)
        return Whole(most, *counted, training.losses())


def _pss(pid: int) -> float:
    with suppress(OSError):
        if Path(f"/proc/{pid}/comm").read_text().strip() != "strace":
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            return int(found[1]) / 1024 if found else 0.0
    return 0.0


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def prepared(folder: Path) -> Path:
    """A run of the tiny model, made once a folder."""
    if not (found := sorted((folder / "runs").glob("*/done/train.json"))):
        words = ["pipeline=train", "nodes=1", "cluster.nproc_per_node=1", f"train.max_steps={STEPS}", "here=true"]
        words += [f"run_root={folder}/runs", f"cache_root={folder}/cache"]
        subprocess.run([sys.executable, "-m", "pkuslurm.launch", *words], cwd=REPO, check=True, stdout=sys.stderr)
        found = sorted((folder / "runs").glob("*/done/train.json"))
    return found[-1].parents[1]


def measure(run: Path, case: str) -> dict[str, object]:
    times: dict[str, list[float]] = {launcher: [] for launcher in LAUNCHERS}
    ends = {launcher: whole(run, launcher, case) for launcher in LAUNCHERS}  # first: it warms the disk's cache
    for _ in range(TIMES):
        for launcher in LAUNCHERS:
            times[launcher].append(seconds(run, launcher, case))
    return {launcher: {"seconds": times[launcher], **asdict(ends[launcher])} for launcher in LAUNCHERS}


HEAD = """\
{written} {versions}; the tiny model, bytecode compiled, one thread a rank.
Seconds from the start of all nodes to the first logged optimizer step, median of {times} (all), in turns; memory (the
most that all processes' PSS came to), files opened and imports of torch in one more run. `llamafactory-cli` is
`FORCE_TORCHRUN=1 … llamafactory-cli train` on each node, on the same YAML. Losses in all digits: {same}.

"""
NAMES = (
    "nodes × ranks",
    "",
    "first step (s)",
    "÷ llamafactory-cli",
    "bar",
    "PSS (MB)",
    "files opened",
    "imports of torch",
)


def text(found: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """The Markdown of the cases that were measured."""
    from pkuslurm.payload.files import versions

    same = all(len({json.dumps(row["losses"]) for row in rows.values()}) == 1 for rows in found.values())
    told = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "llamafactory"))
    judged = "equal" if same else "**different**"
    head = HEAD.format(written=written("tests/bench/prefork.py"), times=TIMES, versions=told, same=judged)
    lines = []
    for case in (one for one in CASES if one in found):
        medians = {launcher: statistics.median(found[case][launcher]["seconds"]) for launcher in LAUNCHERS}
        for launcher in LAUNCHERS:
            row = found[case][launcher]
            times = " ".join(f"{second:.1f}" for second in sorted(row["seconds"]))  # type: ignore[attr-defined]
            cells = [
                case.replace("x", " × ") if launcher == SEED else "",
                f"`{launcher}`",
                f"{medians[launcher]:.1f} ({times})",
                f"{medians[launcher] / medians[SEED]:.2f}",
                f"{BARS[case]}" if launcher == PREFORK else "",
                f"{row['pss']:,.0f}",
                "–" if row["opened"] is None else f"{row['opened']:,}",
                "–" if row["torch"] is None else str(row["torch"]),
            ]
            lines.append(cells)
    return head + table(NAMES, lines, left=2)


def main(cases: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("PKUSLURM_BENCH", name))
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "prefork.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        run = prepared(folder)
        for case in cases:
            found[case] = measure(run, case)
            kept.write_text(json.dumps(found), encoding="utf-8")
    section("Start-up", text(found))


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
