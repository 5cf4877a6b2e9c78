"""The points of a sweep as files: what they have in common once, and of each what differs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# LLaMA-Factory's arguments that do not shape the tokenized rows: points that differ in these alone share one prepare.
# One that is missing here costs time, one too many would train on the wrong rows.
_NOT_DATA = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_", "gradient_", "lr_scheduler_", "warmup_"),
    *("weight_decay", "adam_", "optim", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha"),
    *("finetuning_type", "lora_", "loraplus_", "use_rslora", "use_dora", "pissa_", "freeze_", "additional_target"),
    *("galore_", "use_galore", "apollo_", "use_apollo", "badam_", "use_badam", "use_muon", "use_adam_mini"),
    *("pref_", "dpo_", "kto_", "simpo_", "ddp_", "dataloader_", "save_", "logging_", "eval_strategy", "eval_steps"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_", "disable_gradient_"),
    *("bf16", "fp16", "pure_bf16", "tf32", "flash_attn", "enable_liger_kernel", "use_reentrant_gc", "report_to"),
    *("deepspeed", "fsdp", "plot_loss", "run_name", "torch_", "quantization_", "output_dir", "use_cpu"),
)


def share_key(prepare: Mapping[str, Any], dataset_info: str = "") -> str:
    """Points of whose prepare jobs (job files, for any point) and dataset_info.json this is the same share one."""
    payload = dict(prepare["payload"])
    args = {key: value for key, value in payload["train_args"].items() if not key.startswith(_NOT_DATA)}
    drawn = args.get("val_size") or "interleave" in str(args.get("mix_strategy")) or '"num_samples"' in dataset_info
    if not drawn:
        args.pop("seed", None)  # it only decides which rows are held out, or drawn
    payload["train_args"] = args
    payload.pop("ranks")  # for counting steps
    known = {name: prepare.get(name) for name in ("env", "command", "request", "container")}
    return json.dumps([payload, known, dataset_info], sort_keys=True, ensure_ascii=False)


def difference(common: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str | dict[str, str]]:
    """What of ``own`` differs from ``common``, by file: lines by their numbers, or the whole text."""
    return {name: _change(common[name], text) for name, text in own.items() if text != common[name]}


def _change(common: str, own: str) -> str | dict[str, str]:
    if common == own:
        return {}
    before, after = common.split("\n"), own.split("\n")
    if len(before) != len(after):
        return own
    return {str(number): line for number, line in enumerate(after) if line != before[number]}
