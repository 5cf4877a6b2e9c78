"""Where a fetched model lies, who may write there now, and what to do on a machine without a network."""

from __future__ import annotations

import fcntl
import getpass
import os
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch.hubs import HUGGING_FACE, MODELSCOPE
from pkuslurm.fetch.web import Hub, proxy_of
from pkuslurm.preflight.nearest import existing
from pkuslurm.read.text import size

_SPARE = 200_000_000  # beside the model: what others write meanwhile


def home_of(model: str, cache_root: str, environ: Mapping[str, str]) -> Path:
    """``$PKUSLURM_MODELS/OWNER/NAME`` where that may be written, else in the cache; launch looks in both."""
    given = environ.get("PKUSLURM_MODELS")
    if given and os.access(existing(Path(given).absolute()), os.W_OK | os.X_OK):
        return Path(given).absolute() / model
    return Path(cache_root) / "models" / model


def working(target: Path) -> Path:
    """Beside the model's folder, which appears when it is whole."""
    return target.with_name(f"{target.name}.part")


@contextmanager
def alone(target: Path) -> Iterator[Path]:
    """The working folder, for this process alone. Raises PkuslurmError where another one fetches the same."""
    work = working(target)
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise PkuslurmError(f"{work}: {error.strerror}; give a folder of your own: --to DIR") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode("utf-8", "replace").strip()
            raise PkuslurmError(
                f"{target}: another fetch of it is under way ({who}); wait until it has ended"
            ) from None
        except OSError:
            pass  # a disk without locks: two write the same bytes, and each checks them
        if not _same(handle, work / ".lock"):
            raise PkuslurmError(f"{target}: another fetch of it has just ended; fetch again to see how")
        os.truncate(handle, 0)
        os.write(handle, f"{socket.gethostname()}, process {os.getpid()}\n".encode())
        yield work
    finally:
        with suppress(OSError):
            if os.listdir(work) == [".lock"]:  # refused before anything came
                (work / ".lock").unlink()
                work.rmdir()
        os.close(handle)


def _same(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def check_room(folder: Path, needed: int) -> None:
    """Raise PkuslurmError unless ``needed`` bytes more go there. A quota is not known beforehand."""
    free = shutil.disk_usage(existing(folder)).free
    if free < needed + _SPARE:
        raise PkuslurmError(
            f"{folder}: {size(free)} are free, {size(needed + _SPARE)} are needed; make room, or give another "
            "folder: --to DIR"
        )


def without_network(hub: Hub, model: str, revision: str | None, target: Path, code: bool) -> list[str]:
    """What to type elsewhere and what to copy where, line by line; Chinese first."""
    name = model.rpartition("/")[2]
    user = os.environ.get("USER") or ""
    with suppress(KeyError, OSError):  # a user without an entry
        user = user or getpass.getuser()
    other = f"{user or 'USER'}@{socket.gethostname()}:{shlex.quote(str(target))}/"
    version = f" --revision {shlex.quote(revision)}" if revision else ""
    ours = f"pkuslurm fetch {model}"
    if hub.kind == "modelscope":
        # whoever has named another address needs it there, too
        secure = hub.endpoint.startswith("https://")  # the one variable that modelscope reads as well; it has no scheme
        variable = f"MODELSCOPE_DOMAIN={hub.host} " if secure else f"MODELSCOPE_ENDPOINT={shlex.quote(hub.endpoint)} "
        at = "" if hub.endpoint == MODELSCOPE else variable
        ours, theirs = f"{at}{ours}", f"{at}modelscope download --model {model} --local_dir {name}{version}"
    else:
        at = "" if hub.endpoint == HUGGING_FACE else f"HF_ENDPOINT={shlex.quote(hub.endpoint)} "
        ours = f"{ours} --from {shlex.quote(hub.endpoint) if at else 'huggingface'}"
        theirs = f"{at}hf download {model} --local-dir {name}{version}"
    ours += f"{version}{' --code' if code else ''} --to {name}"
    if (proxy := proxy_of(hub, hub.endpoint)) is None:
        reach = f"连不上 {hub.host}。需要代理就设 https_proxy", f"{hub.host}. Behind a proxy set https_proxy"
    else:
        reach = f"经代理 {proxy} 连不上 {hub.host}。先看代理对不对", f"{hub.host} through the proxy {proxy}: mend that"
    return [
        f"这台机器{reach[0]}；没有外网，就在一台能上网的机器上下载，再拷过来：",
        f"  本机       mkdir -p {shlex.quote(str(target))}",
        f"  那台机器   {ours}     （没有 pkuslurm：{theirs}）",
        f"  那台机器   rsync -a --partial --progress {name}/ {other}",
        f"This machine does not reach {reach[1]}; else fetch it elsewhere and copy it:",
        f"  here       mkdir -p {shlex.quote(str(target))}",
        f"  there      {ours}     (without pkuslurm: {theirs})",
        f"  there      rsync -a --partial --progress {name}/ {other}",
    ]
