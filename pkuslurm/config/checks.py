"""What a well-typed configuration can still get wrong. Pure; every refusal is one PkuslurmError."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pkuslurm.config.schema import Cluster, Config
from pkuslurm.errors import PkuslurmError

# LLaMA-Factory's keys that a run decides itself, and what to say instead.
OWNED = {
    "model_name_or_path": "model.path",
    "adapter_name_or_path": "infer.adapter",
    "template": "model.template",
    "trust_remote_code": "model.trust_remote_code",
    "dataset": "dataset.path (and dataset.name)",
    "dataset_dir": "dataset.path",
    "tokenized_path": "cache_root (tokenized data is kept there)",
    "media_dir": "dataset.path",
    "output_dir": "run_root (each run has a directory of its own below it)",
    "overwrite_output_dir": "nothing: every run writes to a new directory",
    "logging_dir": "run_root (logs are in the run's directory)",
    "resume_from_checkpoint": "nothing: a run goes on from its own checkpoints",
    "do_train": "pipeline",
    "do_predict": "infer.prompts",
    "predict_with_generate": "infer.prompts",
    "use_cpu": "cluster.accelerator=cpu",
    "export_dir": "run_root (the merged model is in the run's directory)",
    "ddp_backend": "cluster.accelerator",
    "deepspeed_plugin": "train.deepspeed",
}
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
JOBS = ("prepare", "train", "merge", "infer", "report")
# merge needs a train, infer a merge (or a model that is given), a report answers
PIPELINES = {JOBS[:count] for count in range(1, len(JOBS) + 1)} | {("infer",), ("infer", "report")}
# Exports that would make a folder which cannot be proved, or send it away.
UNPROVABLE = ("export_quantization_bit", "export_quantization_dataset", "export_hub_model_id")
JOB_KEYS_NOT_PER_KIND = (
    "executor",
    "arrays",
    "array_parallelism",
    "pack",
    "jobs",
    "meet",
    "join_timeout",
    "poll_seconds",
)


def check(config: Config, choices: Mapping[str, str]) -> None:
    """Raise PkuslurmError for the first value that cannot work, wherever it would be used."""
    _at_least("nodes", config.nodes, 1)
    _at_least("cluster.nproc_per_node", config.cluster.nproc_per_node, 1)
    _at_least("cluster.cpus_per_task", config.cluster.cpus_per_task, 1)
    _at_least("cluster.array_parallelism", config.cluster.array_parallelism, 1)
    _at_least("infer.max_new_tokens", config.infer.max_new_tokens, 1)
    _at_least("infer.batch_size", config.infer.batch_size, 1)
    _at_least("resume.max_attempts", config.resume.max_attempts, 1)
    _model(config, choices)
    _dataset(config)
    _expectations(config)
    _llamafactory(config)
    _secrets(config)
    _jobs(config)
    jobs = tuple(config.pipeline.jobs)
    if jobs not in PIPELINES:
        raise PkuslurmError(f"pipeline.jobs={list(jobs)}: a beginning of {list(JOBS)}, or [infer, report]")
    if config.name is not None and not config.name.strip():
        raise PkuslurmError("name='': a label needs at least one character, or null")


def check_pattern(pattern: str) -> None:
    """Raise PkuslurmError unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise PkuslurmError(f"infer.expect={pattern}: not a regular expression ({error})") from None


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise PkuslurmError(f"{key}={value}: it must be {least} or more")


def _model(config: Config, choices: Mapping[str, str]) -> None:
    model = config.model
    if model.make is None and model.path is None:
        raise PkuslurmError("model.path: no model is given; write model.path=/path/to/a/model, or choose model=tiny")
    if model.make is not None and model.path is not None and choices.get("model") != "custom":
        raise PkuslurmError(
            f"model.path={model.path}: model={choices.get('model', 'tiny')} makes its own model; leave one out"
        )
    templates = known_keys("templates")
    if model.template != "auto" and model.template not in templates:
        near = difflib.get_close_matches(model.template, sorted(templates), 3, 0.5) or ["qwen", "llama3", "default"]
        raise PkuslurmError(
            f"model.template={model.template}: LLaMA-Factory has no such template; did you mean {', '.join(near)}?"
        )


