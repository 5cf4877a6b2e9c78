"""The scripts of the golden dry runs, as the real sbatch takes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.fixture import Cluster

GOLDEN = Path(__file__).parents[1] / "golden"
# of the others the partitions, accounts and devices are not here
HERE = sorted(path.stem for path in GOLDEN.glob("*.txt") if path.stem.startswith(("ascend", "tutorial10", "sweep")))


def scripts(name: str) -> dict[str, str]:
    text = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^# (sbatch script|job|file|sweep:) ?(.*)\n", text, flags=re.MULTILINE)
    return {
        what: body
        for kind, what, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
        if kind == "sbatch script"
    }


@pytest.mark.parametrize("name", HERE)
def test_each_script_is_one_that_sbatch_takes(slurm: Cluster, name: str) -> None:
    found = scripts(name)
    assert len(found) >= 5, found.keys()
    folder = slurm.shared("pkalice")
    for kind, text in found.items():
        file = folder / f"golden-{name}-{len(kind)}.sh"
        lines = [line for line in text.splitlines() if not re.match(r"#SBATCH --(dependency|chdir|output)=", line)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        file.chmod(0o644)
        done = slurm.run("pkalice", ["sbatch", "--test-only", str(file)])
        assert done.returncode == 0, (kind, done.stderr)
