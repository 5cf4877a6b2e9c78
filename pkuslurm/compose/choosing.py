"""The groups that were left to us: which model, data and training go with what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pkuslurm.compose import presets
from pkuslurm.compose.presets import Defaults
from pkuslurm.compose.words import reword
from pkuslurm.errors import PkuslurmError

# What a command without a word composes; settings are told as differences from it.
SHIPPED = {
    "cluster": "local",
    "container": "none",
    "pipeline": "full",
    "infer": "default",
    "train": "lora",
    "dataset": "identity",
    "model": "tiny",
}


def foreseen(overrides: Sequence[str], roots: Sequence[Path], defaults: Defaults) -> list[str] | None:
    """What ``choose`` will say, where the command line alone decides: it saves the half of a launch's composing."""
    typed = {key.lstrip("+"): value.strip("'\"") for key, _, value in (item.partition("=") for item in overrides)}
    files = {group: presets.file_of(group, typed.get(group, choice), roots) for group, choice in SHIPPED.items()}
    decisive = [typed.get(key, "null") for key in ("train.finetuning_type", "dataset.path", "model.path")]
    executor = typed.get("cluster.executor")
    if (
        (defaults.choices or defaults.values or "experiment" in typed)
        or any(file is None or not presets.is_ours(file) for file in files.values())
        or any("$" in value for value in (*decisive, executor or ""))
        or "auto" in [typed.get(group) for group in SHIPPED]
    ):
        return None
    if executor is None and files["cluster"] is not None:
        content = presets.plain(files["cluster"])
        executor = str(content.get("cluster", content).get("executor", "local"))  # with notes it is @package _global_
    kind, data, model = decisive
    default = "tiny" if executor == "local" else "qwen2.5-1.5b-instruct"
    chosen = {
        "train": kind if kind in ("full", "freeze") else "lora",
        "dataset": "identity" if data == "null" else "custom",
        "model": default if model == "null" else "custom",
    }
    return [f"{group}={choice}" for group, choice in chosen.items() if group not in typed]


def choose(raw: DictConfig, choices: Mapping[str, str]) -> list[str]:
    """The groups that were left to us (``auto``), from what else was said, by presets too."""
    chosen = []
    try:
        if choices.get("train") == "auto":
            kind = raw.train.get("finetuning_type")
            chosen.append(f"train={kind if kind in ('full', 'freeze') else 'lora'}")
        if choices.get("dataset") == "auto":
            chosen.append("dataset=custom" if raw.dataset.path is not None else "dataset=identity")
        if choices.get("model") == "auto":
            default = "tiny" if raw.cluster.executor == "local" else "qwen2.5-1.5b-instruct"
            chosen.append("model=custom" if raw.model.path is not None else f"model={default}")
    except (OmegaConfBaseException, AttributeError) as error:
        raise PkuslurmError(reword(error, [])) from None
    return chosen
