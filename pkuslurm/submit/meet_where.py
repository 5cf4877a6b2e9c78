"""Nodes without a scheduler: which node this is and where they meet, from what the platform sets and what was typed."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import CONF, absolute
from pkuslurm.preflight.devices import CARDS
from pkuslurm.worker import network

# What PKU's platform sets in an application or a training job.
MODEL, DATA, ADDRESS = "SCOW_AI_MODEL_PATH", "SCOW_AI_DATASET_PATH", "XDL_IP"
# presets that name no model of their own
NO_MODELS = ("auto", "custom", "tiny")


@dataclass(frozen=True)
class Role:
    """``rank``: None: by arrival. ``address``, ``port``: node 0's, as they were given."""

    rank: int | None = None
    address: str | None = None
    port: int | None = None

    @property
    def key(self) -> str:
        """By which those who belong together know each other's file."""
        if self.address is None or self.port is None:
            return "meeting"
        # some platforms tell node 0 that it is localhost, and the others its name
        return re.sub(r"[^\w-]", "-", f"{socket.gethostname() if is_local(self.address) else self.address}-{self.port}")


def is_local(address: str) -> bool:
    """Whether ``address`` names whoever looks, each another one."""
    return network.is_loopback(address) or address == "localhost"


def role(environ: Mapping[str, str], nodes: int, ranks: int = 1) -> Role:
    """Raises PkuslurmError, naming the variable, where what is given does not fit ``nodes`` of ``ranks`` each."""
    source = next((name for name in ("NODE_RANK", "RANK") if environ.get(name, "") != ""), None)
    if source is None:
        return Role()
    size = environ.get("WORLD_SIZE", "") if source == "RANK" else ""
    # platforms count pods in it, or the ranks of all of them
    if size not in ("", str(nodes), str(nodes * ranks)):
        each = f", and not the {nodes * ranks} ranks of nodes={nodes} with {ranks} each" if ranks > 1 else ""
        raise PkuslurmError(
            f"WORLD_SIZE={size}: the platform has started {size} pods, for nodes={nodes}{each}; one is wrong"
        )
    text = environ[source]
    if not text.isascii() or not text.isdecimal():
        raise PkuslurmError(f"{source}={text}: it must be a number, 0 for the first node")
    if int(text) >= nodes:
        raise PkuslurmError(
            f"{source}={text}: nodes={nodes} has node 0{f' to {nodes - 1}' if nodes > 1 else ' alone'}; write as many "
            "nodes as there are pods, the same everywhere"
        )
    port = environ.get("MASTER_PORT", "")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise PkuslurmError(f"MASTER_PORT={port}: it must be a number from 1 to 65535")
    address = environ.get("MASTER_ADDR", "").strip()
    return Role(int(text), address or None, int(port) if port else None)


def platforms(typed: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Overrides for what the platform has told and nobody has typed: a model, a folder with data."""
    said = {item.lstrip("+~").partition("=")[0] for item in typed}
    found = []
    model = environ.get(MODEL, "")
    if not said & {"model", "model.path", "model.make", "from_yaml", "experiment"} and _is_model(model):
        name = Path(model).name.lower()  # a preset knows its template and its learning rate
        if name not in NO_MODELS and (CONF / "model" / f"{name}.yaml").is_file():
            found.append(f"model={name}")
        found.append(f"model.path={model}")
    data = environ.get(DATA, "")
    if not said & {"dataset", "dataset.path", "from_yaml", "experiment"} and _holds_something(data):
        found.append(f"dataset.path={data}")
    return found


def _is_model(path: str) -> bool:
    return bool(path) and Path(path, "config.json").is_file()


def _holds_something(path: str) -> bool:
    try:
        return bool(path) and any(not name.startswith(".") for name in os.listdir(path))
    except OSError:
        return False


def facts(config: Config, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is said of it before anything starts."""
    told = [f"{name}={environ[name]}" for name in ("WORK_DIR", MODEL, DATA, CARDS) if environ.get(name)]
    cards = f"{config.nodes} × {config.cluster.nproc_per_node or 1} {config.cluster.accelerator}"
    return [("nodes", cards), *([("platform", ", ".join(told))] if told else [])]


def placed(config: Config, changed: Collection[str], environ: Mapping[str, str]) -> Config:
    """``config``, on cluster=scow with the folders that all nodes see.

    Raises PkuslurmError where cluster.meet is no folder here.
    """
    if config.cluster.executor != "meet":
        return config
    meet = config.cluster.meet
    if meet is not None:
        meet = absolute(meet)
        if not config.dry_run and not Path(meet).is_dir():
            raise PkuslurmError(
                f"cluster.meet={meet}: there is no such folder here; it must be a mount point (挂载点) of every node"
            )
        if "run_root" not in changed and not environ.get("PKUSLURM_RUN_ROOT"):
            config = replace(config, run_root=f"{meet}/runs")
    made_here = config.nodes > 1 and config.model.make is not None
    if made_here and "cache_root" not in changed and not environ.get("PKUSLURM_CACHE"):
        config = replace(config, cache_root=f"{config.run_root}/.cache")  # a pod's home is often its own
    return config


def place(config: Config, changed: Collection[str], own: Role, environ: Mapping[str, str]) -> Path | None:
    """The folder in which the nodes meet; None: nothing says of one that all of them see it.

    The pods of a training job share its WORK_DIR; of applications each has its own.
    """
    if config.cluster.meet is not None:
        return Path(absolute(config.cluster.meet))
    given = "run_root" in changed or environ.get("PKUSLURM_RUN_ROOT")
    return Path(config.run_root) if given or (own.address is not None and own.port is not None) else None


def screen(line: str, nodes: int, timeout: float, environ: Mapping[str, str]) -> str:
    """What to do where nothing says where the nodes meet; ``line``: to be typed, up to the folder."""
    own = environ.get("WORK_DIR")
    line = f"{line} cluster.meet=DIR"
    chinese = f"WORK_DIR（{own}）是每个应用自己的目录，另一个应用看不到它。" if own else "没有给出这样的目录。"
    english = f"WORK_DIR ({own}) is each application's own." if own else "No such folder is given."
    return f"""\
nodes={nodes}：{nodes} 个节点需要在一个大家都能看到的目录里会合。{chinese}
  1. 在每个应用的表单里添加同一个“挂载点”（共享目录 DIR，可写），然后启动应用；
  2. 在每个应用的终端里输入同一条命令，先后不限，{timeout:g} 秒之内即可：
       {line}
  训练任务（平台给出 RANK、MASTER_ADDR、MASTER_PORT）不需要这一步。

nodes={nodes}: the nodes meet in a folder that all of them see. {english}
  1. add the same mount point (挂载点: a shared folder DIR, writable) to the form of every application, start them;
  2. type the same in a terminal of each, in any order, within {timeout:g} seconds (cluster.join_timeout):
       {line}
  A training job, where the platform gives RANK, MASTER_ADDR and MASTER_PORT, needs none of this.
"""
