"""What goes wrong on clusters, on purpose; and ``heal``, which puts all of it right again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import daemons, network, texts
from tests.cluster.layout import ClusterError, Layout, change, the_cluster
from tests.cluster.process import running, send, started, wait_for


def node_kill(layout: Layout, name: str) -> None:
    """Everything on the node ends at once; Slurm finds out after SlurmdTimeout."""
    layout.address(name)
    daemons.kill_node(layout, name)


def node_up(layout: Layout, name: str) -> None:
    """Cable in, slurmd started."""
    network.link(layout, name, "up")
    start(layout, name)
    wait_for(lambda: _back(layout, name), 60, f"{name} to be back")


def link_down(layout: Layout, name: str) -> None:
    network.link(layout, name, "down")


def link_up(layout: Layout, name: str) -> None:
    network.link(layout, name, "up")


def pause(layout: Layout, daemon: str) -> None:
    send(layout.pid(daemon), signal.SIGSTOP)


def resume(layout: Layout, daemon: str) -> None:
    send(layout.pid(daemon), signal.SIGCONT)


def kill(layout: Layout, daemon: str) -> None:
    daemons.stop(layout, daemon, signal.SIGKILL)


def start(layout: Layout, daemon: str) -> None:
    if running(layout.pid(daemon)) is None:
        daemons.daemons(layout)[daemon](layout)


def loopback_names(layout: Layout, on: bool) -> None:
    """Debian's habit on every node: its own name is 127.0.1.1, the others' are right."""
    for name in layout.names:
        text = texts.hosts(layout, daemons.host(), name, loopback=on)
        # written into the same file: the node has it bind mounted
        (layout.node(name) / "hosts").write_text(text, encoding="utf-8")


def min_job_age(layout: Layout, seconds: int) -> Layout:
    """How long Slurm remembers jobs that have ended."""
    changed = change(layout, min_job_age=seconds)
    daemons.write_conf(changed)
    daemons.checked("scontrol", "reconfigure", layout=changed)
    return changed


@contextmanager
def forgetful(layout: Layout, seconds: int) -> Iterator[None]:
    """Slurm forgets jobs ``seconds`` (and up to 10 more) after their end."""
    before = the_cluster(layout.base).min_job_age
    min_job_age(layout, seconds)
    try:
        yield
    finally:
        min_job_age(layout, before)


def accounting(layout: Layout, on: bool) -> Layout:
    """Without: as a site that has no slurmdbd; ours goes on, unasked. slurmctld is started anew, jobs go on."""
    if not (layout.base / "mariadb").exists():
        raise ClusterError("accounting: brought up with --no-accounting; there is no slurmdbd to go back to")
    changed = change(layout, accounting=on)
    resume(layout, "slurmctld")
    daemons.stop(layout, "slurmctld", signal.SIGTERM)
    daemons.write_conf(changed)
    _again(changed)
    return changed


@contextmanager
def without_accounting(layout: Layout) -> Iterator[Layout]:
    changed = accounting(layout, False)
    try:
        yield changed
    finally:
        accounting(changed, True)


@contextmanager
def configured(layout: Layout, *lines: str) -> Iterator[None]:
    """With more lines in slurm.conf; of what is there twice Slurm takes the last. slurmctld is started anew."""

    def anew() -> None:
        resume(layout, "slurmctld")
        daemons.stop(layout, "slurmctld", signal.SIGTERM)
        daemons.write_conf(the_cluster(layout.base))

    anew()
    with layout.conf.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    try:
        _again(layout)
        yield
    finally:
        anew()
        _again(layout)


def _again(layout: Layout) -> None:
    daemons.start_slurmctld(layout)
    daemons.checked("scontrol", "reconfigure", layout=layout)
    wait_for(lambda: "idle" in daemons.node_states(layout).values(), 30, "the nodes to be back")


def forget_jobs(layout: Layout) -> None:
    """slurmctld starts without a memory of jobs, as from a lost StateSaveLocation: ids begin anew (FirstJobId)."""
    kill(layout, "slurmctld")
    for file in (layout.base / "state").glob("job_state*"):
        file.unlink()
    start(layout, "slurmctld")


def undrain(layout: Layout) -> None:
    """As an administrator does with nodes that Slurm has drained (a failed prolog, a job id that it gave twice)."""

    def drained() -> list[str]:
        return [name for name, state in daemons.node_states(layout).items() if "drain" in state]

    def resumed() -> bool:
        # refused ("Invalid node state") as long as a controller that has just been started has not heard of the node
        for name in drained():
            daemons.call("scontrol", "update", f"NodeName={name}", "State=RESUME", layout=layout)
        return not drained()

    wait_for(resumed, 30, "nodes that Slurm lets work again")


def heal(layout: Layout) -> None:
    """Every daemon runs, every cable is in, names are right; jobs go on."""
    loopback_names(layout, False)
    for name in layout.names:
        network.link(layout, name, "up")
    for daemon in daemons.daemons(layout):
        resume(layout, daemon)
        start(layout, daemon)
    undrain(layout)
    wait_for(lambda: all(_back(layout, name) for name in layout.names), 180, "all nodes to be back")


def _back(layout: Layout, name: str) -> bool:
    """slurmctld has heard from the slurmd that runs now, and nothing is wrong with the node."""
    shown = daemons.call("scontrol", "show", "node", "-o", name, layout=layout).stdout
    words = dict(word.partition("=")[::2] for word in shown.split())
    return words.get("State", "").partition("+")[0] in ("IDLE", "MIXED", "ALLOCATED") and words.get(
        "SlurmdStartTime", ""
    ) >= started(layout.pid(name))


def busy(layout: Layout) -> list[str]:
    """Jobs that Slurm still has in hand: id, state and name."""
    return daemons.checked("squeue", "-h", "-o", "%i %T %j", layout=layout).splitlines()
