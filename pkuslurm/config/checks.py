"""What a well-typed configuration can still get wrong. Pure; every refusal is one PkuslurmError."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from pkuslurm.config.cluster_checks import at_least, check_cluster, positive
from pkuslurm.config.devices import check_devices
from pkuslurm.config.llamafactory import check_keys, check_template
from pkuslurm.config.parse import show
from pkuslurm.config.schema import JOBS, Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command

# LLaMA-Factory's keys that a run decides itself, and what to say instead.
OWNED = {
    "model_name_or_path": "model.path",
    "adapter_name_or_path": "model.adapter (of pipeline=infer: infer.adapter)",
    "template": "model.template",
    "trust_remote_code": "model.trust_remote_code",
    "dataset": "dataset.path (and dataset.name)",
    "dataset_dir": "dataset.path",
    "tokenized_path": "cache_root (tokenized data is kept there)",
    "media_dir": "dataset.media_dir",
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
# Of these, what a YAML may say (from_yaml): LLaMA-Factory does it in the train job.
CARRIED = ("do_train", "do_predict", "predict_with_generate")
# merge needs a train, infer a merge (or a model that is given), a report answers
PIPELINES = {JOBS[:count] for count in range(1, len(JOBS) + 1)} | {("merge",), ("infer",), ("infer", "report")}
# what a full fine-tune leaves is a whole model
PIPELINES |= {("prepare", "train", "infer"), ("prepare", "train", "infer", "report")}
# Exports that would make a folder which cannot be proved, or send it away.
UNPROVABLE = ("export_quantization_bit", "export_quantization_dataset", "export_hub_model_id")
# What people call LLaMA-Factory's keys.
SHORT = {
    "lr": "learning_rate",
    "epoch": "num_train_epochs",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
}


def check(config: Config, choices: Mapping[str, str]) -> None:
    """Raise PkuslurmError for the first value that cannot work, wherever it would be used."""
    at_least("nodes", config.nodes, 1)
    _name(config.name)
    check_cluster(config.cluster)
    check_devices(config.cluster, config.pipeline.jobs, config.nodes)
    _pipeline(config)
    _model(config, choices)
    _dataset(config)
    _expectations(config)
    _llamafactory(config)
    _container(config)
    _later(config)


def _name(name: str | None) -> None:
    if name is None:
        return
    if not re.search(r"\w", name):
        raise PkuslurmError(f"name={show(name)}: a label needs at least one letter or digit")
    if "/" in name or not name.isprintable():
        raise PkuslurmError(f"name={show(name)}: a label is part of a folder's name; it holds no / and no line break")
    if len(name) > 60:
        raise PkuslurmError(f"name={show(name)}: {len(name)} characters; a label has at most 60")


def _pipeline(config: Config) -> None:
    jobs = tuple(config.pipeline.jobs)
    if jobs not in PIPELINES:
        raise PkuslurmError(
            f"pipeline.jobs=[{show(','.join(jobs))}]: it must be a beginning of [{','.join(JOBS)}], or [infer,report], "
            "or [merge]"
        )
    kind = config.train.get("finetuning_type", "lora")
    if "infer" in jobs and "train" in jobs and "merge" not in jobs and kind not in ("full", "freeze"):
        raise PkuslurmError(
            f"pipeline.jobs=[{','.join(jobs)}]: train.finetuning_type={show(kind)} leaves an adapter, which is merged "
            "before it is asked; put merge before infer"
        )


def _container(config: Config) -> None:
    container = config.container
    if container.runtime != "none" and container.image is None:
        raise PkuslurmError(
            f"container.image: container.runtime={container.runtime} runs an image; "
            "write container.image=/path/to/image.sif (or its name in a registry)"
        )
    if container.runtime == "none" and container.image is not None:
        raise PkuslurmError(
            f"container.image={show(container.image)}: nothing runs it; write container=apptainer "
            "(or singularity, charliecloud, docker, podman, enroot, pyxis), or leave it out"
        )
    if container.runtime == "pyxis" and config.cluster.executor != "slurm":
        raise PkuslurmError("container.runtime=pyxis: it is a part of Slurm's srun; choose a cluster with Slurm")


def _later(config: Config) -> None:
    """Ranges of what requeues, servers and answers are told."""
    at_least("infer.max_new_tokens", config.infer.max_new_tokens, 1)
    at_least("infer.batch_size", config.infer.batch_size, 1)
    at_least("resume.max_attempts", config.resume.max_attempts, 1)
    positive("resume.hang_minutes", config.resume.hang_minutes)
    positive("serve.idle_minutes", config.serve.idle_minutes)
    if not 1 <= config.resume.signal_seconds <= 65535:
        raise PkuslurmError(f"resume.signal_seconds={config.resume.signal_seconds}: it must be from 1 to 65535")
    if config.serve.port is not None and not 1024 <= config.serve.port <= 65535:
        raise PkuslurmError(f"serve.port={config.serve.port}: it must be from 1024 to 65535 (those below are root's)")
    if isinstance(config.serve.command, str):
        try:
            shlex.split(config.serve.command)
        except ValueError as error:
            raise PkuslurmError(
                f"serve.command={show(config.serve.command)}: {error}; quote it as in a shell"
            ) from None
    if (config.serve.engine == "command") != (config.serve.command is not None):
        raise PkuslurmError(
            f"serve.engine={config.serve.engine}, serve.command={show(config.serve.command)}: a command goes with "
            "serve.engine=command, as in serve.engine=command serve.command='my_server --model {model} --port {port}'"
        )


def check_pattern(pattern: str) -> None:
    """Raise PkuslurmError unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        hint = r"a literal ( [ + or ? is written \(  \[  \+  \?"
        raise PkuslurmError(f"infer.expect={show(pattern)}: not a regular expression ({error}); {hint}") from None


