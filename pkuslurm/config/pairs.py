"""Values that LLaMA-Factory refuses together, minutes later and in every rank; and packages that they need. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pkuslurm.config.llamafactory import Keys, snapshots
from pkuslurm.config.pair_rules import RULES, Context, listed
from pkuslurm.config.parse import show
from pkuslurm.errors import PkuslurmError

# The package that a key asks for: LLaMA-Factory and transformers refuse without it.
NEEDS = {
    "use_unsloth": ("unsloth",),
    "enable_liger_kernel": ("liger-kernel",),
    "use_galore": ("galore-torch",),
    "use_apollo": ("apollo-torch",),
    "use_badam": ("badam",),
    "use_adam_mini": ("adam-mini",),
    "use_swanlab": ("swanlab",),
    "mixture_of_depths": ("mixture-of-depth",),
    "deepspeed": ("deepspeed",),
    "plot_loss": ("matplotlib",),
    "predict_with_generate": ("jieba", "nltk", "rouge-chinese"),
}
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardx"),
    "wandb": ("wandb",),
    "swanlab": ("swanlab",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
# What LLaMA-Factory 0.9.4 takes of DeepSpeed (its check of versions).
DEEPSPEED_0_9_4 = (0, 16, 9)
QUANTIZERS = {"bnb": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}


def check_pairs(train: Mapping[str, Any], context: Context) -> None:
    """Raise PkuslurmError for the first of train's values that LLaMA-Factory refuses beside the others.

    The values are those that ``check_keys`` let pass.
    """
    versions = (context.keys,) if context.keys is not None else snapshots()
    problems = [found for keys in versions if (found := problem(train, context, keys))]
    if len(problems) == len(versions):  # where the version is not known, one that takes it is enough
        raise PkuslurmError(problems[-1])
    if context.installed is not None:
        _packages(train, context.installed)
        _deepspeed(train, context.installed, context.keys)


def problem(train: Mapping[str, Any], context: Context, keys: Keys) -> str | None:
    """What this version's first rule that holds has to say."""

    def value(key: str) -> Any:
        return train[key] if key in train else keys.keys[key].default if key in keys.keys else None

    for rule in RULES:
        if (not rule.versions or keys.llamafactory in rule.versions) and rule.when(value, context):
            return re.sub(r"\{(\w+)\}", lambda key: show(value(key.group(1))), rule.message)
    return None


def _packages(train: Mapping[str, Any], installed: Mapping[str, str]) -> None:
    needs = {key: packages for key, packages in NEEDS.items() if train.get(key) not in (None, False, "")}
    if train.get("quantization_bit") is not None:
        method = train.get("quantization_method", "bnb")
        needs["quantization_bit"] = (QUANTIZERS[method],) if method in QUANTIZERS else ()
    for key, packages in needs.items():
        missing = [name for name in packages if name not in installed]
        if missing:
            raise PkuslurmError(f"train.{key}: it needs {', '.join(missing)} beside LLaMA-Factory; install it there")
    for name in listed(train.get("report_to")):
        if name in REPORTERS and not any(package in installed for package in REPORTERS[name]):
            raise PkuslurmError(
                f"train.report_to={name}: {REPORTERS[name][0]} is not installed beside LLaMA-Factory; "
                "write train.report_to=none, or install it there"
            )


def _deepspeed(train: Mapping[str, Any], installed: Mapping[str, str], keys: Keys | None) -> None:
    version = installed.get("deepspeed", "")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if train.get("deepspeed") and keys is not None and keys.llamafactory == "0.9.4" and numbers > DEEPSPEED_0_9_4:
        raise PkuslurmError(
            f"train.deepspeed: LLaMA-Factory 0.9.4 takes DeepSpeed up to 0.16.9; {version} is installed beside it"
        )
