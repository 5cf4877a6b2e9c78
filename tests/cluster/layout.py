"""Where a cluster keeps things, and the settings that it was brought up with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fcntl import LOCK_EX, flock
from pathlib import Path

USERS = ("pkalice", "pkbob")
DEFAULT_BASE = "/run/pkuslurm-cluster"


class ClusterError(Exception):
    """Something that the cluster needs is missing, or does not work; one line says what."""


@dataclass(frozen=True)
class Layout:
    """One cluster: its folder, and what was asked for."""

    base: Path
    nodes: int = 4
    accounting: bool = True
    min_job_age: int = 300  # Slurm's default
    net: int = 0  # 10.NET.0.0/24, bridge pksNET
    ctld_port: int = 6817
    dbd_port: int = 6819

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"ascend{n:02d}" for n in range(1, self.nodes + 1))

    @property
    def bridge(self) -> str:
        return f"pks{self.net}"

    @property
    def host_address(self) -> str:
        return f"10.{self.net}.0.1"

    @property
    def conf(self) -> Path:
        return self.base / "etc" / "slurm.conf"

    @property
    def ready(self) -> Path:
        """There once everything ran."""
        return self.base / "ready"

    @property
    def temporary(self) -> Path:
        """There while only tests want it: the last session takes it down."""
        return self.base / "temporary"

    def address(self, name: str) -> str:
        return f"10.{self.net}.0.{10 + self._number(name)}"

    def netns(self, name: str) -> str:
        return f"{self.bridge}-{name}"

    def veth(self, name: str) -> str:
        """The host's end of the node's cable."""
        return f"{self.bridge}v{self._number(name)}"

    def node(self, name: str) -> Path:
        return self.base / "nodes" / name

    def log(self, daemon: str) -> Path:
        return self.base / "log" / f"{daemon}.log"

    def pid(self, daemon: str) -> Path:
        return self.base / "pids" / daemon

    def shared(self, user: str) -> Path:
        return self.base / "shared" / user

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ClusterError(f"{name}: no such node; there are {', '.join(self.names)}")
        return self.names.index(name) + 1


def base_from_environment() -> Path:
    base = Path(os.environ.get("PKUSLURM_CLUSTER_DIR") or DEFAULT_BASE)
    # slurm.conf and ld.so's $ORIGIN know no quoting
    if not base.is_absolute() or any(letter.isspace() or letter in ",=#\"'[]:" for letter in str(base)):
        raise ClusterError(f"PKUSLURM_CLUSTER_DIR={base}: needs an absolute path without spaces or any of ,=#\"'[]:")
    if not base.parent.is_dir():
        raise ClusterError(f"PKUSLURM_CLUSTER_DIR={base}: there is no folder {base.parent}")
    return base


def save(layout: Layout) -> None:
    fields = asdict(layout) | {"base": str(layout.base)}
    (layout.base / "settings.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def load(base: Path) -> Layout | None:
    """The cluster in ``base``, whole or half; None where there is none."""
    try:
        fields = json.loads((base / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Layout(**(fields | {"base": base}))


def the_cluster(base: Path) -> Layout:
    layout = load(base)
    if layout is None or not layout.ready.exists():
        raise ClusterError(f"no cluster is up in {base}: python -m tests.cluster up")
    return layout


def change(layout: Layout, **fields: object) -> Layout:
    """Change some settings; the others as they stand now, not as ``layout`` once had them."""
    changed = replace(the_cluster(layout.base), **fields)  # type: ignore[arg-type]
    save(changed)
    return changed


@contextmanager
def one_at_a_time(base: Path) -> Iterator[None]:
    """Ups and downs take turns. The lock is on the parent folder, which stays; two clusters choose nets there."""
    handle = os.open(base.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flock(handle, LOCK_EX)
        yield
    finally:
        os.close(handle)


def record(layout: Layout, kind: str, name: str) -> None:
    """Write down what is about to be made outside the base folder, so that ``down`` removes exactly that."""
    with (layout.base / "made").open("a", encoding="utf-8") as file:
        file.write(f"{kind} {name}\n")


def recorded(layout: Layout) -> list[tuple[str, str]]:
    """What was made, the newest first."""
    try:
        lines = (layout.base / "made").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    pairs = [line.split(" ", 1) for line in reversed(lines)]
    return [(kind, name) for kind, name in pairs]
