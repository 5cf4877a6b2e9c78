"""Pods: network namespaces with an address and a host name of their own, a shared folder, and a WORK_DIR each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import standin
from tests.cluster.network import batch
from tests.conftest import environment

# as launch and the other verbs, with the patience of a test
DRIVER = """
import sys
from importlib import import_module
from pkuslurm.submit import meeting
meeting.PATIENCE.update(waiting=float(sys.argv[1]), running=float(sys.argv[2]))
sys.exit(import_module(sys.argv[3]).main(sys.argv[4:]))
"""


@dataclass
class Pod:
    """One pod. ``patience``: how long the silent are waited for, while waiting and at work."""

    name: str
    address: str
    netns: str
    home: Path
    shared: Path
    patience: tuple[float, float] = (5.0, 5.0)
    started: list[Terminal] = field(default_factory=list)

    def start(self, *arguments: str | Path, module: str = "pkuslurm.launch", **variables: str) -> Terminal:
        """Type a command in a terminal of this pod."""
        here = self.home / str(len(self.started))
        here.mkdir(parents=True)
        python = [sys.executable, "-c", DRIVER, *map(str, self.patience), module, *map(str, arguments)]
        env = environment(self.home, WORK_DIR=str(self.home / "work"), OMP_NUM_THREADS="1") | variables
        with (here / "out").open("wb") as out, (here / "err").open("wb") as err:
            process = subprocess.Popen(
                # all of them replace themselves: the pid is python's
                [
                    *("nsenter", f"--net=/run/netns/{self.netns}", "unshare", "--uts", "sh", "-c"),
                    *('hostname "$0" && exec "$@"', self.name, *python),
                ],
                cwd=here,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.started.append(Terminal(process, here))
        return self.started[-1]

    def launch(self, *arguments: str, shared: bool = True, **variables: str) -> Terminal:
        """python -m pkuslurm.launch cluster=scow nodes=2, with a stand-in for LLaMA-Factory, meeting in the folder."""
        meet = [f"cluster.meet={self.shared}"] if shared else []
        return self.start(*TINY, f"cluster.python={trainer(self.shared)}", *meet, *arguments, **variables)

    def verb(self, *arguments: str | Path, **variables: str) -> Terminal:
        return self.start(*arguments, module="pkuslurm.cli", **variables)


TINY = ("cluster=scow", "cluster.accelerator=cpu", "model=tiny", "nodes=2")


@dataclass
class Terminal:
    """A command that runs, or has run, in a pod."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def ended(self, seconds: float = 60.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs:\n{self.out}\n{self.err}") from None

    def says(self, words: str, seconds: float = 30.0) -> None:
        until(lambda: words in self.err or self.process.poll() is not None, seconds, lambda: self.err)
        assert words in self.err, self.err

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def run(self) -> Path:
        return Path(self.out.splitlines()[-1])


def until(holds: Callable[[], object], seconds: float = 30.0, words: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s\n{words()}"
        time.sleep(0.1)


def trainer(shared: Path) -> Path:
    """tests/cluster/standin.py as a program."""
    program = shared / "trainer"
    if not program.exists():
        # a script's first line takes no interpreter with a space in its path
        text = f'#!/bin/sh\nexec "{sys.executable}" "{standin.__file__}" "$@"\n'
        aside = program.with_name(f".trainer.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(program)
    return program


def names(count: int) -> list[str]:
    return [f"pkm{os.getpid()}-{number}" for number in range(1, count + 1)]


def cable(count: int) -> None:
    """Namespaces with eth0, on a bridge in a namespace of its own: the machine's own network is not touched."""
    hub = f"pkm{os.getpid()}-hub"
    batch([f"netns add {name}" for name in (hub, *names(count))])
    batch(["link add hub type bridge", "link set hub up"], hub)
    for number, name in enumerate(names(count), 1):
        batch([f"link add eth0 type veth peer name pod{number} netns {hub}", "link set lo up"], name)
        batch([f"addr add 10.99.0.{number}/24 dev eth0", "link set eth0 up"], name)
        batch([f"link set pod{number} master hub up"], hub)


def uncable(count: int) -> None:
    for name in (*names(count), f"pkm{os.getpid()}-hub"):
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
