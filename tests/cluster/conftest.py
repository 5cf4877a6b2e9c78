"""The cluster, and one real run on it, for the tests of the cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
def trained(slurm: Cluster) -> Path:
    """Launched: two nodes × two ranks, an ordinary user, each node's name leading to 127.0.1.1, as Debian has it."""
    faults.loopback_names(slurm.layout, True)
    command = [str(slurm.python), "-m", "pkuslurm.launch", *TINY, *SAME_SUMS, "name=真的"]
    done = slurm.run("pkalice", command, env=THREADS)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])
