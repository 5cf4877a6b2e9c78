"""The cluster, for the tests of the cluster."""

from tests.cluster.fixture import slurm

__all__ = ["slurm"]
