"""``python …/boot.py pkuslurm.byhand KIND YAML [PROMPTS]``: the job file of a LLaMA-Factory YAML, for sbatch/*.sbatch.

Prints its path. What the job says of itself goes into ``<output folder>.pkuslurm``, beside what it makes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pkuslurm.errors import PkuslurmError
from pkuslurm.guard import guarded
from pkuslurm.preflight.prompts import read_prompts
from pkuslurm.render.render import SCHEMA_VERSION, job_command
from pkuslurm.rundir import RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.worker import devices as on_node
from pkuslurm.worker import requeue
from pkuslurm.worker.accelerators import ACCELERATORS, COMMON_ENV, DDP, UNSET, timeouts
from pkuslurm.worker.state import host_name

# The key of the YAML that names the folder which the job fills, and that folder's name in our directory.
MAKES = {"train": ("output_dir", "adapter"), "merge": ("export_dir", "merged")}


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    if len(argv) not in (2, 3) or argv[0] not in ("train", "merge", "infer"):
        raise PkuslurmError(f"byhand {' '.join(argv)}: wanted are train|merge|infer, a YAML, and for infer its prompts")
    kind, file, *more = argv
    print(job_file(kind, Path(file).absolute(), more[0] if more else None, environ))
    return 0


def job_file(kind: str, file: Path, prompts: str | None, environ: Mapping[str, str]) -> Path:
    """Write the job file of ``file`` and return its path. Raises PkuslurmError for a YAML that cannot be used."""
    args = _read(file)
    run = RunDir(_folder(kind, file, args))
    accelerator, devices = devices_of(args, environ)
    nproc = _count("NPROC_PER_NODE", environ) or devices or 1 if kind == "train" else 1
    nodes = _count("SLURM_JOB_NUM_NODES", environ) or 1 if kind == "train" else 1
    python = environ.get("PKUSLURM_PYTHON") or sys.executable
    payload, expect = _settings(kind, file, args, run, prompts, accelerator)
    _check_free(run, kind, environ)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("jobs", "logs", "state", "done", "results"):
        (run.path / name).mkdir(exist_ok=True, mode=0o700)
    _link(kind, run, args)
    before = (read_json(run.state(kind)) or {}).get("attempt")
    job = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "kind": kind,
        "key": environ.get("SLURM_JOB_NAME") or kind,
        "run_dir": str(run.path),
        "cwd": os.getcwd(),  # relative paths in the YAML start there, as above; sbatch --chdir may have set it
        "parents": [],
        "nodes": nodes,
        "nproc_per_node": nproc,
        "accelerator": accelerator,
        "devices": max(nproc, devices) if kind == "train" and accelerator != "cpu" else None,
        "first_attempt": before + 1 if isinstance(before, int) else 1,
        "command": job_command(kind, run, nodes, nproc, python, sys.executable, ACCELERATORS[accelerator].launcher),
        "env": {**COMMON_ENV, **ACCELERATORS[accelerator].env, **_collective(kind, accelerator, args, environ)},
        "env_names": {},
        "unset": list(UNSET),
        "payload": payload | {"result": str(run.result(kind))},
        "expect": expect,
    }
    write_json(run.job(kind), job)
    return run.job(kind)


def _collective(kind: str, accelerator: str, args: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks on NPUs need to meet; their time-outs fit the YAML's ddp_timeout, which is 1800 where it says none."""
    if kind != "train" or ACCELERATORS[accelerator].backend != "hccl":
        return {}
    found: dict[str, str] = {}
    with suppress(PkuslurmError):  # a module's, in another order: whoever works by hand has the last word
        found = timeouts(args.get(DDP, 1800), environ)[1]
    return {
        name: value for name, value in {**ACCELERATORS[accelerator].collective, **found}.items() if name not in environ
    }


def _check_free(run: RunDir, kind: str, environ: Mapping[str, str]) -> None:
    """Raise PkuslurmError where another job fills the same folder now."""
    state, before = read_json(run.state(kind)) or {}, read_json(run.job(kind)) or {}
    job_id = str(state.get("job_id"))
    if state.get("state") != "RUNNING" or job_id == environ.get("SLURM_JOB_ID"):
        return
    row = commands.queue([job_id]).rows.get(job_id)
    if row is not None and row.name == before.get("key") and row.state == "RUNNING":
        raise PkuslurmError(f"{run.path}: job {job_id} works on it; let it end, or scancel {job_id} first")


