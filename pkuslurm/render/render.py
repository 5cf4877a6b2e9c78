"""The plan as files: everything that a run consists of before it starts, as text. Pure.

``dry_run`` prints these, ``submit`` writes them; there is no third way.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pkuslurm.config import devices
from pkuslurm.paths import BOOT, PAYLOAD
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.plan import JobSpec, RunPlan
from pkuslurm.plan.resources import cluster_for
from pkuslurm.render.containers import container_of
from pkuslurm.render.llamafactory import export_dir, merge_args, timeouts_of, to_yaml, train_args
from pkuslurm.rundir import RunDir
from pkuslurm.slurm import parse
from pkuslurm.worker.accelerators import ACCELERATORS, COMMON_ENV, UNSET

SCHEMA_VERSION = 1
# The model's name in the cache: the number goes up when the recipe in payload/tiny_model.py changes.
TINY_MODEL = "tiny-1"
# As many of a run's questions are offered in the chat page.
MOST_BUTTONS = 16
# cluster.env.HF_TOKEN=${oc.env:HF_TOKEN}: the value stays where it is
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)\}")


@dataclass(frozen=True)
class RunFiles:
    """``texts``: file name relative to the run directory → content."""

    run: RunDir
    texts: Mapping[str, str]
    jobs: Mapping[str, Mapping[str, Any]]


def module_command(python: str, module: str, *arguments: str) -> list[str]:
    """``python -m module`` for a package that may not be on python's path."""
    return [python, "-P", str(BOOT), module, *arguments]


def worker_command(python: str, run: RunDir, kind: str) -> list[str]:
    """What starts a job's worker on one node; the same for every executor."""
    return module_command(python, "pkuslurm.worker", str(run.job(kind)))


def render(plan: RunPlan, inputs: Inputs, run: RunDir, config_yaml: str, own_python: str) -> RunFiles:
    """Every file of the run. ``own_python`` has pkuslurm, ``inputs.python`` has LLaMA-Factory."""
    config = plan.config
    texts: dict[str, str] = {"config.yaml": config_yaml}
    if {"prepare", "train"} & set(plan.kinds):
        texts["dataset_info.json"] = _json(_dataset_info(inputs, run))
    if "train" in plan.kinds:
        texts["train.yaml"] = to_yaml(train_args(config, inputs, run))
    if "merge" in plan.kinds:
        texts["merge.yaml"] = to_yaml(merge_args(config, inputs, run))
    jobs = {job.kind: _job(plan, job, inputs, run, own_python) for job in plan.jobs}
    texts.update({f"jobs/{kind}.json": _json(job) for kind, job in jobs.items()})
    return RunFiles(run, texts, jobs)


def render_serve(plan: RunPlan, inputs: Inputs, run: RunDir, own_python: str, key_file: str) -> dict[str, Any]:
    """jobs/serve.json of a ``plan.serving``: the worker starts our door on the host, which starts the engines."""
    job = _job(plan, plan.job("serve"), inputs, run, own_python)
    engines = {"container": job["container"], "key_file": key_file}
    return job | {"container": None, "payload": job["payload"] | engines}


def _dataset_info(inputs: Inputs, run: RunDir) -> dict[str, Any]:
    """LLaMA-Factory's description of the data; a file in another encoding is read from the copy that prepare makes."""
    copies = {source.name: run.copy_of(number) for number, source in enumerate(inputs.more, 2) if source.convert}
    if inputs.convert:
        copies[next(iter(inputs.dataset_info))] = run.dataset
    return {
        name: entry | ({"file_name": str(copies[name])} if name in copies else {})
        for name, entry in inputs.dataset_info.items()
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _job(plan: RunPlan, job: JobSpec, inputs: Inputs, run: RunDir, own_python: str) -> dict[str, Any]:
    payload, expect = _SETTINGS[job.kind](plan, inputs, run)
    env, env_names = _env(plan, job)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.run_id,
        "kind": job.kind,
        "key": f"{run.run_id}-{'pack' if plan.config.cluster.pack else job.kind}",
        "run_dir": str(run.path),
        "parents": list(job.parents),
        "nodes": job.nodes,
        "nproc_per_node": job.nproc_per_node,
        "accelerator": cluster_for(plan.config, job.kind).accelerator,
        "devices": _devices(plan, job),
        "first_attempt": 1,
        "command": job_command(
            job.kind, run, job.nodes, job.nproc_per_node, inputs.python, own_python, _launcher(plan, job)
        ),
        "env": env,
        "env_names": env_names,
        "unset": list(UNSET),
        "container": container_of(plan.config, job.kind, inputs, env, PAYLOAD.parent.parent),
        "payload": payload | {"result": str(run.result(job.kind))},
        "expect": expect,
        "resume": {
            "max_attempts": plan.config.resume.max_attempts,
            "hang_minutes": plan.config.resume.hang_minutes if job.kind == "train" else None,
        },
    } | _started_by(plan, job, run, own_python)


