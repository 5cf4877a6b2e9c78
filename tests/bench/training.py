"""Steps a second under our worker and under bare torchrun, on the same train.yaml: `make bench` writes it into
docs/benchmarks.md.

The tiny model, one node of two ranks; three times each, in turns. What the trainer itself says of its steps counts
(train_runtime), not the start; the losses are compared digit for digit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from pkuslurm.render.render import worker_command  # noqa: E402
from pkuslurm.rundir import RunDir  # noqa: E402
from tests.again import copied  # noqa: E402
from tests.bench.common import section, table, versions, written  # noqa: E402
from tests.bench.prefork import DROPPED, _free_port, prepared  # noqa: E402

TIMES, STEPS, RANKS = 3, 200, 2
WAYS = ("torchrun", "the worker")


def seconds(run: Path, way: str) -> tuple[float, list[str]]:
    """The trainer's own seconds for its steps, and its losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = RunDir(Path(name) / run.name)
        file = copied(run, folder.path, max_steps=STEPS, logging_steps=1)
        job = json.loads(RunDir(run).job("train").read_text(encoding="utf-8").replace(str(run), str(folder.path)))
        job["command"][job["command"].index("--nproc_per_node") + 1] = str(RANKS)
        file.write_text(json.dumps(job | {"nproc_per_node": RANKS, "parents": []}), encoding="utf-8")
        environ = {name: value for name, value in os.environ.items() if not DROPPED.fullmatch(name)}
        environ |= {"OMP_NUM_THREADS": "1"}
        command, more = commands(folder, way, job)
        with (folder.path / "log").open("wb") as log:
            code = subprocess.run(command, env=environ | more, cwd=folder.path, stdout=log, stderr=log).returncode
        results = folder.adapter / "train_results.json"
        if code != 0 or not results.exists():
            raise RuntimeError(f"{way}: exit code {code}: {_ends(folder.path)}")
        log_lines = map(json.loads, (folder.adapter / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [f"{line['loss']} {line['lr']}" for line in log_lines if "loss" in line]
        return float(json.loads(results.read_text(encoding="utf-8"))["train_runtime"]), losses


def commands(run: RunDir, way: str, job: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    if way == "the worker":
        return worker_command(sys.executable, run, "train"), {"NODE_RANK": "0", "PKUSLURM_JOB_ID": "local-1"}
    import importlib.util

    found = importlib.util.find_spec("llamafactory")
    assert found is not None and found.origin is not None
    program = str(Path(found.origin).with_name("launcher.py"))
    words = ["--nproc_per_node", str(RANKS), "--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *words, program, str(run.train_yaml)], dict(job["env"])


def _ends(folder: Path) -> str:
    logs = [
        file.read_text(encoding="utf-8", errors="replace")[-2000:] for file in folder.rglob("*log*") if file.is_file()
    ]
    return "\n".join(logs)


HEAD = """\
{written} {versions}. The tiny model, one node of {ranks} ranks, {steps} steps, the
same train.yaml; seconds by the trainer's own count (train_runtime), without the start. `torchrun` is
`python -m torch.distributed.run … llamafactory/launcher.py train.yaml`. Losses in all digits: {same}.

"""
FOOT = """
Against bare torchrun the worker's training takes {ratio:+.1%} of time (medians); one and the same way differs from run
to run by {noise:.1%} (largest against smallest): {verdict}.
"""


def text() -> str:
    import statistics

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = set()
    with tempfile.TemporaryDirectory() as name:
        run = prepared(Path(os.environ.get("PKUSLURM_BENCH", name)))
        seconds(run, WAYS[0])  # the first is slower: the disk's cache
        for _ in range(TIMES):
            for way in WAYS:
                took, said = seconds(run, way)
                found[way].append(took)
                losses.add("\n".join(said))
    medians = {way: statistics.median(times) for way, times in found.items()}
    noise = max(max(times) / min(times) - 1 for times in found.values())
    ratio = medians["the worker"] / medians["torchrun"] - 1
    rows = [
        (way, f"{medians[way]:.1f} ({' '.join(f'{one:.1f}' for one in times)})", f"{STEPS / medians[way]:.1f}")
        for way, times in found.items()
    ]
    return (
        HEAD.format(
            written=written("tests/bench/training.py"), versions=versions("torch", "llamafactory"), ranks=RANKS,
            steps=STEPS, same="equal" if len(losses) == 1 else "**different**",
        )
        + table(("", "seconds (all)", "steps a second"), rows)
        + FOOT.format(ratio=ratio, noise=noise, verdict="within noise" if abs(ratio) <= noise else "**beyond noise**")
    )  # fmt: skip


if __name__ == "__main__":
    section("Training", text())
