"""Containers are a prefix: each runtime is one function that puts its words before a command. Pure, standard library.

The worker stays on the host; what it starts runs inside, with every path of the job where it is outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pkuslurm.errors import PkuslurmError


@dataclass(frozen=True)
class Container:
    """``mounts``: files and folders of the job; ``if_there``: what the node may have, with wildcards.

    What follows ``home`` is known on the node only; until then it stands as a dry run shows it.
    """

    runtime: str
    image: str
    accelerator: str
    mounts: tuple[str, ...]
    if_there: tuple[str, ...]
    home: str  # $HOME inside: caches are written there, whatever the image lets
    cwd: str = "RUN_DIR"
    program: str = ""  # the runtime's own; "": as it is found on PATH
    name: str = "RUN_ID-KIND-ATTEMPT-RANK"
    user: str = "UID:GID"
    groups: tuple[str, ...] = ()
    node: str = "NODE"
    cpus: str = "CPUS"
    deaf_to: tuple[str, ...] = ("USR1", "USR2")  # what is ignored here is not ignored behind a daemon
    gpus: tuple[str, ...] = ()  # Slurm's numbers; none: all
    overlay: bool = False  # charliecloud 0.36 and later lay a writable layer over the image


Wrap = Callable[[Container, Sequence[str], Sequence[str], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Runtime:
    """``splits``: what its options make two of; ``registry``: whether an image may be a name instead of a path.

    ``by_name``: it passes the variables that it is told, by name, and no others; else it passes all that it has, and
    ``override`` before a name makes ours win over the image's.
    """

    wrap: Wrap
    program: str
    splits: str
    registry: bool
    by_name: bool = False
    override: str = ""


# What the driver on the node brings: the image has the toolkit, which must not have a driver of its own.
IF_THERE: Mapping[str, tuple[str, ...]] = {
    "npu": (
        *("/dev/davinci[0-9]*", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"),
        *("/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi"),
        *("/etc/ascend_install.info", "/etc/hccn.conf"),
    ),
    "cuda": (),  # each runtime has its own way
    "cpu": (),
}
# What the worker sets for every command, and the mark by which its guard knows the tree.
WORKERS = (
    *("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "PET_SIGNALS_TO_HANDLE"),
    *("PKUSLURM_ATTEMPT", "PKUSLURM_NODE_RANK", "PKUSLURM_TREE"),
)
# Of the node's environment a command inside sees these, and not its PATH, PYTHONPATH, CUDA_HOME, LD_LIBRARY_PATH.
_PASSED = re.compile(
    r"PKUSLURM_\w+|PET_\w+|(HCCL|HCCN|NCCL|GLOO|TP|OMP|KMP|PYTORCH|TORCH_NCCL|TORCH_DISTRIBUTED)_\w+"
    r"|TORCH_(LOGS|CPP_LOG_LEVEL|SHOW_CPP_STACKTRACES|DEVICE_BACKEND_AUTOLOAD)"
    r"|ASCEND_(RT_VISIBLE_DEVICES|VISIBLE_DEVICES|DEVICE_ID|LAUNCH_BLOCKING|GLOBAL_\w+|SLOG_\w+)"
    r"|NPU_(VISIBLE_DEVICES|DEVICE_ORDINAL)|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING)"
    r"|TZ|USER|LOGNAME|(?i:(http|https|no|all)_proxy)"
)
# What the runtimes themselves read; harmless inside.
_RUNTIMES_OWN = re.compile(r"PATH|HOME|XDG_\w+|SLURMD?_\w+|(APPTAINER|SINGULARITY|CH|ENROOT|PYXIS)(ENV)?_\w+")

_CANN = (
    # not with set -u: CANN's scripts read variables that nobody has set; they put theirs before what is there
    "for f in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do "
    '[ -r "$f" ] && . "$f" && break; done; '
    "d=/usr/local/Ascend/driver/lib64; "
    'export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$d/driver:$d/common:$d"; '
)
# The image's variables, which ch-run sets over ours or not at all: here they fill up what is not set. PATH is theirs.
_CHARLIECLOUD = (
    "if [ -r /ch/environment ]; then while IFS= read -r line; do n=${line%%=*}; "
    'case $n in "$line" | "" | [0-9]* | *[!A-Za-z0-9_]*) continue ;; PATH) ;; '
    '*) eval "s=\\${$n+x}"; [ -z "$s" ] || continue ;; esac; export "$line"; done </ch/environment; fi; '
)


def wrap(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    """``argv`` inside the container, with these variables (by name, never by value) and these paths as outside."""
    return RUNTIMES[container.runtime].wrap(container, argv, env_names, mounts)


def passed(env: Mapping[str, str], own: Sequence[str], container: Container) -> list[str]:
    """The names of ``env`` that a command inside must see: ``own``, and what a scheduler or a person says there."""
    names = {name for name in env if name in own or name in WORKERS or _PASSED.fullmatch(name)} | {"PKUSLURM_TREE"}
    if container.runtime in ("docker", "podman"):  # only the job's devices are there, and they count from 0 anew
        if container.gpus and container.accelerator == "cuda":
            names.discard("CUDA_VISIBLE_DEVICES")
        if container.accelerator == "npu" and env.get("ASCEND_RT_VISIBLE_DEVICES"):
            names.discard("ASCEND_RT_VISIBLE_DEVICES")
    return sorted(names - {"HOME"})


def environment(container: Container, env: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """What the runtime's own program is started with."""
    runtime = RUNTIMES[container.runtime]
    if container.runtime == "none" or (runtime.by_name and container.runtime != "enroot"):
        return dict(env)  # a client: it finds its daemon, its images by it
    kept = {name: value for name, value in env.items() if name in names or _RUNTIMES_OWN.fullmatch(name)}
    return kept | {f"{runtime.override}{name}": kept[name] for name in names if runtime.override and name in kept}


