"""LLaMA-Factory's keys as data: what is wrong with a key or a value is said in one line, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from pkuslurm.config.llamafactory import Keys, check_keys, check_template, names, snapshot, snapshots
from pkuslurm.errors import PkuslurmError


def known(version: str) -> Keys:
    keys = snapshot(version)
    assert keys is not None
    return keys


def message(values: dict[str, Any], keys: Keys | None, node: Any = "train") -> str | None:
    try:
        check_keys(node, values, keys)
    except PkuslurmError as problem:
        assert "\n" not in str(problem)
        return str(problem)
    return None


def test_both_versions_are_known() -> None:
    assert [keys.version for keys in snapshots()] == [
        "LLaMA-Factory 0.9.4 (transformers 4.57)",
        "LLaMA-Factory 0.9.5 (transformers 5.6)",
    ]
    assert [len(keys.keys) for keys in snapshots()] == [354, 346]


def test_a_snapshot_counts_only_for_its_transformers() -> None:
    assert snapshot("0.9.4", "4.57.6") is snapshot("0.9.4")
    assert snapshot("0.9.4", "4.51.0") is None
    assert snapshot("0.9.3") is None


REFUSED = [
    ({"lerning_rate": 1}, "train.lerning_rate: LLaMA-Factory has no such key; did you mean train.learning_rate?"),
    ({"xyzzy": 1}, "train.xyzzy: LLaMA-Factory has no such key"),
    ({"per_device_train_batch_size": "four"}, "train.per_device_train_batch_size=four: it must be a whole number"),
    ({"per_device_train_batch_size": "4"}, "train.per_device_train_batch_size=4: it must be a whole number"),
    ({"per_device_train_batch_size": 4.0}, "train.per_device_train_batch_size=4.0: it must be a whole number"),
    ({"per_device_train_batch_size": True}, "train.per_device_train_batch_size=true: it must be a whole number"),
    ({"per_device_train_batch_size": 0}, "train.per_device_train_batch_size=0: it must be more than 0"),
    ({"learning_rate": "fast"}, "train.learning_rate=fast: it must be a number"),
    ({"learning_rate": "0.1"}, "train.learning_rate=0.1: it must be a number"),
    ({"learning_rate": None}, "train.learning_rate=null: it must be a number"),
    ({"learning_rate": 0}, "train.learning_rate=0: it must be more than 0"),
    ({"learning_rate": float("nan")}, "train.learning_rate=nan: it must be more than 0"),
    ({"learning_rate": "-1e-4"}, "train.learning_rate=-1e-4: it must be more than 0"),
    ({"num_train_epochs": float("inf")}, "train.num_train_epochs=inf: it must be more than 0"),
    ({"max_steps": 0}, "train.max_steps=0: it must be 1 or more, or leave it out"),
    ({"num_train_epochs": -3}, "train.num_train_epochs=-3: it must be more than 0"),
    ({"max_grad_norm": float("nan")}, "train.max_grad_norm=nan: it must be a finite number"),
    ({"lora_dropout": 1.5}, "train.lora_dropout=1.5: it must be from 0 to 1"),
    ({"warmup_ratio": -0.1}, "train.warmup_ratio=-0.1: it must be from 0 to 1"),
    ({"max_steps": -2}, "train.max_steps=-2: it must be -1 or more"),
    ({"bf16": "yes"}, "train.bf16=yes: it must be true or false"),
    ({"bf16": 1}, "train.bf16=1: it must be true or false"),
    ({"max_samples": "all"}, "train.max_samples=all: it must be a whole number or null"),
    ({"stage": "sftt"}, "train.stage=sftt: it must be pt, sft, rm, ppo, dpo or kto"),
    ({"stage": None}, "train.stage=null: it must be pt, sft, rm, ppo, dpo or kto"),
    ({"finetuning_type": "lorra"}, "train.finetuning_type=lorra: it must be lora, full, freeze or oft"),
    ({"lr_scheduler_type": "cosin"}, "did you mean cosine?"),
    ({"optim": "adamw"}, "train.optim=adamw: it is none of LLaMA-Factory's"),
    ({"eval_strategy": False}, "it must be no, steps or epoch; YAML reads an unquoted no as false: write 'no'"),
    ({"quantization_device_map": "cpu"}, "train.quantization_device_map=cpu: it must be auto"),
    ({"add_tokens": ["<a>", "<b>"]}, "it must be text or null, with commas: '<a>,<b>'"),
    ({"run_name": 2024}, "it must be text or null; numbers become text in two kinds of quotes: \"'2024'\""),
    ({"lora_target": 3}, "train.lora_target=3: it must be text or a list [a,b]"),
    ({"label_names": "labels"}, "train.label_names=labels: it must be a list [a,b] or null"),
    ({"deepspeed": 3}, "train.deepspeed=3: it must be keys and values {a: 1} or text or null"),
]


@pytest.mark.parametrize("version", [None, "0.9.4", "0.9.5"])
@pytest.mark.parametrize(("values", "wanted"), REFUSED)
def test_a_wrong_key_or_value_is_refused(values: dict[str, Any], wanted: str, version: str | None) -> None:
    said = message(values, (version and known(version)) or None)
    assert said is not None and wanted in said


FINE: list[dict[str, Any]] = [
    {"learning_rate": 1, "num_train_epochs": 3},
    {"learning_rate": "1e-4", "weight_decay": "5E-3"},  # YAML 1.1's text is OmegaConf's number
    {"lora_target": "q_proj,v_proj"},
    {"lora_target": ["q_proj", "v_proj"], "additional_target": ["embed_tokens"]},  # split_arg leaves lists alone
    {"max_samples": None, "lora_alpha": None, "deepspeed": None, "quantization_bit": None},
    {"deepspeed": {"zero_optimization": {"stage": 2}}, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"report_to": "none", "eval_strategy": "no", "save_strategy": "best", "optim": "adamw_torch"},
    {"report_to": ["wandb", "tensorboard"], "save_steps": 0.5, "logging_steps": 1},
    {"max_steps": -1, "val_size": 0, "warmup_ratio": 0.1, "weight_decay": 0},
    {"include_num_input_tokens_seen": True, "packing": None, "use_dora": False},
    {"flash_attn": "fa2", "rope_scaling": None, "infer_dtype": "bfloat16"},
]


@pytest.mark.parametrize("version", ["0.9.4", "0.9.5"])
@pytest.mark.parametrize("values", FINE)
def test_what_llamafactory_takes_passes(values: dict[str, Any], version: str) -> None:
    assert message(values, known(version)) is None


def test_a_key_of_another_version_says_which() -> None:
    old, new = "LLaMA-Factory 0.9.4 (transformers 4.57)", "LLaMA-Factory 0.9.5 (transformers 5.6)"
    assert message({"save_safetensors": True}, known("0.9.5")) == (
        f"train.save_safetensors: only {old} has it; this is 0.9.5 (transformers 5.6.0)"
    )
    assert message({"preserve_thinking": True}, known("0.9.4")) == (
        f"train.preserve_thinking: only {new} has it; this is 0.9.4 (transformers 4.57.1)"
    )


def test_where_the_version_is_not_known_any_will_do() -> None:
    assert message({"save_safetensors": True, "preserve_thinking": True}, None) is None
    assert message({"warmup_steps": 0.1}, known("0.9.4")) == "train.warmup_steps=0.1: it must be a whole number"
    assert message({"warmup_steps": 0.1}, known("0.9.5")) is None
    assert message({"warmup_steps": 0.1}, None) is None
    assert message({"lr_scheduler_type": "greedy"}, known("0.9.4")) is not None
    assert message({"lr_scheduler_type": "greedy"}, None) is None


def test_merge_takes_the_export_keys() -> None:
    assert message({"export_size": 5, "export_device": "auto"}, None, "merge") is None
    assert message({"max_steps": 3}, None, "merge") == (
        "merge.max_steps: LLaMA-Factory has no such key in its export; write train.max_steps"
    )
    assert "did you mean merge.export_size" in str(message({"export_sise": 3}, None, "merge"))
    assert message({"export_device": "gpu"}, None, "merge") == "merge.export_device=gpu: it must be cpu or auto"
    assert message({"fp8": True}, known("0.9.4"), "merge") is None
    assert message({"fp8": True}, known("0.9.5"), "merge") is not None


def test_templates() -> None:
    only_new = known("0.9.5").templates - known("0.9.4").templates
    assert only_new
    name = min(only_new)
    check_template("qwen", None)
    check_template(name, None)
    with pytest.raises(PkuslurmError, match=f"model.template={name}: only LLaMA-Factory 0.9.5 .*; this is 0.9.4"):
        check_template(name, known("0.9.4"))
    with pytest.raises(PkuslurmError, match=r"model.template=qwenn: .*; did you mean qwen"):
        check_template("qwenn", None)


def test_names_of_all_versions() -> None:
    assert "save_safetensors" in names("train") and "preserve_thinking" in names("train")
    assert "export_size" in names("export") and "max_steps" not in names("export")
    assert "qwen" in names("templates")
