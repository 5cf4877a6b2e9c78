"""What of a user's environment may reach a submission. Pure."""

from __future__ import annotations

from collections.abc import Mapping

# In the shell SBATCH_PARTITION, SBATCH_TIMELIMIT, … override the script's own lines; an enclosing job's SLURM_* kill
# the inner srun ("SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive").
LEAKING = ("SBATCH_", "SLURM_", "SLURMD_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
# Where the cluster is: without it the commands talk to another one, or to none.
KEPT = ("SLURM_CONF",)
# Left by an enclosing torchrun or training platform, each would be taken for this job's own.
RANKS = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "NNODES",
    "NPROC_PER_NODE",
    "PKUSLURM_MASTER",
)


def leaking(environ: Mapping[str, str]) -> list[str]:
    """Names of variables that must not reach sbatch, nor through it the job; sorted."""
    return sorted(name for name in environ if (name.startswith(LEAKING) and name not in KEPT) or name in RANKS)


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as Slurm's commands should see it: their answers have the form that we ask for, not the user's."""
    gone = set(leaking(environ))
    return {name: value for name, value in environ.items() if name not in gone} | {"LC_ALL": "C.UTF-8"}


def in_allocation(environ: Mapping[str, str]) -> bool:
    """Whether this shell is inside a job, where computing is what one is there for."""
    return bool(environ.get("SLURM_JOB_ID"))
