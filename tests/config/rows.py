"""Values that LLaMA-Factory refuses together: {train keys}, part of our message, and the versions that refuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BOTH = ("0.9.4", "0.9.5")


@dataclass(frozen=True)
class Row:
    """``parser``: get_train_args itself refuses it, here and without further packages."""

    train: dict[str, Any]
    message: str
    versions: tuple[str, ...] = BOTH
    parser: bool = True
    accelerator: str = "cpu"


ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
FULL = {"finetuning_type": "full"}
PPO = {"stage": "ppo", "reward_model": "/m"}

ROWS = [
    Row({"val_size": 0.1, "eval_dataset": "d"}, "val_size=0.1: not together with train.eval_dataset=d"),
    Row({"interleave_probs": "1.0"}, "needs train.mix_strategy=interleave_under"),
    Row({"interleave_probs": "half", "mix_strategy": "interleave_over"}, "it must be a number a dataset"),
    Row({"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_over"}, "one number a dataset"),
    Row({"streaming": True, "max_steps": 5, "val_size": 0.1}, "a whole number of rows"),
    Row({"streaming": True, "max_steps": 5, "max_samples": 9}, "max_samples=9: not together"),
    Row({"streaming": True}, "set train.max_steps"),
    Row({"mask_history": True, "train_on_prompt": True}, "mask_history=true: not together"),
    Row({"eval_strategy": "steps"}, "eval_strategy=steps: nothing to evaluate on"),
    Row({"do_eval": True}, "do_eval=true: nothing to evaluate on"),
    Row({"stage": "pt", "neat_packing": True}, "neat_packing=true: only with train.stage=sft; this is pt"),
    Row({"neat_packing": True}, "use train.packing=true", ("0.9.4",)),
    Row({"stage": "dpo", "train_on_prompt": True}, "train_on_prompt=true: only with train.stage=sft"),
    Row({"stage": "dpo", "mask_history": True}, "mask_history=true: only with train.stage=sft"),
    Row({**FULL, "adapter_name_or_path": "/a"}, "adapter_name_or_path: only with train.finetuning_type=lora"),
    Row({"split_special_tokens": True}, "use_fast_tokenizer=false", ("0.9.4",)),
    Row({"image_max_pixels": 100}, "image_max_pixels: smaller"),
    Row({"video_max_pixels": 100}, "video_max_pixels: smaller"),
    Row({"export_quantization_bit": 4}, "export_quantization_bit=4: it means nothing in training"),
    Row({"infer_backend": "vllm"}, "infer_backend=vllm: it must be huggingface"),
    Row({**FULL, "quantization_bit": 4}, "quantization_bit=4: only with train.finetuning_type=lora or oft"),
    Row({"quantization_bit": 4, "pissa_init": True, "stage": "sft"}, "pissa_init=true: not with train.quantization"),
    Row({"quantization_bit": 4, "resize_vocab": True}, "resize_vocab=true: a quantized model"),
    Row({"quantization_bit": 4, "fp8": True}, "fp8=true: not together"),
    Row({"quantization_bit": 4, "quantization_device_map": "auto"}, "quantization_device_map=auto"),
    Row({"stage": "dpo", "ref_model_quantization_bit": 3}, "ref_model_quantization_bit=3: it must be 4, 8"),
    Row({**PPO, "reward_model_quantization_bit": 3}, "reward_model_quantization_bit=3: it must be 4, 8"),
    Row({**FULL, "use_llama_pro": True}, "use_llama_pro=true"),
    Row({**FULL, "use_galore": True, "use_badam": True}, "one of them at most"),
    Row({"use_galore": True}, "use_galore=true: not with train.finetuning_type=lora"),
    Row({"use_apollo": True}, "use_apollo=true: not with train.finetuning_type=lora"),
    Row({"use_badam": True}, "use_badam=true: not with train.finetuning_type=lora"),
    Row({**FULL, "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio=16.0: only with"),
    Row({"finetuning_type": "freeze", "use_rslora": True}, "use_rslora=true: only with"),
    Row({**FULL, "use_dora": True}, "use_dora=true: only with train.finetuning_type=lora; this is full"),
    Row({**FULL, "pissa_init": True}, "pissa_init=true: only with"),
    Row({"stage": "kto", "pissa_init": True}, "pissa_init=true: not with train.stage=kto"),
    Row({"stage": "dpo", "pissa_init": True}, "pissa_init=true: not with train.stage=dpo"),
    Row({"stage": "ppo"}, "it needs train.reward_model"),
    Row({**PPO, **FULL}, "reward_model_type=lora: only with train.finetuning_type=lora"),
    Row({**PPO, "shift_attn": True}, "shift_attn=true: not with train.stage=ppo"),
    Row({**PPO, "use_unsloth": True}, "use_unsloth=true: not with a lora reward model"),
    Row({**PPO, "use_kt": True}, "use_kt=true: not with a lora reward model"),
    Row({**PPO, "report_to": "mlflow"}, "reports to wandb, tensorboard or none", ("0.9.4",)),
    Row({**PPO, "report_to": ["wandb", "mlflow"]}, "reports to wandb, tensorboard, trackio or none", ("0.9.5",)),
    Row({"stage": "dpo", "pref_loss": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing=0.1: only with"),
    Row({"stage": "rm", "load_best_model_at_end": True, "eval_strategy": "steps", "val_size": 0.1}, "stage=rm"),
    Row({"stage": "pt", "predict_with_generate": True}, "predict_with_generate=true: only with train.stage=sft"),
    Row({"predict_with_generate": True}, "predict_with_generate=true: nothing to predict"),
    Row({"predict_with_generate": True, "compute_accuracy": True, "val_size": 0.1}, "train.compute_accuracy=true"),
    Row({"do_predict": True, "val_size": 0.1}, "do_predict=true: it needs"),
    Row({**FULL, "use_galore": True, "galore_layerwise": True}, "galore_layerwise=true"),
    Row({**FULL, "use_apollo": True, "apollo_layerwise": True}, "apollo_layerwise=true"),
    Row({**FULL, "use_badam": True, "badam_mode": "ratio"}, "badam_mode=ratio"),
    Row({**FULL, "use_badam": True}, "use_badam=true: it needs DeepSpeed ZeRO-3"),
    Row({"deepspeed": ZERO2}, "not with cluster.accelerator=cpu", parser=False),
    Row({"deepspeed": ZERO2, "fsdp": "full_shard"}, "not together with train.fsdp", parser=False, accelerator="npu"),
    Row({**FULL, "deepspeed": ZERO2, "use_apollo": True}, "GaLore or APOLLO", parser=False, accelerator="npu"),
    Row(
        {"deepspeed": ZERO3, "pissa_init": True}, "pissa_init=true: not with DeepSpeed", parser=False, accelerator="npu"
    ),
    Row({"deepspeed": ZERO3, "pure_bf16": True}, "pure_bf16=true: not with DeepSpeed", parser=False, accelerator="npu"),
    Row({"deepspeed": ZERO3, "use_unsloth": True}, "use_unsloth=true: not with", parser=False, accelerator="cuda"),
    Row({"deepspeed": ZERO3, "use_kt": True}, "use_kt=true: not with", parser=False, accelerator="cuda"),
    Row(
        {"deepspeed": ZERO3, "predict_with_generate": True, "val_size": 0.1},
        "predict_with_generate=true: not with DeepSpeed",
        parser=False,
        accelerator="npu",
    ),
    Row({"bf16": True, "fp16": True}, "fp16=true: not together with train.bf16=true"),
    Row({"bf16_full_eval": True, "fp16_full_eval": True}, "fp16_full_eval=true: not together"),
    Row({"bf16": True, "half_precision_backend": "apex"}, "half_precision_backend=apex", ("0.9.4",)),
    Row({"pure_bf16": True}, "pure_bf16=true: not with cluster.accelerator=cpu"),
    Row({"tf32": True}, "tf32=true: not with cluster.accelerator=cpu"),
    Row({"logging_steps": 0}, "logging_steps=0: it must be more than 0"),
    Row(
        {"logging_strategy": "no", "logging_steps": 0, "eval_strategy": "steps", "val_size": 0.1},
        "eval_steps=null: train.eval_strategy=steps needs",
    ),
    Row({"logging_steps": 1.5}, "logging_steps=1.5: it must be a whole number"),
    Row({"save_steps": 2.5}, "save_steps=2.5: it must be a whole number"),
    Row({"eval_strategy": "steps", "eval_steps": 2.5, "val_size": 0.1}, "eval_steps=2.5: it must be a whole number"),
    Row({"load_best_model_at_end": True}, "they are no and steps"),
    Row(
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 10,
            "val_size": 0.1,
        },
        "save_steps=10 must be a multiple of train.eval_steps, which is 3",
    ),
    Row({"lr_scheduler_type": "reduce_lr_on_plateau"}, "it needs an evaluation"),
    Row({"lr_scheduler_type": "greedy"}, "it needs an evaluation", ("0.9.5",)),
    Row({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs={min_lr_rate: 0.1}", parser=False),
    Row({"quantization_bit": 3}, "bitsandbytes has 4 and 8", parser=False),
    Row({"quantization_bit": 4, "quantization_method": "eetq"}, "eetq has 8 only", parser=False),
    Row({"finetuning_type": "oft", "use_unsloth": True}, "use_unsloth=true: not with", parser=False),
    Row({**FULL, "use_kt": True}, "use_kt=true: only with train.finetuning_type=lora; this is full", parser=False),
    Row({"dataloader_prefetch_factor": 2}, "it needs train.dataloader_num_workers"),
    Row({"fsdp": "offload"}, "it needs full_shard or shard_grad_op"),
    Row({"fsdp": "full_shard shard_grad_op"}, "exclude each other"),
    Row({"report_to": "trackio", "project": ""}, "trackio needs train.project", ("0.9.5",)),
]
# What LLaMA-Factory takes, and a rule that is too eager would refuse.
FINE: list[dict[str, Any]] = [
    {},
    {"bf16": True},
    {"streaming": True, "max_steps": 5, "val_size": 10},
    {"eval_strategy": "steps", "eval_steps": 10, "val_size": 0.1},
    {"eval_strategy": "epoch", "eval_dataset": "d"},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 20, "eval_steps": 10, "val_size": 0.1},
    {"load_best_model_at_end": True, "save_strategy": "best", "eval_strategy": "epoch", "val_size": 0.1},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 0.2, "eval_steps": 0.1, "val_size": 0.1},
    {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    {"finetuning_type": "oft"},
    {"lora_target": ["q_proj", "v_proj"], "additional_target": "embed_tokens,lm_head"},
    {"stage": "dpo", "pref_loss": "orpo", "pissa_init": True},
    {"stage": "dpo", "pref_loss": "sigmoid", "dpo_label_smoothing": 0.1},
    {"stage": "pt"},
    {"stage": "kto"},
    {**PPO, "report_to": "none"},
    {"packing": True},
    {"save_steps": 0.5, "logging_steps": 0.5},
    {"tf32": False},
    {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"interleave_probs": "1.0", "mix_strategy": "interleave_under"},
    {"mask_history": True},
    {"learning_rate": 1, "warmup_ratio": 0.1, "num_train_epochs": 3},
]
