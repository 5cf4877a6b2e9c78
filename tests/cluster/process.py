"""Daemons and other processes: started with a pid file, signalled only while they are still the same process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.cluster.layout import ClusterError

MARK = "PKUSLURM_CLUSTER_DAEMON"  # in every daemon's environment: the base folder that it belongs to


def checked(command: Sequence[str], text: str | None = None) -> str:
    """Run it, with ``text`` on its stdin; what it prints. Raises ClusterError where it fails."""
    ended = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if ended.returncode:
        given = f" ({text.strip()})" if text else ""
        raise ClusterError(f"{' '.join(command)}: {ended.stderr.strip() or ended.returncode}{given}")
    return ended.stdout


def born(pid: int) -> str:
    """When a process started (clock ticks after boot); "" once it has ended, a zombie included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def start(command: Sequence[str], log: Path, pid_file: Path, base: Path, env: Mapping[str, str] | None = None) -> None:
    """Start a daemon that stays in the foreground."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd="/",
            env={**clean_environment(), MARK: str(base), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pid_file.write_text(f"{process.pid} {born(process.pid)} {_boot()}\n", encoding="utf-8")
    process.returncode = 0  # it outlives us on purpose: no warning about that


def clean_environment() -> dict[str, str]:
    """A daemon's and a login's start: nothing of the caller's shell."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def running(pid_file: Path) -> int | None:
    """The pid, if the process that wrote the file's pid down still runs; None for a recycled pid or another boot."""
    try:
        pid, when, boot = pid_file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return int(pid) if boot == _boot() and when == born(int(pid)) else None


def started(pid_file: Path) -> str:
    """When a daemon was started, as Slurm writes times."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(pid_file.stat().st_mtime))


def send(pid_file: Path, number: signal.Signals) -> bool:
    """Signal a daemon; False if it does not run."""
    pid = running(pid_file)
    return pid is not None and signal_if(pid, number, lambda _: running(pid_file) == pid)


def signal_if(pid: int, number: signal.Signals, same: Callable[[int], bool]) -> bool:
    """Signal ``pid`` if ``same`` holds for it. The handle is opened before the check: no recycled pid is hit."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not same(pid):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def kill_all(belongs: Callable[[int], bool], seconds: float = 10) -> None:
    """SIGKILL every process that ``belongs``, until none is left: they may fork meanwhile."""

    def none_left() -> bool:
        left = [pid for pid in pids() if belongs(pid)]
        for pid in left:
            signal_if(pid, signal.SIGKILL, belongs)
        return not left

    wait_for(none_left, seconds, "processes to end after SIGKILL", every=0.02)


def pids() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and born(int(entry)):
            yield int(entry)


def marked(base: Path) -> Callable[[int], bool]:
    """Whether a process is a daemon of the cluster in ``base`` (or its child: slurmscriptd, slurmstepd)."""
    wanted = f"{MARK}={base}".encode()
    return lambda pid: wanted in _read(pid, "environ").split(b"\0")


def in_netns(netns: str) -> Callable[[int], bool]:
    """Whether a process lives in a network namespace."""
    try:
        inode = os.stat(f"/run/netns/{netns}").st_ino
    except FileNotFoundError:
        return lambda _: False
    return lambda pid: _net(pid) == inode


def of_user(uid: int) -> Callable[[int], bool]:
    def belongs(pid: int) -> bool:
        try:
            return os.stat(f"/proc/{pid}").st_uid == uid
        except OSError:
            return False

    return belongs


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def wait_for(holds: Callable[[], bool], seconds: float, what: str, every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


def _net(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