def _started_by(plan: RunPlan, job: JobSpec, run: RunDir, own_python: str) -> dict[str, Any]:
    """What whoever starts the worker must know."""
    if plan.config.cluster.executor == "slurm":
        return _submission(plan, job, run, own_python)
    return {"setup": list(job.request.setup)} if job.request.setup else {}


def _submission(plan: RunPlan, job: JobSpec, run: RunDir, own_python: str) -> dict[str, Any]:
    """What Slurm is asked for, and the worker that it starts: a retry submits the job from its file alone."""
    return {
        "worker": worker_command(own_python, run, job.kind),
        "request": {
            "options": job.request.options,
            "setup": list(job.request.setup),
            "signal_seconds": _signal_seconds(plan.config.resume.signal_seconds, job.request.options.get("time")),
            "pack": plan.config.cluster.pack,
            "umask": "027" if plan.config.access == "group" else "077",
        },
    }


def _signal_seconds(seconds: int, limit: object) -> int:
    """A warning that would come before the job has begun leaves a quarter of its time limit instead."""
    minutes = parse.minutes(str(limit)) if limit is not None else None
    return seconds if not minutes or seconds < minutes * 60 else minutes * 15


def _devices(plan: RunPlan, job: JobSpec) -> int | None:
    """How many devices this job must find on each node: as many as Slurm was asked for, else one a rank."""
    cluster = cluster_for(plan.config, job.kind)
    if job.kind != "train" or cluster.accelerator == "cpu":
        return None
    return devices.of(cluster.accelerator, devices.asked(vars(cluster), job.nodes)) or job.nproc_per_node


def _launcher(plan: RunPlan, job: JobSpec) -> str:
    cluster = cluster_for(plan.config, job.kind)
    return ACCELERATORS[cluster.accelerator].launcher if cluster.launcher == "auto" else cluster.launcher


def job_command(
    kind: str, run: RunDir, nodes: int, nproc: int, python: str, own_python: str, launcher: str
) -> list[str]:
    """What a job's worker starts; it fills in $NODE_RANK, $MASTER_ADDR, $MASTER_PORT, which a started job has."""
    if kind == "report":
        return module_command(own_python, "pkuslurm", "report", str(run.path))
    if kind == "serve":
        return module_command(own_python, "pkuslurm.serve", str(run.job(kind)))
    payload = [str(PAYLOAD), kind, str(run.job(kind))]
    if kind != "train":
        return [python, *payload]
    node = [
        "--nnodes", str(nodes),
        "--node_rank", "$NODE_RANK",
        "--nproc_per_node", str(nproc),
        "--master_addr", "$MASTER_ADDR",
        "--master_port", "$MASTER_PORT",
    ]  # fmt: skip
    if launcher == "prefork":
        # unbuffered, as torchrun starts its ranks; their words are torchrun's
        return [python, "-u", payload[0], "prefork", *node, *payload[1:]]
    return [python, "-m", "torch.distributed.run", *node, *payload]


