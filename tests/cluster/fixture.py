"""The session fixture ``slurm``: brought up if it is not up; taken down by the last session that needed it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path

import pytest

from tests import verify
from tests.cluster import daemons, faults, people
from tests.cluster.down import down
from tests.cluster.layout import USERS, ClusterError, Layout, base_from_environment, the_cluster
from tests.cluster.process import command_line, in_netns, of_user, pids, wait_for
from tests.cluster.python import REPO, source, usable_python
from tests.cluster.up import lacking

WITHOUT = "PKUSLURM_WITHOUT_SLURM"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs. ``layout`` is for tests.cluster.faults."""

    layout: Layout
    python: Path  # a Python with this one's packages and this checkout, which the users can run
    source: Path  # the checkout, as the users see it

    @property
    def base(self) -> Path:
        return self.layout.base

    @property
    def conf(self) -> Path:
        return self.layout.conf

    @property
    def users(self) -> tuple[str, ...]:
        return USERS

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.layout.names

    def shared(self, user: str) -> Path:
        """The user's folder, seen by all nodes; ``common`` is everybody's to read."""
        return self.layout.shared(user)

    def run(
        self,
        user: str,
        argv: Sequence[str],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 120,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node, in a login's environment (plus ``env``) and the user's folder."""
        done = people.run(self.layout, user, argv, cwd, env, timeout)
        verify.heard(argv, done.returncode, done.stdout)
        return done

    def start(
        self, user: str, argv: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """The same, not waited for: a process group of its own, output in pipes."""
        return people.start(self.layout, user, argv, cwd, env)

    def ask(self, *command: str) -> str:
        """What a Slurm command prints, as root."""
        return daemons.checked(*command, layout=self.layout)

    def wait_idle(self, seconds: float = 60) -> None:
        """Until no job is left in the queue and all nodes are idle."""
        wait_for(lambda: not self.busy() and daemons.all_idle(self.layout), seconds, "an idle cluster")

    def busy(self) -> list[str]:
        return faults.busy(self.layout)

    def processes(self, user: str) -> list[str]:
        """What the user runs on the nodes, as ``NODE COMMAND``."""
        mine = of_user(people.identity(user).uid)
        there = [(name, in_netns(self.layout.netns(name))) for name in self.nodes]
        return [f"{name} {command_line(pid)}" for pid in pids() if mine(pid) for name, on in there if on(pid)]

    def clear(self) -> None:
        """Undo every fault, cancel everybody's jobs, wait until it is idle."""
        faults.heal(self.layout)
        for user in USERS:
            daemons.checked("scancel", "-u", user, layout=self.layout)
        self.wait_idle()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """The running cluster; else one that ends with the last session that uses it."""
    base = base_from_environment()
    layout, lease = _lease(base)
    try:
        python = usable_python(layout)
        yield Cluster(layout, python, source(python))
    finally:
        with suppress(BlockingIOError):  # another session has its lease
            if layout.temporary.exists():
                flock(lease, LOCK_EX | LOCK_NB)
                down(base)
        os.close(lease)


def _lease(base: Path) -> tuple[Layout, int]:
    """Bring it up, and hold it: a shared lock on its folder. It may be taken down just before we hold it."""
    while True:
        # by a process of its own: the daemons are not the tests' children
        command = [sys.executable, "-m", "tests.cluster", "up", "--temporary"]
        ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ClusterError(ended.stderr)
        with suppress(FileNotFoundError, ClusterError):
            lease = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
            flock(lease, LOCK_SH)
            if os.path.samestat(os.fstat(lease), os.stat(base)):
                return the_cluster(base), lease
            os.close(lease)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if lacks := lacking():
        reason = f"a Slurm cluster needs {'; '.join(lacks)}"
        if os.environ.get(WITHOUT) == "1":
            pytest.skip(f"{reason} ({WITHOUT}=1)")
        pytest.fail(f"{reason}; {WITHOUT}=1 skips these tests")
    with cluster() as running:
        yield running
