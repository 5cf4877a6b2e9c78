"""``python -m pkuslurm.worker.head``: where the ranks of a Slurm job will meet, as the job's script exports it.

Runs in the batch script, which Slurm starts on the first node of the allocation, so that the port is known to be free
there, anew at each attempt; srun carries PKUSLURM_MASTER to all tasks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import hostlist, network


def head(environ: Mapping[str, str]) -> str:
    """``address:port``. Raises PkuslurmError where this is not the first node of the job."""
    if not environ.get("SLURM_JOB_NODELIST"):
        raise PkuslurmError("SLURM_JOB_NODELIST is not set: this is no Slurm job; submit the script with sbatch")
    hosts = hostlist.expand(environ["SLURM_JOB_NODELIST"])
    here = environ.get("SLURMD_NODENAME", "")
    if here and here != hosts[0]:
        raise PkuslurmError(
            f"SLURMD_NODENAME={here}: the first node of {environ['SLURM_JOB_NODELIST']} is {hosts[0]}; "
            "heterogeneous jobs and arbitrary distributions are not for torchrun"
        )
    address = "127.0.0.1"
    if len(hosts) > 1:
        address = network.address_towards(hosts[1])
        if network.is_loopback(address):
            raise PkuslurmError(f"{hosts[1]}: its name leads to this very node ({address}); mend /etc/hosts or DNS")
    job, restarts = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_RESTART_COUNT", "0")
    seed = (int(job) if job.isdecimal() else 0) + 97 * (int(restarts) if restarts.isdecimal() else 0)
    return f"{address}:{network.free_port(seed)}"


if __name__ == "__main__":
    try:
        print(head(os.environ))
    except PkuslurmError as error:
        print(f"pkuslurm: {error}", file=sys.stderr)
        sys.exit(1)
