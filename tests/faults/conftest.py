"""The cluster, and an end to each fault, for the rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.fixture import Cluster, slurm
from tests.cluster.process import wait_for

__all__ = ["slurm"]


@pytest.fixture
def healed(slurm: Cluster) -> Iterator[None]:
    """For modules whose every test is on the cluster: pytestmark = pytest.mark.usefixtures("healed")."""
    yield
    slurm.clear()
    # what a pulled cable has cut off hears of its end when the cable is back
    wait_for(lambda: not slurm.processes("pkalice"), 60, "an end of every process")
