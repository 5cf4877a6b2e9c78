"""The pipeline on models and data that are not the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkuslurm.rundir import RunDir, read_json, read_jsonl
from tests.conftest import environment, run
from tests.e2e import models

pytestmark = pytest.mark.real
SHORT = ["train.max_steps=3", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"]
SHORT += ["train.cutoff_len=64", "infer.max_new_tokens=8", "infer.prompts=[苹果是什么颜色的,one two]"]


def test_llama_bf16_tied_sharded(weird: Path, cache: Path) -> None:
    models.llama(weird / "模型 llama")
    models.sharegpt(weird / "数据 (1).json")
    ended = run(
        ["nodes=2", "model.path=模型 llama", "model.template=default", "dataset.path=数据 (1).json", *SHORT],
        weird,
        environment(weird, PKUSLURM_CACHE=str(cache)),
    )
    assert ended.code == 0, ended.err
    where = RunDir(Path(ended.last))
    merge = read_json(where.result("merge")) or {}
    assert merge["equal"] == merge["tensors"] > 0 and "bfloat16" in merge["dtype"]
    config = json.loads((where.merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    base = weird / "模型 llama"
    assert (where.merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert [answer["passed"] for answer in read_jsonl(where.answers)] == [None, None]
    assert (read_json(where.result("prepare")) or {})["dataset"]["formatting"] == "sharegpt"


def test_qwen_fp32_untied_on_one_node_with_two_ranks(weird: Path, cache: Path) -> None:
    models.qwen(weird / "qwen")
    models.alpaca(weird / "rows.jsonl")
    ended = run(
        ["nodes=1", "cluster.nproc_per_node=2", "model.path=qwen", "dataset.path=rows.jsonl", *SHORT],
        weird,
        environment(weird, PKUSLURM_CACHE=str(cache)),
    )
    assert ended.code == 0, ended.err
    where = RunDir(Path(ended.last))
    infer = read_json(where.result("infer")) or {}
    assert infer["adapter_merged_equal"] == [2, 2]
    assert "float32" in (read_json(where.result("merge")) or {})["dtype"]
    assert (read_json(where.result("train")) or {})["global_step"] == 3


def test_full_fine_tune_of_rows_without_input(weird: Path, cache: Path) -> None:
    models.qwen(weird / "qwen")
    row = {"instruction": models.CORPUS[2], "output": models.CORPUS[3]}
    (weird / "rows.json").write_text(json.dumps([row] * 8, ensure_ascii=False), encoding="utf-8")
    ended = run(
        ["model.path=qwen", "dataset.path=rows.json", "train.finetuning_type=full", *SHORT],
        weird,
        environment(weird, PKUSLURM_CACHE=str(cache)),
    )
    assert ended.code == 0, ended.err
    assert "a whole model already" in ended.err
    where = RunDir(Path(ended.last))
    assert (where.merged / "model.safetensors").is_file()
    assert all(answer["base"] is not None for answer in read_jsonl(where.answers))
