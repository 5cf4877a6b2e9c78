"""The table of what LLaMA-Factory refuses although each value alone is right. Pure.

One row a rule: when it holds, what to say, the versions that have it. ``v`` gives a key's value, else its default,
and a message's ``{key}`` shows it. Read from hparams/*.py and transformers/training_args.py of each version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pkuslurm.config.llamafactory import Keys

Value = Callable[[str], Any]


@dataclass(frozen=True)
class Context:
    """What the rules need beside train's keys. ``installed``: {distribution: version}, None where it is not known."""

    accelerator: str
    keys: Keys | None = None
    deepspeed: Mapping[str, Any] | None = None  # the configuration itself
    installed: Mapping[str, str] | None = None
    datasets: tuple[int, ...] = (1,)  # how many are trained on, and, if some are, how many are held out

    @property
    def zero3(self) -> bool:
        stage = (self.deepspeed or {}).get("zero_optimization", {})
        return isinstance(stage, Mapping) and stage.get("stage") == 3


@dataclass(frozen=True)
class Rule:
    when: Callable[[Value, Context], bool]
    message: str
    versions: tuple[str, ...] = ()


def _number(value: object) -> float:
    """As a number; 1e-4 may be text, see check_keys."""
    return float(value) if isinstance(value, int | float | str) else 0.0


