"""The machine and what surrounds it: devices, Slurm, containers, environment, network."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping

from pkuslurm.doctor import machine
from pkuslurm.doctor.check import Check
from pkuslurm.read.text import size
from pkuslurm.slurm import crane

RUNTIMES = ("apptainer", "singularity", "ch-run", "docker", "podman", "enroot")
SLURM = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
PING_SECONDS = 1.0


def hardware() -> Iterator[Check]:
    """Devices, cores and memory; without any of them one can still submit."""
    there = machine.devices()
    tools = [tool for tool in ("npu-smi", "nvidia-smi") if shutil.which(tool)]
    told = [
        f"{count} {'NPU' if kind == 'npu' else 'GPU'}{'s' if count > 1 else ''}"
        for kind, count in there.items()
        if count
    ]
    yield Check("devices", True, ", ".join([*(told or ["none: cluster.accelerator=cpu here"]), *tools]))
    cores, usable, share = machine.cores()
    detail = f"{cores}" + (f", {usable} of them for this process" if usable < cores else "")
    yield Check("cores", True, detail + (f", the cgroup allows {share:g}" if share and share < usable else ""))
    total, free, limit = machine.memory()
    parts = [f"{size(total)}" if total else "unknown", f"{size(free)} available" if free else ""]
    parts += [f"the cgroup allows {size(limit)}"] if limit else []
    yield Check("memory", True, ", ".join(filter(None, parts)))


def programs(environ: Mapping[str, str]) -> Iterator[Check]:
    """Slurm and the container runtimes on PATH; starts `scontrol ping` alone."""
    slurm = [name for name in SLURM if shutil.which(name)]
    job = environ.get("SLURM_JOB_ID")
    where = f"inside of job {job}" if job else "not inside of a job"
    missing = [name for name in SLURM if name not in slurm]
    controller = _ping() if "scontrol" in slurm and not crane.is_crane() else None
    if crane.is_crane():
        yield Check("Slurm", True, crane.WORKS)
    elif not slurm:
        yield Check("Slurm", True, f"not here; runs work on this machine (cluster=local), {where}")
    elif controller is None and "scontrol" in slurm:
        detail = f"{slurm[0]} is installed, but no cluster answers here; cluster=local works"
        yield Check("Slurm", False, detail, "on a cluster's login node: ask the site, wait")
    else:
        detail = f"{', '.join(slurm)}; {where}" + (f"; missing: {', '.join(missing)}" if missing else "")
        remedy = "load the site's Slurm module, or work on a login node" if missing else None
        yield Check("Slurm", not missing, detail, remedy)
    if controller:
        yield Check("slurmctld", True, controller)
    runtimes = [name for name in RUNTIMES if shutil.which(name)]
    yield Check("containers", True, ", ".join(runtimes) or "no runtime on PATH")


def _ping() -> str | None:
    """What the controllers say; None where none is up."""
    try:
        done = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=PING_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    up = done.returncode == 0 and "UP" in done.stdout.split("Slurmctld")[-1]
    return textwrap.shorten(done.stdout, 200, placeholder=" …") if up else None


def surroundings(environ: Mapping[str, str]) -> Iterator[Check]:
    """What of the shell gets in the way later: umask, locale, proxies; the network, asked."""
    mask = machine.umask()
    if mask is not None:
        loose = not mask & 0o002
        yield Check("umask", not loose, f"{mask:04o}", "umask 022: others may write what you make" if loose else None)
    yield _locale(environ)
    told = [name for name in PROXIES if environ.get(name) or environ.get(name.upper())]
    around = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    caught = bool(told) and not any(name in around for name in ("localhost", "127.0.0.1", "*"))
    remedy = "export NO_PROXY=localhost,127.0.0.1: else requests to this very machine go through the proxy"
    # names only: a proxy's address may hold a password
    yield Check("proxies", not caught, ", ".join(told) or "none", remedy if caught else None)
    hub = {name: environ[name] for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME") if environ.get(name)}
    hub |= {name: environ[name] for name in ("MODELSCOPE_CACHE", "PKUSLURM_MODELS") if environ.get(name)}
    yield Check("hubs", True, ", ".join(f"{name}={value}" for name, value in hub.items()) or "no variable set")
    yield from _network()


def _locale(environ: Mapping[str, str]) -> Check:
    import locale

    encodings = {locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.stdout.encoding or "?"}
    good = all(name.lower().replace("-", "") == "utf8" for name in encodings)
    named = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or "not set"
    remedy = None if good else "export LANG=C.UTF-8 LC_ALL=C.UTF-8, or PYTHONUTF8=1: Chinese file names need it"
    return Check("locale", good, f"{named}: {', '.join(sorted(encodings))}", remedy)


def _network() -> Iterator[Check]:
    why = machine.loopback()
    remedy = None if why is None else "without a port on 127.0.0.1 the ranks of a node cannot meet"
    yield Check("loopback", why is None, why or "a port can be opened on 127.0.0.1", remedy, True)
    name = socket.gethostname()
    address = machine.own_address(name)
    if address is None:
        remedy = "local runs work; between nodes, name the network card: cluster.env.GLOO_SOCKET_IFNAME=eth0"
        yield Check("host name", False, f"{name} resolves to nothing here", remedy)
    elif address.startswith("127."):
        remedy = (
            f"{address} in /etc/hosts: other nodes cannot reach this one by it; cluster.env.GLOO_SOCKET_IFNAME=eth0"
        )
        yield Check("host name", False, f"{name} is {address}", remedy)
    else:
        yield Check("host name", True, f"{name} is {address}")
