"""What sbatch's failure means, and the user's own request beside it, in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pkuslurm.slurm import commands

# sbatch gave up, which says nothing of whether the controller took the job
_UNCERTAIN = re.compile(
    r"socket timed out|unable to contact|zero bytes|connection (refused|reset|timed out)|temporarily unable"
    r"|communication (connection )?failure|message (send|receive) failure|unexpected message",
    re.IGNORECASE,
)
# the user, or all of them, have enough in the queue: later it will be taken. Of every refusal by a policy Slurm says
# "job submit limit, user's size and/or time limits": that counts only where it names no limit
_LIMIT = re.compile(r"MaxSubmit|GrpSubmit|unable to accept job|MaxJobCount", re.IGNORECASE)
_NAMED = re.compile(r"(QOS|Assoc|Partition)\w*(Max|Min|Grp|Limit)\w*")
_POLICY = re.compile(r"job submit limit", re.IGNORECASE)


def certain(words: str) -> bool:
    """Whether the job was not taken. An sbatch that said nothing was killed, and may have submitted before."""
    return bool(words.strip()) and (for_now(words) or not _UNCERTAIN.search(words))


def parent_gone(words: str) -> bool:
    """Whether what it waits for is not known any more, or its id has been given to this very job."""
    return bool(re.search(r"job dependency problem", words, re.IGNORECASE))


def for_now(words: str) -> bool:
    """Whether only the time is wrong."""
    return bool(_LIMIT.search(words) or (_POLICY.search(words) and not _NAMED.search(words)))


def in_words(job: Mapping[str, Any], words: str) -> str:
    """sbatch's refusal as one line: what was asked for, why not, and what there is."""
    text = summary(words)
    options: dict[str, Any] = job["request"]["options"]
    asked = ", ".join(f"{name}={value}" for name, value in options.items() if name != "setup")
    head = f"Slurm refuses the {job['kind']} job ({asked or 'the defaults'}): {text}"
    if re.search(r"invalid account", text, re.IGNORECASE):
        return f"{head}; cluster.account can be: {', '.join(commands.accounts()) or 'none of yours is known'}"
    if re.search(r"partition", text, re.IGNORECASE):
        there = ", ".join(part.name + ("*" if part.default else "") for part in commands.partitions() or ())
        return f"{head}; cluster.partition can be: {there}"
    if re.search(r"qos", text, re.IGNORECASE):
        return f"{head}; see cluster.qos and the limits: sacctmgr show qos"
    if re.search(r"gres|generic resource", text, re.IGNORECASE):
        return f"{head}; what the nodes have: sinfo -o '%P %G'"
    return head


def summary(words: str) -> str:
    """All that sbatch said, on one line: the first line often says more than the last."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in words.splitlines()]
    told = [line.removeprefix("Batch job submission failed: ") for line in lines if line]
    return "; ".join(dict.fromkeys(told)) or "sbatch failed without a word"
