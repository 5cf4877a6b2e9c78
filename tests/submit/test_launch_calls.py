"""What one launch asks of Slurm, and what it loads before: the structure behind its time, which no test measures."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.bench import launch, sweep
from tests.conftest import environment


def test_slurm_is_called_nine_times_for_a_whole_pipeline() -> None:
    """Partitions, devices, an sbatch for each of five jobs, whether all are there, and one release."""
    with sweep._without("a Slurm that only answers") as fake:
        here = launch.counting(fake, launch._path_of(fake))
        words = here.words([], here.runs / "launch")
        sweep._checked(here, [str(here.python), "-m", "pkuslurm.launch", *words])
        calls = [line.split()[0] for line in launch._lines(here.folder / "calls")]
    assert Counter(calls) == {"sbatch": 5, "scontrol": 2, "sinfo": 1, "squeue": 1}
    assert calls[:2] == ["scontrol", "sinfo"] and calls[-2:] == ["squeue", "scontrol"]


def test_a_launch_loads_neither_what_reads_runs_nor_what_it_does_not_submit_with(tmp_path: Path) -> None:
    """Each of them costs every launch tens of milliseconds."""
    script = "import sys\nfrom pkuslurm.launch import main\nassert main(['dry_run=true']) == 0\n"
    script += "print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "hydra" in loaded
    assert not loaded & {
        "submitit",
        "pkuslurm.read.status",
        "pkuslurm.read.report",
        "rich",
        "torch",
        "numpy",
        "pyarrow",
    }