def _env(plan: RunPlan, job: JobSpec) -> tuple[dict[str, str], dict[str, str]]:
    """Variables with their values, and those that come from the environment, by name: a secret is never written."""
    cluster = cluster_for(plan.config, job.kind)
    env = {**COMMON_ENV, **ACCELERATORS[cluster.accelerator].env}
    nodes = ACCELERATORS[plan.config.cluster.accelerator]
    if nodes.device != "cpu":  # a job without devices, on such nodes all the same
        env = {name: value for name, value in env.items() if not nodes.never.match(name)}
    if job.kind == "train":
        env |= ACCELERATORS[cluster.accelerator].collective
        env |= timeouts_of(plan.config)[1]
        cores = cluster.cpus_per_task
        # local nodes share the machine's cores: with one thread a rank they do not fight for them
        env["OMP_NUM_THREADS"] = str(max(1, cores // job.nproc_per_node)) if cores else "1"
        if cluster.executor == "local":
            env["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo takes the host name's address, which may not answer
    given = {key: str(value) for key, value in cluster.env.items()}
    names = {key: match[1] for key, value in given.items() if (match := _FROM_ENVIRONMENT.fullmatch(value))}
    return env | {key: value for key, value in given.items() if key not in names}, names


Settings = tuple[dict[str, Any], dict[str, Any]]


def _prepare(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    train = plan.job("train") if "train" in plan.kinds else None
    payload: dict[str, Any] = {
        "make": plan.config.model.make,
        "model_path": inputs.model_path,
        "cache_root": plan.config.cache_root,
        "data_dir": str(run.data),
        "dataset_file": inputs.dataset_file,
        "convert_to": str(run.dataset) if inputs.convert else None,
        "formatting": inputs.formatting,
        "train_args": train_args(plan.config, inputs, run),
        "ranks": train.nodes * train.nproc_per_node if train else 1,
    }
    if inputs.more:
        payload["more"] = [
            {
                "name": source.name,
                "dataset_file": source.file,
                "formatting": source.formatting,
                "convert_to": str(run.copy_of(number)) if source.convert else None,
            }
            for number, source in enumerate(inputs.more, 2)
        ]
    return payload, {"dir": str(run.data), "model": inputs.model_path}


def _train(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    lora = plan.config.train.get("finetuning_type", "lora") in ("lora", "oft")
    payload = {
        "yaml": str(run.train_yaml),
        "progress": str(run.progress("train")),
        "stop_file": str(run.stop("train")),
        "failures": str(run.failures),
        "start": str(run.attempt("train")),
    }
    return payload, {"dir": str(run.adapter), "weights": "adapter_model.safetensors" if lora else "model"}


def _merge(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    payload = {
        "yaml": str(run.merge_yaml),
        "adapter": str(run.adapter) if "train" in plan.kinds else inputs.start,
        "merged": export_dir(plan.config, run),
        "base": inputs.model_path,
    }
    if payload["merged"] != str(run.merged):
        payload["link"] = str(run.merged)
    return payload, {"dir": str(run.merged)}


def _infer(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    config = plan.config
    tuned_here, merged_here = ("train" in config.pipeline.jobs, "merge" in config.pipeline.jobs)
    lora = config.train.get("finetuning_type", "lora") in ("lora", "oft")
    payload = {
        "base": inputs.model_path if tuned_here else inputs.base,
        "adapter": str(run.adapter) if tuned_here and lora else None,
        "tuned": str(run.merged if merged_here else run.adapter) if tuned_here else inputs.model_path,
        "tuned_adapter": None if tuned_here else inputs.adapter,
        "template": inputs.template,
        "default_system": config.train.get("default_system"),
        "trust_remote_code": config.model.trust_remote_code,
        "prompts": [asdict(prompt) for prompt in inputs.prompts],
        "max_new_tokens": config.infer.max_new_tokens,
        "batch_size": config.infer.batch_size,
        "answers": str(run.answers),
        "device": ACCELERATORS[cluster_for(config, "infer").accelerator].device,
    }
    if isinstance(file := config.infer.prompts, str) and any(prompt.expect for prompt in inputs.prompts):
        column = f"the {'column' if file.endswith('.csv') else 'field'} expect of {file}"
        payload["expected_by"] = column if config.infer.expect is None else f"infer.expect or {column}"
    if "enable_thinking" in config.train:
        payload["enable_thinking"] = config.train["enable_thinking"]  # asked in the form in which it was trained
    return payload, {"file": str(run.answers), "lines": len(inputs.prompts)}


def _report(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    return {}, {"file": str(run.report)}


def _serve(plan: RunPlan, inputs: Inputs, run: RunDir) -> Settings:
    asked, serve = _infer(plan, inputs, run)[0], plan.config.serve
    models = [{"name": name, "path": asked[name]} for name in ("base", "tuned") if asked[name]]
    alike = ("template", "default_system", "enable_thinking", "trust_remote_code", "answers")
    payload = {name: asked[name] for name in alike if name in asked} | {
        "models": models,
        "device": ACCELERATORS[cluster_for(plan.config, "serve").accelerator].device,
        "engine": serve.engine,
        "command": shlex.split(serve.command) if isinstance(serve.command, str) else serve.command,
        "python": inputs.python,
        "payload": str(PAYLOAD),
        "bind": "cluster" if plan.config.cluster.executor == "slurm" else "loopback",
        "port": serve.port,
        "idle_minutes": serve.idle_minutes,
        "prompts": [{"prompt": one.prompt, "system": one.system} for one in inputs.prompts[:MOST_BUTTONS]],
        "infer_result": str(run.result("infer")),
        "endpoint": str(run.endpoint),
    }
    return payload, {"file": str(run.result("serve"))}


_SETTINGS = {"prepare": _prepare, "train": _train, "merge": _merge, "infer": _infer} | {
    "report": _report,
    "serve": _serve,
}