def devices_of(args: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str, int]:
    """The accelerator and how many this node has for the job: PKUSLURM_ACCELERATOR, else use_cpu, else Slurm's."""
    named = environ.get("PKUSLURM_ACCELERATOR") or ("cpu" if args.get("use_cpu") is True else None)
    if named is not None and named not in ACCELERATORS:
        raise PkuslurmError(f"PKUSLURM_ACCELERATOR={named}: it must be {', '.join(ACCELERATORS)}")
    possible = [named] if named else ["npu", "cuda"]
    for accelerator in possible:
        row = ACCELERATORS[accelerator]
        # a list of them, or their number; SLURM_JOB_GPUS alone does not say that these are NPUs
        others = () if named else ACCELERATORS["cuda"].lists if accelerator == "npu" else ()
        for variable in (row.visible, *row.lists, row.count):
            text = environ.get(variable, "").strip() if variable not in others else ""
            if text and text != "NoDevFiles":
                number = variable == row.count and text.isdecimal()
                return accelerator, int(text) if number else len(text.split(","))
    if named != "cpu" and (job_id := environ.get("SLURM_JOB_ID")):  # plain Slurm sets nothing for NPUs
        told = requeue.details(environ) or ""
        for accelerator in possible:
            found = on_node.allocated(told, ACCELERATORS[accelerator].gres, host_name(environ), job_id)
            if found:
                return accelerator, len(found)
    return named or "cpu", 0


def _read(file: Path) -> dict[str, Any]:
    try:
        args = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PkuslurmError(f"{file}: it cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(args, dict):
        raise PkuslurmError(f"{file}: it holds no LLaMA-Factory arguments (key: value)")
    return args


def _folder(kind: str, file: Path, args: Mapping[str, Any]) -> Path:
    if kind not in MAKES:
        return file.with_suffix(".pkuslurm")
    key = MAKES[kind][0]
    if not args.get(key):
        raise PkuslurmError(f"{file}: {key} is not set; name the folder that is to be filled")
    made = Path(str(args[key])).expanduser().absolute()
    return made.with_name(made.name + ".pkuslurm")


def _link(kind: str, run: RunDir, args: Mapping[str, Any]) -> None:
    """adapter, merged: links to what the YAML names, so that the proof of it lies beside it."""
    if kind in MAKES:
        key, name = MAKES[kind]
        link = run.path / name
        target = Path(str(args[key])).expanduser().absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)


def _settings(
    kind: str, file: Path, args: Mapping[str, Any], run: RunDir, prompts: str | None, accelerator: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    lora = args.get("finetuning_type", "lora") in ("lora", "oft")
    if kind == "train":
        payload: dict[str, Any] = {
            "yaml": str(file),
            "progress": str(run.progress(kind)),
            "stop_file": str(run.stop(kind)),
        }
        payload["failures"] = str(run.failures)
        return payload, {"dir": str(run.adapter), "weights": "adapter_model.safetensors" if lora else "model"}
    base = args.get("model_name_or_path")
    if not base:
        raise PkuslurmError(f"{file}: model_name_or_path is not set; name the model's folder")
    adapter = args.get("adapter_name_or_path") if lora else None
    if kind == "merge":
        target = str(Path(str(args["export_dir"])).expanduser().absolute())
        return {"yaml": str(file), "adapter": adapter, "merged": target, "base": base}, {"dir": str(run.merged)}
    if prompts is None:
        raise PkuslurmError("infer: the questions are missing; write sbatch infer.sbatch my.yaml questions.txt")
    rows = read_prompts(Path(prompts).absolute())
    asked = [{"prompt": row.prompt, "expect": row.expect, "system": row.system} for row in rows]
    return {
        "base": base if adapter else None,
        "adapter": None,
        "tuned": base,
        "tuned_adapter": adapter,
        "template": args.get("template") or "default",
        "default_system": args.get("default_system"),
        "trust_remote_code": bool(args.get("trust_remote_code")),
        "prompts": asked,
        "max_new_tokens": args.get("max_new_tokens") or 128,
        "batch_size": 16,
        "answers": str(run.answers),
        "device": ACCELERATORS[accelerator].device,
    }, {"file": str(run.answers), "lines": len(asked)}


def _count(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name, "")
    if text and not (text.isdecimal() and int(text)):
        raise PkuslurmError(f"{name}={text}: it must be a whole number from 1")
    return int(text) if text else None


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:], os.environ)))
