"""train.yaml, merge.yaml and dataset_info.json: what ``llamafactory-cli train|export`` can be given by hand. Pure."""

from __future__ import annotations

from typing import Any

import yaml

from pkuslurm.config.schema import Config
from pkuslurm.paths import absolute
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.resources import cluster_for
from pkuslurm.rundir import RunDir
from pkuslurm.worker.accelerators import ACCELERATORS, DDP, timeouts


def train_args(config: Config, inputs: Inputs, run: RunDir) -> dict[str, Any]:
    """LLaMA-Factory's arguments of the train job, in the order in which a person would write them."""
    args: dict[str, Any] = {"model_name_or_path": inputs.model_path}
    if config.model.trust_remote_code:
        args["trust_remote_code"] = True
    if inputs.start is not None:
        args["adapter_name_or_path"] = inputs.start
    head = ("stage", "do_train", "finetuning_type", "lora_rank", "lora_target")
    args |= {"stage": "sft", "do_train": True}
    args |= {key: config.train[key] for key in head if key in config.train}
    args |= {
        "dataset": inputs.dataset_name,
        "dataset_dir": str(run.path),
        "tokenized_path": str(run.data),
        "template": inputs.template,
    }
    if inputs.media_dir is not None:
        args["media_dir"] = inputs.media_dir
    args |= {key: value for key, value in config.train.items() if key not in head}
    if isinstance(args.get("deepspeed"), str):
        args["deepspeed"] = absolute(args["deepspeed"])  # jobs start in the run's directory
    args |= inputs.paths
    args |= ACCELERATORS[cluster_for(config, "train").accelerator].yaml
    if (seconds := timeouts_of(config)[0]) is not None:
        args[DDP] = seconds
    args["output_dir"] = str(run.adapter)
    return args


def timeouts_of(config: Config) -> tuple[int | None, dict[str, str]]:
    """torch's ddp_timeout and HCCL's variables, where ranks meet over HCCL; else none of ours. Raises PkuslurmError."""
    cluster = cluster_for(config, "train")
    if ACCELERATORS[cluster.accelerator].backend != "hccl":
        return None, {}
    return timeouts(config.train.get(DDP), {name: str(value) for name, value in cluster.env.items()})


def merge_args(config: Config, inputs: Inputs, run: RunDir) -> dict[str, Any]:
    """LLaMA-Factory's arguments of the export. A full fine-tune's output is a whole model already."""
    tuned_here = "train" in config.pipeline.jobs
    kind = config.train.get("finetuning_type", "lora") if tuned_here else "lora" if inputs.start else "full"
    lora = kind in ("lora", "oft")
    args: dict[str, Any] = {"model_name_or_path": inputs.model_path if lora or not tuned_here else str(run.adapter)}
    if config.model.trust_remote_code:
        args["trust_remote_code"] = True
    if lora:
        args["adapter_name_or_path"] = str(run.adapter) if tuned_here else inputs.start
    args["template"] = inputs.template
    args["finetuning_type"] = kind
    args["export_dir"] = export_dir(config, run)
    ours = ("export_dir",) if tuned_here else ("export_dir", "finetuning_type")
    return args | {key: value for key, value in config.merge.items() if key not in ours}


def export_dir(config: Config, run: RunDir) -> str:
    """Where the merged model goes: into the run, or (pipeline=merge) where merge.export_dir says."""
    given = config.merge.get("export_dir")
    return str(run.merged) if given is None else absolute(str(given))


def to_yaml(args: dict[str, Any]) -> str:
    return yaml.safe_dump(args, allow_unicode=True, sort_keys=False, default_flow_style=False, width=10**6)