def listed(value: object) -> list[str]:
    """Text with commas, or a list."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def _eval_steps(v: Value) -> float:
    return _number(v("eval_steps")) or _number(v("logging_steps"))


def _no_multiple(v: Value) -> bool:
    """save_steps against eval_steps, as transformers compares them for load_best_model_at_end."""
    save, every = _number(v("save_steps")), _eval_steps(v)
    if v("save_strategy") != "steps" or v("eval_strategy") != "steps" or not every or save % every == 0:
        return False
    both_shares = save < 1 and every < 1
    return not (both_shares and (save * 1_000_000) % (every * 1_000_000) == 0)


def _reports(v: Value) -> list[str]:
    return [name for name in listed(v("report_to")) if name not in ("none", "all")]


def _is_numbers(value: object) -> bool:
    try:
        [float(item) for item in listed(value)]
    except ValueError:
        return False
    return True


def _ref_model(v: Value) -> bool:
    return v("stage") == "dpo" and v("pref_loss") not in ("orpo", "simpo")


def _evaluates(v: Value) -> bool:
    return v("eval_dataset") is not None or _number(v("val_size")) >= 1e-6


def _fsdp(v: Value) -> list[str]:
    value = v("fsdp")
    return value.split() if isinstance(value, str) else listed(value)


def _not_lora(key: str) -> Rule:
    return Rule(
        lambda v, c: bool(v(key)) and v("finetuning_type") == "lora",
        f"train.{key}=true: not with train.finetuning_type=lora; write train.finetuning_type=full",
    )


def _only_lora(key: str) -> Rule:
    return Rule(
        lambda v, c: v(key) not in (None, False) and v("finetuning_type") != "lora",
        f"train.{key}={{{key}}}: only with train.finetuning_type=lora; this is {{finetuning_type}}",
    )


def _not_zero3(key: str) -> Rule:
    return Rule(
        lambda v, c: bool(v(key)) and c.zero3,
        f"train.{key}=true: not with DeepSpeed ZeRO-3 (train.deepspeed={{deepspeed}}); use ZeRO-2, or leave it out",
    )


def _whole(what: str) -> Rule:
    """More than one step, but no whole number of them; below 1 it is a share of all steps."""
    return Rule(
        lambda v, c: v(f"{what}_strategy") == "steps" and (steps := _number(v(f"{what}_steps"))) > 1 and steps % 1 > 0,
        f"train.{what}_steps={{{what}_steps}}: it must be a whole number, or less than 1 (a share of all steps)",
    )


RULES = (
    # the data
    Rule(
        lambda v, c: v("eval_dataset") is not None and _number(v("val_size")) > 1e-6,
        "train.val_size={val_size}: not together with train.eval_dataset={eval_dataset}; leave one out",
    ),
    Rule(
        lambda v, c: v("interleave_probs") is not None and v("mix_strategy") == "concat",
        "train.interleave_probs={interleave_probs}: it needs train.mix_strategy=interleave_under or interleave_over",
    ),
    Rule(
        lambda v, c: not _is_numbers(v("interleave_probs")),
        "train.interleave_probs={interleave_probs}: it must be a number a dataset",
    ),
    Rule(
        lambda v, c: v("interleave_probs") is not None and {len(listed(v("interleave_probs")))} != set(c.datasets),
        "train.interleave_probs={interleave_probs}: one number a dataset is wanted (dataset.name, train.eval_dataset)",
    ),
    Rule(
        lambda v, c: bool(v("streaming")) and 1e-6 < _number(v("val_size")) < 1,
        "train.val_size={val_size}: with train.streaming=true it must be a whole number of rows",
    ),
    Rule(
        lambda v, c: bool(v("streaming")) and v("max_samples") is not None,
        "train.max_samples={max_samples}: not together with train.streaming=true; leave one out",
    ),
    Rule(
        lambda v, c: bool(v("streaming")) and v("max_steps") == -1,
        "train.streaming=true: the number of rows is not known then; set train.max_steps",
    ),
    Rule(
        lambda v, c: bool(v("mask_history") and v("train_on_prompt")),
        "train.mask_history=true: not together with train.train_on_prompt=true; leave one out",
    ),
    Rule(
        lambda v, c: v("eval_strategy") != "no" and not _evaluates(v),
        "train.eval_strategy={eval_strategy}: nothing to evaluate on; set train.val_size=0.1 or train.eval_dataset",
    ),
    Rule(
        lambda v, c: bool(v("do_eval")) and not _evaluates(v),
        "train.do_eval=true: nothing to evaluate on; set train.val_size=0.1 or train.eval_dataset",
    ),
    Rule(
        lambda v, c: bool(v("neat_packing")) and v("stage") != "sft",
        "train.neat_packing=true: only with train.stage=sft; this is {stage}",
    ),
    Rule(
        lambda v, c: bool(v("neat_packing")),
        "train.neat_packing=true: LLaMA-Factory 0.9.4 refuses it with transformers>=4.53; use train.packing=true",
        ("0.9.4",),
    ),
    Rule(
        lambda v, c: bool(v("train_on_prompt")) and v("stage") != "sft",
        "train.train_on_prompt=true: only with train.stage=sft; this is {stage}",
    ),
    Rule(
        lambda v, c: bool(v("mask_history")) and v("stage") != "sft",
        "train.mask_history=true: only with train.stage=sft; this is {stage}",
    ),
    # the model
    Rule(
        lambda v, c: v("adapter_name_or_path") is not None and v("finetuning_type") != "lora",
        "train.adapter_name_or_path: only with train.finetuning_type=lora; this is {finetuning_type}",
    ),
    Rule(
        lambda v, c: bool(v("split_special_tokens") and v("use_fast_tokenizer")),
        "train.split_special_tokens=true: it needs train.use_fast_tokenizer=false",
        ("0.9.4",),
    ),
    Rule(
        lambda v, c: _number(v("image_max_pixels") or 768 * 768) < _number(v("image_min_pixels") or 32 * 32),
        "train.image_max_pixels: smaller than image_min_pixels",
    ),
    Rule(
        lambda v, c: _number(v("video_max_pixels") or 256 * 256) < _number(v("video_min_pixels") or 16 * 16),
        "train.video_max_pixels: smaller than video_min_pixels",
    ),
    Rule(
        lambda v, c: v("export_quantization_bit") is not None and v("export_quantization_dataset") is None,
        "train.export_quantization_bit={export_quantization_bit}: it means nothing in training; leave it out",
    ),
    Rule(
        lambda v, c: v("infer_backend") != "huggingface",
        "train.infer_backend={infer_backend}: it must be huggingface in training; leave it out",
    ),
    # quantization
    Rule(
        lambda v, c: v("quantization_bit") is not None and v("finetuning_type") not in ("lora", "oft"),
        "train.quantization_bit={quantization_bit}: only with train.finetuning_type=lora or oft; "
        "this is {finetuning_type}",
    ),
    Rule(
        lambda v, c: v("quantization_bit") is not None and bool(v("pissa_init")),
        "train.pissa_init=true: not with train.quantization_bit={quantization_bit}; leave one out",
    ),
    Rule(
        lambda v, c: v("quantization_bit") is not None and bool(v("resize_vocab")),
        "train.resize_vocab=true: a quantized model (train.quantization_bit={quantization_bit}) cannot be resized",
    ),
    Rule(
        lambda v, c: v("quantization_bit") is not None and bool(v("fp8")),
        "train.fp8=true: not together with train.quantization_bit={quantization_bit}; leave one out",
    ),
    Rule(
        lambda v, c: v("quantization_device_map") == "auto",
        "train.quantization_device_map=auto: not in training; leave it out",
    ),
    Rule(
        lambda v, c: v("ref_model_quantization_bit") not in (None, 4, 8),
        "train.ref_model_quantization_bit={ref_model_quantization_bit}: it must be 4, 8 or null",
    ),
    Rule(
        lambda v, c: v("reward_model_quantization_bit") not in (None, 4, 8),
        "train.reward_model_quantization_bit={reward_model_quantization_bit}: it must be 4, 8 or null",
    ),
    # the way of tuning
    Rule(
        lambda v, c: bool(v("use_llama_pro")) and v("finetuning_type") == "full",
        "train.use_llama_pro=true: only with train.finetuning_type=freeze or lora",
    ),
    Rule(
        lambda v, c: sum(bool(v(key)) for key in ("use_galore", "use_apollo", "use_badam")) > 1,
        "train.use_galore, use_apollo, use_badam: one of them at most",
    ),
    *(_not_lora(key) for key in ("use_galore", "use_apollo", "use_badam")),
    *(_only_lora(key) for key in ("loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init")),
    Rule(
        lambda v, c: bool(v("pissa_init")) and (v("stage") in ("ppo", "kto") or _ref_model(v)),
        "train.pissa_init=true: not with train.stage={stage}; leave it out",
    ),
    # the stages
    Rule(
        lambda v, c: v("stage") == "ppo" and v("reward_model") is None,
        "train.stage=ppo: it needs train.reward_model=/path/to/the/reward/model",
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and v("reward_model_type") == "lora" and v("finetuning_type") != "lora",
        "train.reward_model_type=lora: only with train.finetuning_type=lora; write train.reward_model_type=full or api",
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and bool(v("shift_attn")),
        "train.shift_attn=true: not with train.stage=ppo; leave it out",
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and v("reward_model_type") == "lora" and bool(v("use_unsloth")),
        "train.use_unsloth=true: not with a lora reward model; write train.reward_model_type=full",
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and v("reward_model_type") == "lora" and bool(v("use_kt")),
        "train.use_kt=true: not with a lora reward model; write train.reward_model_type=full",
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and not {"wandb", "tensorboard"}.issuperset(_reports(v)[:1]),
        "train.report_to={report_to}: train.stage=ppo reports to wandb, tensorboard or none",
        ("0.9.4",),
    ),
    Rule(
        lambda v, c: v("stage") == "ppo" and not {"wandb", "tensorboard", "trackio"}.issuperset(_reports(v)),
        "train.report_to={report_to}: train.stage=ppo reports to wandb, tensorboard, trackio or none",
        ("0.9.5",),
    ),
    Rule(
        lambda v, c: v("stage") == "dpo" and v("pref_loss") != "sigmoid" and _number(v("dpo_label_smoothing")) > 1e-6,
        "train.dpo_label_smoothing={dpo_label_smoothing}: only with train.pref_loss=sigmoid; this is {pref_loss}",
    ),
    Rule(
        lambda v, c: v("stage") in ("rm", "ppo") and bool(v("load_best_model_at_end")),
        "train.load_best_model_at_end=true: not with train.stage={stage}; leave it out",
    ),
    Rule(
        lambda v, c: bool(v("predict_with_generate")) and v("stage") != "sft",
        "train.predict_with_generate=true: only with train.stage=sft; this is {stage}",
    ),
    Rule(
        lambda v, c: bool(v("predict_with_generate")) and not _evaluates(v),
        "train.predict_with_generate=true: nothing to predict; set train.val_size=0.1 or train.eval_dataset",
    ),
    Rule(
        lambda v, c: bool(v("predict_with_generate") and v("compute_accuracy")),
        "train.predict_with_generate=true: not together with train.compute_accuracy=true; leave one out",
    ),
    Rule(
        lambda v, c: bool(v("do_predict")) and v("stage") == "sft" and not v("predict_with_generate"),
        "train.do_predict=true: it needs train.predict_with_generate=true",
    ),
    # several processes, which a run always has; DeepSpeed
    Rule(
        lambda v, c: bool(v("use_galore") and v("galore_layerwise")),
        "train.galore_layerwise=true: it cannot be trained by several processes; leave it out",
    ),
    Rule(
        lambda v, c: bool(v("use_apollo") and v("apollo_layerwise")),
        "train.apollo_layerwise=true: it cannot be trained by several processes; leave it out",
    ),
    Rule(
        lambda v, c: bool(v("use_badam")) and v("badam_mode") == "ratio",
        "train.badam_mode=ratio: it cannot be trained by several processes; write train.badam_mode=layer",
    ),
    Rule(
        lambda v, c: bool(v("use_badam")) and not c.zero3 and (c.deepspeed is not None or not v("deepspeed")),
        "train.use_badam=true: it needs DeepSpeed ZeRO-3; set train.deepspeed=/path/to/ds_z3_config.json",
    ),
    Rule(
        lambda v, c: bool(v("deepspeed")) and bool(v("use_galore") or v("use_apollo")),
        "train.deepspeed={deepspeed}: not together with GaLore or APOLLO; leave one out",
    ),
    *(_not_zero3(key) for key in ("predict_with_generate", "pissa_init", "pure_bf16", "use_unsloth", "use_kt")),
    # precision
    Rule(
        lambda v, c: bool(v("bf16") and v("fp16")),
        "train.fp16=true: not together with train.bf16=true; leave one out",
    ),
    Rule(
        lambda v, c: bool(v("bf16_full_eval") and v("fp16_full_eval")),
        "train.fp16_full_eval=true: not together with train.bf16_full_eval=true; leave one out",
    ),
    Rule(
        lambda v, c: bool(v("bf16")) and v("half_precision_backend") == "apex",
        "train.half_precision_backend=apex: not with train.bf16=true; leave it out",
        ("0.9.4",),
    ),
    Rule(
        lambda v, c: bool(v("pure_bf16")) and c.accelerator == "cpu",
        "train.pure_bf16=true: not with cluster.accelerator=cpu; write train.bf16=true",
    ),
    Rule(
        lambda v, c: bool(v("tf32")) and c.accelerator == "cpu",
        "train.tf32=true: not with cluster.accelerator=cpu; leave it out",
    ),
    # steps
    Rule(
        lambda v, c: v("logging_strategy") == "steps" and _number(v("logging_steps")) == 0,
        "train.logging_steps=0: it must be more than 0, or train.logging_strategy=no",
    ),
    Rule(
        lambda v, c: v("eval_strategy") == "steps" and _eval_steps(v) <= 0,
        "train.eval_steps={eval_steps}: train.eval_strategy=steps needs a number of steps",
    ),
    *(_whole(what) for what in ("logging", "eval", "save")),
    Rule(
        lambda v, c: (
            bool(v("load_best_model_at_end"))
            and v("save_strategy") != "best"
            and v("eval_strategy") != v("save_strategy")
        ),
        "train.load_best_model_at_end=true: it needs train.eval_strategy and train.save_strategy to be the same; "
        "they are {eval_strategy} and {save_strategy}",
    ),
    Rule(
        lambda v, c: bool(v("load_best_model_at_end")) and _no_multiple(v),
        "train.load_best_model_at_end=true: train.save_steps={save_steps} must be a multiple of train.eval_steps, "
        "which is {eval_steps} (null: train.logging_steps={logging_steps})",
    ),
    Rule(
        lambda v, c: v("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and v("eval_strategy") == "no",
        "train.lr_scheduler_type={lr_scheduler_type}: it needs an evaluation; set train.eval_strategy=steps",
    ),
    # further
    Rule(
        lambda v, c: v("dataloader_prefetch_factor") is not None and v("dataloader_num_workers") == 0,
        "train.dataloader_prefetch_factor={dataloader_prefetch_factor}: it needs train.dataloader_num_workers=1",
    ),
    Rule(
        lambda v, c: _fsdp(v) == ["offload"],
        "train.fsdp=offload: it needs full_shard or shard_grad_op beside it: 'full_shard offload'",
    ),
    Rule(
        lambda v, c: {"full_shard", "shard_grad_op"} <= set(_fsdp(v)),
        "train.fsdp={fsdp}: full_shard and shard_grad_op exclude each other",
    ),
    Rule(
        lambda v, c: "trackio" in _reports(v) and v("project") == "",
        "train.report_to={report_to}: trackio needs train.project",
        ("0.9.5",),
    ),
    # what the parser lets pass, and what fails further on
    Rule(
        lambda v, c: bool(v("deepspeed")) and c.accelerator == "cpu",
        "train.deepspeed={deepspeed}: not with cluster.accelerator=cpu; leave it out",
    ),
    Rule(
        lambda v, c: bool(v("deepspeed") and v("fsdp")),
        "train.deepspeed={deepspeed}: not together with train.fsdp={fsdp}; leave one out",
    ),
    Rule(
        lambda v, c: (
            str(v("lr_scheduler_type")).endswith("with_min_lr")
            and isinstance(v("lr_scheduler_kwargs") or {}, Mapping)
            and not {"min_lr", "min_lr_rate"} & set(v("lr_scheduler_kwargs") or {})
        ),
        "train.lr_scheduler_type={lr_scheduler_type}: it needs train.lr_scheduler_kwargs={min_lr_rate: 0.1}",
    ),
    Rule(
        lambda v, c: v("quantization_method") == "bnb" and v("quantization_bit") not in (None, 4, 8),
        "train.quantization_bit={quantization_bit}: bitsandbytes has 4 and 8",
    ),
    Rule(
        lambda v, c: v("quantization_method") == "eetq" and v("quantization_bit") not in (None, 8),
        "train.quantization_bit={quantization_bit}: train.quantization_method=eetq has 8 only",
    ),
    Rule(
        lambda v, c: bool(v("use_unsloth")) and v("finetuning_type") == "oft",
        "train.use_unsloth=true: not with train.finetuning_type=oft; leave it out",
    ),
    Rule(
        lambda v, c: bool(v("use_kt")) and v("finetuning_type") != "lora",
        "train.use_kt=true: only with train.finetuning_type=lora; this is {finetuning_type}",
    ),
)
