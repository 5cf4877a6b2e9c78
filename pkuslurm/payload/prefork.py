"""``__main__.py prefork OPTIONS train JOBFILE``: a node's ranks, forked from one process that has imported for all.

torchrun starts each rank anew, and each imports some 4,800 modules. Here one process imports them and then becomes the
ranks. LLaMA-Factory itself is left to the ranks: its import asks the devices, and a device that was asked before a fork
cannot be used after it. Whatever else could make a fork unsafe is looked at before; where something is found, this
process becomes torchrun and says why.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from . import ranks

# the modules that LLaMA-Factory and its trainer import, in their order, each name only where no other brings it along
MODULES = Path(__file__).with_name("preload.txt")
# the ranks' own: its import asks the devices
NEVER = "llamafactory"
# LLaMA-Factory first mends what this one asks of transformers: without that all optional packages seem installed
AFTER = "trl"
# with more than one thread the libraries start theirs while they are imported, and a fork has none of them
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# started by pyarrow's allocator, which stops and restarts it around a fork
HARMLESS = "jemalloc_bg_thd"
# kinds of devices that torch may know; one that is initialised cannot be forked
DEVICES = ("cuda", "npu", "xpu", "mtia", "mlu", "musa")
_CUDA_NOT_INITIALIZED = 3


def options(argv: Sequence[str]) -> tuple[ranks.Node, list[str]]:
    """torchrun's own words for this node, and what each rank runs. Exits 2 on others."""
    parser = argparse.ArgumentParser("prefork", allow_abbrev=False)
    for name in ("nnodes", "node_rank", "nproc_per_node", "master_port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--master_addr", required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    found = vars(parser.parse_args(argv))
    command = found.pop("command")
    return ranks.Node(**found), command


def fork(argv: Sequence[str], modules: Sequence[str] | None = None) -> list[str]:
    """Returns in each rank, with what it is to run. The process that called ends when its ranks have."""
    node, command = options(argv)
    given = dict(os.environ)
    if node.nproc_per_node > 1:
        given.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    problem = unfit(given)
    if problem is None:
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
        # asks the driver's library beside CUDA, which may be initialised once only, in the rank
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported; as train.py has it
        gc.disable()  # of what is imported nothing goes away, and to look for it takes a second
        preload(listed() if modules is None else modules)
        problem = unsafe()
    if problem is not None:
        _torchrun(node, command, given, problem)
    gc.freeze()  # else the ranks' first collection writes to, and so copies, every page
    ranks.fork(node, given)
    gc.enable()
    _as_if_started(given)
    return command


def listed() -> list[str]:
    lines = MODULES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def preload(modules: Sequence[str]) -> None:
    """Import ``modules``; what is not there, or fails, is left to the rank that needs it, which says so."""
    for name in modules:
        if name.partition(".")[0] not in (NEVER, AFTER):
            with suppress(Exception):
                importlib.import_module(name)


def unfit(environ: Mapping[str, str]) -> str | None:
    """What speaks against a fork before anything is imported."""
    if not environ.get("OMP_NUM_THREADS", "").isdecimal():
        return f"OMP_NUM_THREADS={environ.get('OMP_NUM_THREADS', '')} is no number of threads for each rank"
    if importlib.util.find_spec("torch_npu") is not None:
        return "torch_npu is installed, which is made for spawn and forkserver, not for fork"
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0":
        for point in metadata.entry_points(group="torch.backends"):
            return f"torch loads {point.value} by itself, which may touch its devices"
    return None


def unsafe() -> str | None:
    """What would be broken in a fork of this process as it is now."""
    if NEVER in sys.modules:
        return f"{NEVER} was imported before the fork, and asks the devices"
    torch = sys.modules.get("torch")
    for name in DEVICES:
        initialized = getattr(getattr(torch, name, None), "is_initialized", None)
        if initialized is not None and initialized():
            return f"the import initialised torch.{name}"
    libraries = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    if "libascendcl" in libraries:
        return "the import loaded libascendcl"
    if "/libcuda.so" in libraries and ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != (
        _CUDA_NOT_INITIALIZED
    ):
        return "the import initialised CUDA"
    if threads := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        return f"the import started threads: {', '.join(threads)}"
    if tasks := _tasks():
        return f"a library started threads: {', '.join(tasks)}"
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return "the import started processes"


def _tasks() -> list[str]:
    """The names of this process's threads but the first, and those that do no harm."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            if int(task.name) != os.getpid():
                found.append((task / "comm").read_text(encoding="utf-8", errors="replace").strip())
    return [name for name in found if name != HARMLESS]


def _as_if_started(given: Mapping[str, str]) -> None:
    """What a rank that was started anew would have: its number of threads, random numbers of its own."""
    torch, threads = sys.modules.get("torch"), int(given["OMP_NUM_THREADS"])
    if torch is not None and threads > 1:
        torch.set_num_threads(threads)
    # Python's own are made anew after a fork by itself
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (fingerprints := sys.modules.get("datasets.fingerprint")) is not None:
        fingerprints.fingerprint_rng.seed()  # for names of files that the ranks share


def _torchrun(node: ranks.Node, command: Sequence[str], environ: Mapping[str, str], why: str) -> NoReturn:
    print(f"pkuslurm prefork: {why}; torchrun starts the ranks", file=sys.stderr, flush=True)
    words = [word for name, value in vars(node).items() for word in (f"--{name}", str(value))]
    main = str(Path(__file__).with_name("__main__.py"))
    argv = [sys.executable, "-m", "torch.distributed.run", *words, main, *command]
    os.execve(sys.executable, argv, environ)
