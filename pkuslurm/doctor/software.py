"""Our own Python and its packages, and the one that has LLaMA-Factory."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pkuslurm import __version__
from pkuslurm.doctor import interpreter, machine
from pkuslurm.doctor.check import Check
from pkuslurm.doctor.interpreter import Python
from pkuslurm.paths import BUNDLED, PACKAGE
from pkuslurm.payload.bytecode import PLACES

NEEDED = ("hydra-core", "omegaconf", "submitit", "rich", "PyYAML")
TRAINING = ("llamafactory", "torch", "torch-npu", "transformers", "peft", "datasets", "accelerate", "trl")
TRAINER = "LLaMA-Factory"
COMPILED = ("torch", "transformers", "llamafactory")
# any of these: it may be another machine's Python, or an image's, that trains
ELSEWHERE = ("sbatch", "apptainer", "singularity", "ch-run", "docker", "podman", "enroot")


def own() -> Iterator[Check]:
    """The Python that runs pkuslurm, and what pkuslurm needs of it."""
    python = interpreter.own()
    old = sys.version_info < (3, 11)
    yield Check(
        "python", not old, f"{python.version} {python.program}", "use Python 3.11 or newer" if old else None, True
    )
    yield Check("pkuslurm", True, f"{__version__} {PACKAGE}")
    found = interpreter.versions(python, NEEDED)
    missing = [name for name in NEEDED if name not in found]
    unfit = interpreter.unfit(python, "pkuslurm", tuple(name.lower() for name in NEEDED))
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    wrong = [f"{name} is missing" for name in missing] + unfit
    remedy = f"{shlex.quote(python.program)} -m pip install -U pkuslurm" if wrong else None
    yield Check("packages", not wrong, "; ".join([detail, *wrong]), remedy, True)
    proc = Path("/proc/self/stat").exists()
    remedy = None if proc else "a Linux machine with /proc is wanted: processes are found and ended by it"
    yield Check("/proc", proc, "readable" if proc else "not there", remedy, True)


def training(python: Python | str, named: str | None, environ: Mapping[str, str]) -> Iterator[Check]:
    """The Python that trains; ``python`` is a text where it cannot be asked: why."""
    here = not any(map(shutil.which, ELSEWHERE))
    if isinstance(python, str):
        yield Check(TRAINER, False, f"{named}: {python}", "name a Python that is there: cluster.python=", True)
        return
    found = interpreter.versions(python, TRAINING)
    if "llamafactory" not in found:
        where = f"not in {python.program} ({python.version})"
        install = "" if BUNDLED else "pip install 'pkuslurm[train]', or "
        remedy = f"{install}cluster.python=PATH of one that has it, or a container image"
        yield Check(TRAINER, False, where, remedy, here)
        return
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Check(TRAINER, True, f"{detail} in {python.program} (Python {python.version})")
    if unfit := interpreter.unfit(python, "llamafactory", TRAINING):
        pip = f"{shlex.quote(python.program)} -m pip"
        remedy = f"{pip} install llamafactory=={found['llamafactory']}, which brings what it wants"
        yield Check("LLaMA-Factory fits", False, "; ".join(unfit), remedy)
    yield _bytecode(python, environ)
    yield from _devices_fit(found)


def _bytecode(python: Python, environ: Mapping[str, str]) -> Check:
    modules, compiled = interpreter.bytecode(python, COMPILED)
    detail = f"{compiled} of {modules} modules of {', '.join(COMPILED)} are compiled"
    if environ.get("PYTHONPYCACHEPREFIX"):
        return Check("bytecode", True, f"{detail}; PYTHONPYCACHEPREFIX={environ['PYTHONPYCACHEPREFIX']} has the rest")
    if compiled >= 0.9 * modules:
        return Check("bytecode", True, detail)
    folder = next((path for path in python.path if Path(path, "llamafactory").is_dir()), python.prefix)
    remedy = f"{shlex.quote(python.program)} -m compileall -q -j 0 {shlex.quote(folder)}"
    if not os.access(folder, os.W_OK):
        kept = f"{folder} cannot be written: each node's first job compiles the others, some 9 s, into {PLACES[0]}"
        return Check("bytecode", True, f"{detail}; {kept}", f"to spare the nodes that, ask its owner for: {remedy}")
    return Check("bytecode", False, f"{detail}: every rank compiles the others at each start, some 9 s", remedy)


def _devices_fit(found: Mapping[str, str]) -> Iterator[Check]:
    there = machine.devices()
    if there["npu"] and "torch-npu" not in found:
        yield Check("torch and NPU", False, "NPUs are here, torch-npu is not", "pip install 'pkuslurm[ascend]'")
    if there["cuda"] and "+cpu" in found.get("torch", ""):
        remedy = "pip install torch from the index for your CUDA, see pytorch.org"
        yield Check("torch and CUDA", False, f"GPUs are here, torch {found['torch']} is built without CUDA", remedy)
