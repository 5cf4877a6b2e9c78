"""The cluster, and one real run on it, for the tests of the cluster."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkuslurm.payload import tiny_model
from pkuslurm.render.render import TINY_MODEL
from tests.cluster import faults
from tests.cluster.fixture import Cluster, slurm
from tests.cluster.runs import SAME_SUMS, THREADS, TINY

__all__ = ["slurm"]


@pytest.fixture
def nothing_is_left(slurm: Cluster) -> Iterator[None]:
    """For modules whose every test is on the cluster: pytestmark = pytest.mark.usefixtures("nothing_is_left")."""
    yield
    slurm.clear()
    assert slurm.processes("pkalice") == []


@pytest.fixture(scope="session")
def trained(slurm: Cluster, cache: Path) -> Path:
    """Launched: two nodes × two ranks, an ordinary user, each node's name leading to 127.0.1.1, as Debian has it."""
    faults.loopback_names(slurm.layout, True)
    made, passed_on = cache / "models" / TINY_MODEL, slurm.shared("common") / TINY_MODEL
    if tiny_model.complete(made):  # the demo has made it: a minute of one processor
        shutil.copytree(made, passed_on, dirs_exist_ok=True)
        for path in (passed_on, *passed_on.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a cache is its owner's alone
        own = 'mkdir -p ~/.cache/pkuslurm/models && cp -r "$0" ~/.cache/pkuslurm/models/'
        assert slurm.run("pkalice", ["sh", "-c", own, str(passed_on)]).returncode == 0
    command = [str(slurm.python), "-m", "pkuslurm.launch", *TINY, *SAME_SUMS, "name=真的"]
    done = slurm.run("pkalice", command, env=THREADS)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])