def stop(container: Container) -> list[str] | None:
    """The command that ends what a daemon runs for us, for it is nobody's child here."""
    if container.runtime in ("docker", "podman"):
        return [_program(container), "rm", "--force", container.name]
    return None


def refuse_splitting(runtime: str, paths: Sequence[str]) -> None:
    """Raise PkuslurmError for a path that the runtime's options would make two of."""
    for path in paths:
        for character in RUNTIMES[runtime].splits:
            if character in path:
                raise PkuslurmError(
                    f"container.runtime={runtime}: it splits paths at {character!r}, and {path} has one; "
                    "give a path without it, or choose another runtime"
                )


def outermost(paths: Sequence[str]) -> list[str]:
    """Each path that is not below another one, once, in order."""
    whole = [PurePosixPath(path) for path in dict.fromkeys(paths)]
    return [str(path) for path in whole if not any(parent in whole for parent in path.parents)]


# Folders whose content is the image's: of these the one file is mounted, not all that lies beside it.
_SYSTEM = frozenset(
    (
        *("/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/mnt", "/opt", "/proc", "/root", "/run"),
        *("/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/share"),
        *("/var", "/var/tmp"),
    )
)


def around(file: str) -> str:
    """The folder of ``file``, with what belongs to it beside it; the file alone in a folder of the system."""
    folder = str(PurePosixPath(file).parent)
    return file if folder in _SYSTEM else folder


def _program(container: Container) -> str:
    return container.program or RUNTIMES[container.runtime].program


