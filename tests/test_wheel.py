"""The wheel brings conf/ and sbatch/ along and works from where it is unpacked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import REPO, environment


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=REPO, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    assert "pkuslurm/conf/config.yaml" in names and "pkuslurm/conf/dataset/identity.jsonl" in names
    assert "pkuslurm/sbatch/README.md" in names and "pkuslurm/read/report/report.css" in names
    env = environment(tmp_path) | {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-m", "pkuslurm.launch", "dry_run=true"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "site" / "pkuslurm" / "conf" / "dataset" / "identity.jsonl") in ran.stdout