def _dataset(config: Config) -> None:
    if "train" in config.pipeline.jobs and config.dataset.path is None:
        raise PkuslurmError(
            "dataset.path: no data is given; write dataset.path=/path/to/data.json, or dataset=identity"
        )
    name = config.dataset.name
    if name is not None and ("," in name or not name.strip()):
        raise PkuslurmError(f"dataset.name={name}: one dataset's name, without commas")


def _expectations(config: Config) -> None:
    expect, prompts = config.infer.expect, config.infer.prompts
    patterns = [expect] if isinstance(expect, str) else expect or []
    for pattern in patterns:
        check_pattern(pattern)
    if isinstance(expect, list) and isinstance(prompts, list) and len(expect) != len(prompts):
        raise PkuslurmError(
            f"infer.expect: {len(expect)} expectations for {len(prompts)} prompts; give one for all, or one for each"
        )
    if "infer" in config.pipeline.jobs and not prompts:
        raise PkuslurmError("infer.prompts: nothing to ask; write infer.prompts=[你是谁], or a file of prompts")


@cache
def known_keys(command: str) -> frozenset[str]:
    """LLaMA-Factory's names, of every version we know: arguments of ``train`` or ``export``, or ``templates``."""
    file = Path(__file__).with_name("llamafactory_keys.json")
    versions = json.loads(file.read_text(encoding="utf-8"))
    return frozenset(key for version in versions.values() for key in version[command])


def _llamafactory(config: Config) -> None:
    _keys("train", config.train, known_keys("train"))
    _keys("merge", config.merge, known_keys("export"))
    for key in UNPROVABLE:
        if config.merge.get(key) is not None:
            raise PkuslurmError(f"merge.{key}: not yet built; merge the model, then run llamafactory-cli export on it")
    kind = config.train.get("finetuning_type", "lora")
    if "train" in config.pipeline.jobs and kind not in ("lora", "full", "freeze", "oft"):
        raise PkuslurmError(f"train.finetuning_type={kind}: it must be lora, full, freeze or oft")
    for key in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "cutoff_len"):
        value = config.train.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise PkuslurmError(f"train.{key}={value}: it must be a number")
        if not 0 < value < math.inf:
            raise PkuslurmError(f"train.{key}={value}: it must be more than 0")


def _keys(node: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in values:
        if key in OWNED:
            raise PkuslurmError(f"{node}.{key}: a run sets this itself; say it with {OWNED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 3, 0.6)
            hint = f"; did you mean {' or '.join(f'{node}.{name}' for name in near)}?" if near else ""
            raise PkuslurmError(f"{node}.{key}: LLaMA-Factory has no such key{hint}")


def _secrets(config: Config) -> None:
    """No secret may reach a file or an argv: every user of a cluster can read those (scontrol, ps)."""
    for node, values in (("cluster.env", config.cluster.env), ("train", config.train), ("merge", config.merge)):
        for key, value in values.items():
            looks_secret = SECRET.search(key) and value not in (None, "")
            if looks_secret and (node == "cluster.env" or key.endswith(("_token", "_key", "_secret", "_password"))):
                raise PkuslurmError(
                    f"{node}.{key}: a secret does not belong into a configuration; export {key.upper()} in your shell"
                )


def _jobs(config: Config) -> None:
    names = _cluster_keys()
    for kind, settings in config.cluster.jobs.items():
        if kind not in (*JOBS, "serve"):
            raise PkuslurmError(f"cluster.jobs.{kind}: kinds of jobs are {', '.join((*JOBS, 'serve'))}")
        if not isinstance(settings, Mapping):
            raise PkuslurmError(f"cluster.jobs.{kind}={settings}: it holds keys such as partition; set one of them")
        for key in settings:
            if key not in names:
                near = difflib.get_close_matches(str(key), sorted(names), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise PkuslurmError(f"cluster.jobs.{kind}.{key}: no such key{hint}")


def _cluster_keys() -> set[str]:
    return {name for name in Cluster.__dataclass_fields__ if name not in JOB_KEYS_NOT_PER_KIND}
