"""The ordinary users, their folders, and commands run as one of them."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.layout import USERS, ClusterError, Layout, record
from tests.cluster.process import checked, clean_environment, kill_all, of_user


def make(layout: Layout) -> None:
    """The users, where they are missing, and a folder for each that the other cannot enter."""
    for user in USERS:
        if not _exists(user):
            home = layout.base / "home" / user
            record(layout, "user", user)
            checked(["useradd", "-m", "-d", str(home), "-s", "/bin/bash", "-c", "pkuslurm test cluster", user])
            home.chmod(0o700)
        entry = pwd.getpwnam(user)
        folder = layout.shared(user)
        folder.mkdir(mode=0o700, parents=True)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    layout.shared("common").mkdir(mode=0o755)


def delete(user: str) -> None:
    """What the user still runs ends with the user."""
    if _exists(user):
        kill_all(of_user(pwd.getpwnam(user).pw_uid))
        checked(["userdel", user])


def environment(layout: Layout, user: str) -> dict[str, str]:
    """What a login shell would start with."""
    entry = pwd.getpwnam(user)
    return clean_environment() | {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": entry.pw_dir,
        "USER": user,
        "LOGNAME": user,
        "SHELL": entry.pw_shell,
        "SLURM_CONF": str(layout.conf),
    }


@dataclass(frozen=True)
class Identity:
    uid: int
    gid: int
    groups: tuple[int, ...]


def identity(user: str) -> Identity:
    if user not in USERS:
        raise ClusterError(f"{user}: no user of the cluster; there are {', '.join(USERS)}")
    entry = pwd.getpwnam(user)
    return Identity(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(user, entry.pw_gid)))


def start(
    layout: Layout,
    user: str,
    argv: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a user's command on the login node (this machine), in a session of its own.

    ``env`` adds to a login's environment; the folder is the user's shared one.
    """
    who = identity(user)
    return subprocess.Popen(
        list(argv),
        cwd=cwd or layout.shared(user),
        env=environment(layout, user) | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        user=who.uid,
        group=who.gid,
        extra_groups=who.groups,
        # a shell that starts the tests in the background has Ctrl-C ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        umask=0o022,
    )


def run(
    layout: Layout,
    user: str,
    argv: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = 120,
) -> subprocess.CompletedProcess[str]:
    """``start``, to its end; what is over time is killed with all that it started."""
    with start(layout, user, argv, cwd, env) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


def become(layout: Layout, user: str, argv: Sequence[str], cwd: str | None) -> None:
    """Turn this process into the user's command."""
    who = identity(user)
    env = environment(layout, user) | ({"TERM": os.environ["TERM"]} if "TERM" in os.environ else {})
    os.setgroups(who.groups)
    os.setgid(who.gid)
    os.setuid(who.uid)
    os.umask(0o022)
    try:
        os.chdir(cwd or layout.shared(user))
        os.execvpe(argv[0], list(argv), env)
    except OSError as error:
        raise ClusterError(f"{user}: {error}") from None


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
