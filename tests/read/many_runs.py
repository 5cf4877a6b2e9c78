"""Many runs in little time: copies of one finished run, living ones, and a squeue that counts how often it is asked."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from pathlib import Path

from pkuslurm.rundir import RunDir
from tests.read.fake_run import edit, finished, make

# what it says about each id that it is asked for, after `-j`
SQUEUE = """\
#!/bin/sh
echo "$0" >>{log}
while [ $# -gt 1 ]; do [ "$1" = -j ] && ids=$2; shift; done
echo "$ids" | tr , '\\n' | while read -r id; do echo "$id|RUNNING|N/A|N/A|node01|me|None|key-$id"; done
"""


def finish(root: Path, count: int, old: float = 3600.0) -> list[RunDir]:
    """``count`` finished runs, last changed ``old`` seconds ago; what does not name its run is linked."""
    first = finished(root, run_id="20261101-000000-tiny-identity-0000")
    files = [path for path in first.path.rglob("*") if path.is_file()]
    texts = {path: path.read_bytes() for path in files}
    name = first.run_id.encode()
    runs = [first]
    for number in range(1, count):
        run = RunDir(root / f"20261101-{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}-tiny-{number:05d}")
        for folder in {path.parent for path in files}:
            (run.path / folder.relative_to(first.path)).mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            copy = run.path / path.relative_to(first.path)
            if name in text:
                copy.write_bytes(text.replace(name, run.run_id.encode()))
            else:
                copy.hardlink_to(path)
        runs.append(run)
    for run in runs:
        age(run.path, old)
    return runs


def age(folder: Path, seconds: float) -> None:
    """Nothing below ``folder`` was changed for so long."""
    then = time.time() - seconds
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            with suppress(FileNotFoundError):
                os.utime(path, (then, then), follow_symlinks=False)


def living(root: Path, count: int) -> list[RunDir]:
    """Runs whose jobs are in Slurm's queue."""
    runs = []
    for number in range(count):
        run = make(root, f"20261102-0000{number:02d}-tiny-identity-1{number:03d}")
        jobs = {
            kind: {"job_id": str(job_id), "key": f"key-{job_id}", "first_attempt": 1, "parents": [], "num_nodes": 1}
            for kind, job_id in (("prepare", 2 * number + 1), ("train", 2 * number + 2))
        }
        edit(run.run_json, executor="slurm", launcher=None, jobs=jobs, pipeline=list(jobs))
        runs.append(run)
    return runs


def counted(folder: Path) -> tuple[str, Path]:
    """A PATH with a squeue that writes a line into a file each time it is asked; sacct knows nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "asked"
    log.touch()
    quoted = shlex.quote(str(log))
    for name, text in (("squeue", SQUEUE.format(log=quoted)), ("sacct", f'#!/bin/sh\necho "$0" >>{quoted}\n')):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", log
