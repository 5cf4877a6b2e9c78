"""The configuration files: settings in, text out."""

from __future__ import annotations

from tests.cluster.layout import USERS, Layout

CPUS = 8  # a node's, claimed (config_overrides), not there
MEMORY = 16000  # MB, likewise
DEVICES = 2


def slurm_conf(layout: Layout, host: str) -> str:
    nodes = "\n".join(f"NodeName={name} NodeAddr={layout.address(name)} Port=6818" for name in layout.names)
    later = ",".join(layout.names[layout.nodes // 2 :])
    return f"""\
ClusterName=pkuslurm
# the machine's real name: slurmctld asks the kernel
SlurmctldHost={host}({layout.host_address})
SlurmctldPort={layout.ctld_port}
SlurmUser=root
AuthType=auth/munge
# a requeued job waits cred_expire seconds (Slurm's default: 120)
AuthInfo=socket={layout.base}/munge/socket,cred_expire=30
StateSaveLocation={layout.base}/state
SlurmdSpoolDir={layout.base}/nodes/%n/spool
SlurmctldPidFile={layout.base}/pids/slurmctld.own
SlurmdPidFile={layout.base}/nodes/%n/slurmd.pid
SlurmctldLogFile={layout.log("slurmctld")}
SlurmdLogFile={layout.base}/log/%n.log
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=5
# where there is one slurmd says when a job is over, and its dependents start then; else a second later
Epilog=/bin/true
MinJobAge={layout.min_job_age}
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
# a job that does not ask for memory leaves room for others
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{_accounting(layout)}
GresTypes=npu
NodeName=DEFAULT CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY} \
Gres=npu:{DEVICES} State=UNKNOWN
{nodes}
PartitionName=DEFAULT State=UP PriorityTier=10 PreemptMode=OFF DefaultTime=10
PartitionName=npu Nodes=ALL Default=YES MaxTime=1-00:00:00
PartitionName=cpu Nodes={later} MaxTime=1-00:00:00
PartitionName=low Nodes=ALL MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=short Nodes=ALL MaxTime=2 DefaultTime=1
"""


def _accounting(layout: Layout) -> str:
    if not layout.accounting:
        return "AccountingStorageType=accounting_storage/none"
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={layout.host_address}
AccountingStoragePort={layout.dbd_port}
AccountingStoragePass={layout.base}/munge/socket
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/npu"""


def slurmdbd_conf(layout: Layout, host: str) -> str:
    return f"""\
DbdHost={host}
DbdAddr={layout.host_address}
DbdPort={layout.dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={layout.base}/munge/socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={layout.log("slurmdbd")}
PidFile={layout.base}/pids/slurmdbd.own
"""


def gres_conf(layout: Layout) -> str:
    """With File=, so that ``scontrol show job -d`` gives indices; empty files will do."""
    return "".join(f"NodeName={name} Name=npu File={layout.base}/dev/npu[0-{DEVICES - 1}]\n" for name in layout.names)


def cgroup_conf() -> str:
    return "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


def my_cnf(layout: Layout) -> str:
    """No TCP port: the socket lies in a folder of root's, and root needs no password on it."""
    data = layout.base / "mariadb"
    return f"""\
[mysqld]
user=root
datadir={data}/data
socket={data}/socket
pid-file={data}/pid
tmpdir={data}
skip-networking
skip-name-resolve
innodb-lock-wait-timeout=900
innodb-buffer-pool-size=64M
innodb-log-file-size=16M
innodb-flush-log-at-trx-commit=0
innodb-doublewrite=0
innodb-flush-method=nosync
performance-schema=0
"""


def hosts(layout: Layout, host: str, name: str, loopback: bool = False) -> str:
    """A node's /etc/hosts. ``loopback``: Debian's habit, the own name is 127.0.1.1."""
    own = [f"127.0.1.1 {name}"] if loopback else []
    others = [f"{layout.address(other)} {other}" for other in layout.names if not (loopback and other == name)]
    return "\n".join(["127.0.0.1 localhost", *own, f"{layout.host_address} {host}", *others]) + "\n"


def accounts() -> list[list[str]]:
    """sacctmgr's arguments. QOS ``tight`` is for refusals; ``lab`` is an account that only pkbob has."""
    alice, bob = USERS
    return [
        ["add", "cluster", "pkuslurm"],
        ["add", "qos", "tight", "MaxSubmitJobsPerUser=2", "MaxWall=00:05:00", "MaxTRESPerUser=node=1"],
        ["add", "account", "pku,lab", "Organization=pku"],
        ["add", "user", f"{alice},{bob}", "Account=pku", "DefaultAccount=pku", "QOS=normal,tight", "DefaultQOS=normal"],
        ["add", "user", bob, "Account=lab", "QOS=normal,tight", "DefaultQOS=normal"],
    ]
