"""The environment of a job's command on one node, before its devices are named."""

from __future__ import annotations

from collections.abc import Mapping

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import accelerators, network
from pkuslurm.worker.job import Job
from pkuslurm.worker.rendezvous import Rendezvous

# an outer torchrun's variables would make this one's ranks believe that they belong to it
_OUTER_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# PET_*: torchrun's options, as Kubernetes' training operator sets them for a torchrun of its own
_OUTERS = ("TORCHELASTIC_", "PET_")


def of(environ: Mapping[str, str], job: Job, meeting: Rendezvous, attempt: int) -> dict[str, str]:
    """This node's environment without what is another job's or another accelerator's; then ours, then the user's."""
    outer = {*job.unset, *_OUTER_TORCHRUN}
    own = {name: value for name, value in environ.items() if name not in outer and not name.startswith(_OUTERS)}
    kept = accelerators.without_foreign(own, job.accelerator)
    found = _interfaces(job, meeting) | _ports(job, environ)
    return {
        # without its own handler torchrun ends at our TERM at once, not after up to 30 s; an older one ignores
        # this variable
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",
        **found,
        **kept,
        **_no_proxy(kept, meeting),
        **job.env,
        **{name: own[source] for name, source in job.env_names.items() if source in own},
        **meeting.variables(),
        "NPROC_PER_NODE": str(job.nproc_per_node),
        "PKUSLURM_ATTEMPT": str(attempt),
        "PKUSLURM_NODE_RANK": str(meeting.node_rank),
    }


def _interfaces(job: Job, meeting: Rendezvous) -> dict[str, str]:
    """Which interface the ranks talk over: the one on the way to the master, unless somebody has said another."""
    if meeting.nodes == 1:
        return {}
    try:
        own = network.address_towards(meeting.master_addr)
    except PkuslurmError:
        return {}  # torchrun will say what it cannot reach
    return accelerators.interfaces(job.accelerator, own, network.interface_of(own))


def _no_proxy(environ: Mapping[str, str], meeting: Rendezvous) -> dict[str, str]:
    """A site's proxy is for the network outside: nodes and a node's own programs are asked directly."""
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in environ):
        return {}
    given = f"{environ.get('no_proxy', '')},{environ.get('NO_PROXY', '')}".split(",")
    ours = ("127.0.0.1", "localhost", "::1", meeting.master_addr, *meeting.hosts)
    names = ",".join(dict.fromkeys(name.strip() for name in (*given, *ours) if name.strip()))
    return {"no_proxy": names, "NO_PROXY": names}  # programs read the one or the other


def _ports(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """Two jobs on one node must not both take HCCL's usual ports."""
    if job.accelerator != "npu" or job.kind != "train" or job.exclusive:
        return {}
    return accelerators.base_port(environ)
