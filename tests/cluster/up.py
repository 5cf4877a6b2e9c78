"""Bring a cluster up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from tests.cluster import daemons, mount, network, people, texts
from tests.cluster.down import remove
from tests.cluster.layout import ClusterError, Layout, load, one_at_a_time, record, save
from tests.cluster.process import running, wait_for


def lacking() -> list[str]:
    """What this machine lacks; empty where a cluster can be brought up."""
    lacks = []
    if os.geteuid() != 0:
        lacks.append("root")
    if not Path("/etc/debian_version").exists():
        lacks.append("Debian or Ubuntu")
    elif packages := daemons.needed():
        lacks.append(f"packages (.ci/slurm installs them): {' '.join(packages)}")
    if not lacks:
        probe = ["unshare", "--net", "--uts", "--mount", "sh", "-c", "hostname probe && mount -t sysfs sysfs /sys"]
        ended = subprocess.run(probe, capture_output=True, text=True, check=False)
        if ended.returncode:
            lacks.append(f"network, uts and mount namespaces ({ended.stderr.strip()})")
    return lacks


def up(wanted: Layout) -> bool:
    """Whether it had to be brought up; one that is up already, with the same settings, is left alone."""
    if lacks := lacking():
        raise ClusterError(f"a Slurm cluster needs {'; '.join(lacks)}")
    with one_at_a_time(wanted.base):
        there = load(wanted.base)
        if there is not None and there.ready.exists() and _alive(there):
            _same(there, wanted)
            return False
        if there is not None:  # an up that was killed, or a machine that was switched off
            remove(there)
        layout = _claim(wanted)
        previous = signal.signal(signal.SIGTERM, _raise)
        try:
            _build(layout)
        except BaseException as error:
            hint = _last_lines(layout)
            remove(layout)
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}; everything made so far is removed\n{hint}") from None
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return True


def _alive(layout: Layout) -> bool:
    return any(running(layout.pid(name)) for name in daemons.daemons(layout))


def _same(there: Layout, wanted: Layout) -> None:
    for field in ("nodes", "accounting"):
        if getattr(there, field) != getattr(wanted, field):
            raise ClusterError(f"a cluster with {field}={getattr(there, field)} is up: python -m tests.cluster down")
    if gone := daemons.missing(there):
        raise ClusterError(f"a cluster is up, but not {', '.join(gone)}: python -m tests.cluster heal (or down)")


def _claim(wanted: Layout) -> Layout:
    """The base folder, empty before, and a net and ports that are free."""
    base = wanted.base
    if closed := [str(parent) for parent in base.parents if parent.exists() and not parent.stat().st_mode & 0o001]:
        raise ClusterError(f"{base}: users cannot pass {closed[0]}; set PKUSLURM_CLUSTER_DIR to another folder")
    existed = base.exists()
    if existed and any(base.iterdir()):
        raise ClusterError(f"{base} has something else in it: set PKUSLURM_CLUSTER_DIR to another folder")
    layout = replace(wanted, net=network.free_number(), ctld_port=_free_port(6817), dbd_port=_free_port(6819))
    base.mkdir(mode=0o755, exist_ok=True)
    if os.statvfs(base).f_flag & os.ST_NOEXEC:  # Debian's /run; slurmd runs batch scripts from its spool folder
        mount.tmpfs(base)
    save(layout)
    if not existed:
        record(layout, "base", str(base))
    return layout


def _build(layout: Layout) -> None:
    begin = time.monotonic()
    _folders(layout)
    install = _install_database(layout) if layout.accounting else None
    daemons.start_munged(layout)
    network.make(layout)
    people.make(layout)
    mount.shared(layout.base / "python")
    wait_for((layout.base / "munge" / "socket").exists, 20, "munged")
    if install is not None:
        _start_accounting(layout, install)
    daemons.start_slurmctld(layout)
    for name in layout.names:
        daemons.start_slurmd(layout, name)
    wait_for(lambda: daemons.all_idle(layout), 60, "all nodes to be idle")
    if layout.accounting:
        wait_for(lambda: _registered(layout), 60, "slurmctld to register with slurmdbd")
    layout.ready.write_text(f"{time.monotonic() - begin:.1f}\n", encoding="utf-8")


def _folders(layout: Layout) -> None:
    for name in ("etc", "log", "pids", "nodes", "dev", "home", "shared"):
        (layout.base / name).mkdir()
    for name in ("state", "munge", "mariadb") if layout.accounting else ("state", "munge"):
        (layout.base / name).mkdir(mode=0o700)
    (layout.base / "munge").chmod(0o711)  # the users reach the socket in it
    key = layout.base / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for number in range(texts.DEVICES):
        (layout.base / "dev" / f"npu{number}").touch()
    if not Path("/etc/slurm").exists():  # where the nodes mount theirs
        record(layout, "folder", "/etc/slurm")
        Path("/etc/slurm").mkdir()
    daemons.write_conf(layout)
    if layout.accounting:
        conf = layout.conf.parent / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text(texts.slurmdbd_conf(layout, daemons.host()), encoding="utf-8")
        (layout.base / "mariadb" / "my.cnf").write_text(texts.my_cnf(layout), encoding="utf-8")
    for name in layout.names:
        node = layout.node(name)
        (node / "spool").mkdir(parents=True)
        (node / "resolv.conf").touch()
        (node / "hostname").write_text(f"{name}\n", encoding="utf-8")
        (node / "hosts").write_text(texts.hosts(layout, daemons.host(), name), encoding="utf-8")


def _install_database(layout: Layout) -> subprocess.Popen[bytes]:
    command = ["mariadb-install-db", f"--defaults-file={layout.base / 'mariadb' / 'my.cnf'}", "--skip-test-db"]
    with layout.log("mariadb-install").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _start_accounting(layout: Layout, install: subprocess.Popen[bytes]) -> None:
    if install.wait(60):
        raise ClusterError(f"mariadb-install-db ended with {install.returncode}")
    daemons.start_mariadb(layout)
    wait_for((layout.base / "mariadb" / "socket").exists, 30, "MariaDB")
    daemons.start_slurmdbd(layout)
    for arguments in texts.accounts():
        daemons.checked("sacctmgr", "-i", "-Q", *arguments, layout=layout)


def _registered(layout: Layout) -> bool:
    """slurmctld's address has come to slurmdbd."""
    shown = daemons.call("sacctmgr", "-n", "-P", "show", "cluster", "format=Cluster,ControlHost", layout=layout)
    return shown.stdout.strip() == f"pkuslurm|{layout.host_address}"


def _free_port(first: int) -> int:
    for port in range(first, first + 200, 10):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise ClusterError(f"no free port from {first} on")


def _last_lines(layout: Layout) -> str:
    """The end of every log that has something, for the one who asks why."""
    said = []
    for log in sorted((layout.base / "log").glob("*")):
        if lines := log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]:
            said.append("\n".join([f"--- {log.name}", *lines]))
    return "\n".join(said)


def _raise(number: int, _: object) -> None:
    raise SystemExit(128 + number)
