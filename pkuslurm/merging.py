"""merge --from-yaml: a LLaMA-Factory export YAML as a run of one job, without a training before it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from pkuslurm.launch import main as launch
from pkuslurm.rundir import RunDir, read_json


def merge_yaml(file: str, settings: Iterable[str], run_root: str | None) -> int:
    """Launch it with further ``settings``; prints the merged model's folder, then the run's. The exit code."""
    words = ["pipeline=merge", f"from_yaml={file}", *([f"run_root={run_root}"] if run_root else []), *settings]
    said = StringIO()
    with redirect_stdout(said):
        code = launch(words)
    lines = said.getvalue().splitlines()
    job = read_json(RunDir(Path(lines[-1])).job("merge")) if len(lines) == 1 else None
    if job is not None:
        print(job["payload"]["merged"])  # on Slurm it will be there when the job has ended
    sys.stdout.write(said.getvalue())
    return code