def _inside(container: Container, argv: Sequence[str], first: str = "") -> list[str]:
    """``argv`` after what an image's entrypoint would have done; the shell becomes it."""
    npu = container.accelerator == "npu"
    deaf = f"trap '' {' '.join(container.deaf_to)}; " if container.deaf_to else ""
    ready = f"{first}{_CANN if npu else ''}{deaf}"
    script = f'export HOME="$1"; cd "$2" || exit; shift 2; {ready}exec "$@"'
    return ["bash" if npu else "sh", "-c", script, "sh", container.home, container.cwd, *argv]


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _none(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    return list(argv)


def _apptainer(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    # /tmp stays the node's: the writable layer is 64 MB small
    nv = ["--nv"] if container.accelerator == "cuda" else []
    options = ["--no-home", "--writable-tmpfs", *nv, *_each("--bind", mounts)]
    return [_program(container), "exec", *options, container.image, *_inside(container, argv)]


def _charliecloud(
    container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]
) -> list[str]:
    # it brings the node's /dev and /tmp; in an image that cannot be written it makes no folder to mount at
    if not container.overlay:
        mounts = [_first_folder(path) for path in mounts]
    binds = [path for path in outermost(mounts) if PurePosixPath(path).parts[1] not in ("dev", "tmp")]
    options = [*(["--write-fake"] if container.overlay else []), *_each("--bind", binds)]
    return [_program(container), *options, container.image, "--", *_inside(container, argv, _CHARLIECLOUD)]


# Where an image has its own: there only what is named is mounted.
IMAGES_OWN = frozenset(("bin", "boot", "ch", "dev", "etc", "lib", "lib32", "lib64", "libx32", "opt", "proc", "root"))
IMAGES_OWN |= frozenset(("sbin", "sys", "tmp", "usr", "var"))


def _first_folder(path: str) -> str:
    first = PurePosixPath(path).parts[1]
    return path if first in IMAGES_OWN else f"/{first}"


def _docker(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    gpus = f'"device={",".join(container.gpus)}"' if container.gpus else "all"  # docker reads the value as CSV
    options = ["--init", "--user", container.user, *_each("--group-add", container.groups)]
    options += ["--gpus", gpus] if container.accelerator == "cuda" else []
    return _oci(container, options, argv, env_names, mounts)


def _podman(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    # no --init: its catatonit is a package of its own. Rootless, the user stays the user; root has no other to map to
    options = [] if container.user.startswith("0:") else ["--userns", "keep-id"]
    if container.accelerator == "npu":
        options += ["--group-add", "keep-groups"]  # the devices belong to a group
    if container.accelerator == "cuda":
        options += _each("--device", [f"nvidia.com/gpu={number}" for number in container.gpus or ("all",)])
    return _oci(container, ["--security-opt", "label=disable", *options], argv, env_names, mounts)


def _oci(
    container: Container, own: Sequence[str], argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]
) -> list[str]:
    devices = [path for path in mounts if path.startswith("/dev/")]
    volumes = [f"{path}:{path}" for path in mounts if path not in devices]
    return [
        _program(container), "run", "--rm", "--name", container.name,
        "--network", "host", "--ipc", "host", "--entrypoint", "",
        *own, *_each("--device", devices), *_each("--volume", volumes), *_each("--env", env_names),
        container.image, *_inside(container, argv),
    ]  # fmt: skip


def _enroot(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    options = ["--rw", *_each("--mount", mounts), *_each("--env", env_names)]
    return [_program(container), "start", *options, container.image, *_inside(container, argv)]


def _pyxis(container: Container, argv: Sequence[str], env_names: Sequence[str], mounts: Sequence[str]) -> list[str]:
    # a step of the same job beside the worker's own
    return [
        _program(container), "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={container.node}",
        f"--cpus-per-task={container.cpus}", "--cpu-bind=none", "--export=ALL", "--input=none", "--unbuffered",
        f"--container-image={container.image}",
        f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
        f"--container-env={','.join(env_names)}",
        "--container-writable", "--no-container-mount-home", "--no-container-entrypoint",
        *_inside(container, argv),
    ]  # fmt: skip


RUNTIMES: Mapping[str, Runtime] = {
    "none": Runtime(_none, "", "", registry=False),
    "apptainer": Runtime(_apptainer, "apptainer", ":,", registry=False, override="APPTAINERENV_"),
    "singularity": Runtime(_apptainer, "singularity", ":,", registry=False, override="SINGULARITYENV_"),
    "charliecloud": Runtime(_charliecloud, "ch-run", ":", registry=False),
    "docker": Runtime(_docker, "docker", ":", registry=True, by_name=True),
    "podman": Runtime(_podman, "podman", ":", registry=True, by_name=True),
    "enroot": Runtime(_enroot, "enroot", ": \t\n\\#", registry=True, by_name=True),
    "pyxis": Runtime(_pyxis, "srun", ":, \t\n\\#", registry=True),
}