def _model(config: Config, choices: Mapping[str, str]) -> None:
    model = config.model
    url = re.match(r"\w+://(?:[^/]+/)?(?:models/)?(\w[\w.-]*/\w[\w.-]*)?", model.path or "")
    if url is not None:
        name = url.group(1) or "OWNER/NAME"
        raise PkuslurmError(
            f"model.path={show(model.path)}: a URL is no model folder; download it first: {command('fetch', name)}"
        )
    if model.make is None and model.path is None:
        raise PkuslurmError("model.path: no model is given; write model.path=/path/to/a/model, or choose model=tiny")
    if model.make is not None and model.path is not None and choices.get("model") != "custom":
        raise PkuslurmError(
            f"model.path={model.path}: model={choices.get('model', 'tiny')} makes its own model; leave one out"
        )
    if model.template != "auto":
        check_template(model.template, None)


def _dataset(config: Config) -> None:
    if "train" in config.pipeline.jobs and config.dataset.path is None:
        raise PkuslurmError(
            "dataset.path: no data is given; write dataset.path=/path/to/data.json, or dataset=identity"
        )
    if re.match(r"\w+://", config.dataset.path or ""):
        raise PkuslurmError(f"dataset.path={show(config.dataset.path)}: a URL is no data file; download it first")
    name = config.dataset.name
    if name is not None and not all(one.strip() for one in name.split(",")):
        raise PkuslurmError(f"dataset.name={name}: a name is empty; of several: 'a,b'")
    if name is not None and "," in name and (config.dataset.columns or config.dataset.tags):
        key = "columns" if config.dataset.columns else "tags"
        raise PkuslurmError(
            f"dataset.{key}: it describes one dataset, and dataset.name={name} names several; "
            "describe each in dataset_info.json"
        )


def _expectations(config: Config) -> None:
    expect, prompts = config.infer.expect, config.infer.prompts
    patterns = [expect] if isinstance(expect, str) else expect or []
    for pattern in patterns:
        check_pattern(pattern)
    if isinstance(expect, list) and isinstance(prompts, list) and len(expect) != len(prompts):
        raise PkuslurmError(
            f"infer.expect: {len(expect)} expectations for {len(prompts)} prompts; give one for all, or one for each"
        )
    if isinstance(prompts, list) and not all(text.strip() for text in prompts):
        raise PkuslurmError("infer.prompts: one of the questions is empty; leave it out")
    if "infer" in config.pipeline.jobs and not prompts:
        raise PkuslurmError("infer.prompts: nothing to ask; write infer.prompts=[你是谁], or a file of prompts")


def _llamafactory(config: Config) -> None:
    """Against every version that is known; preflight knows which one it will be."""
    for node, values in (("train", config.train), ("merge", config.merge)):
        allowed: tuple[str, ...] = CARRIED if config.from_yaml is not None else ()
        allowed = ("export_dir",) if node == "merge" and config.pipeline.jobs == ["merge"] else allowed
        short = SHORT if config.from_yaml is None else {}  # a YAML that LLaMA-Factory takes means what it says
        _ours(node, [key for key in values if key not in allowed], short)
    check_keys("train", config.train, None)
    check_keys("merge", config.merge, None)
    for key in UNPROVABLE:
        if config.merge.get(key) is not None:
            raise PkuslurmError(f"merge.{key}: not yet built; merge the model, then run llamafactory-cli export on it")


def _ours(node: str, keys: Iterable[str], short: Mapping[str, str]) -> None:
    for key in keys:
        if node == "train" and key in short:
            raise PkuslurmError(f"train.{key}: LLaMA-Factory has no such key; did you mean train.{short[key]}?")
        if key in OWNED:
            raise PkuslurmError(f"{node}.{key}: a run sets this itself; say it with {OWNED[key]}")
