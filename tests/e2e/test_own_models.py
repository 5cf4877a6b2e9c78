"""The pipeline on models and data that are not the demo's: one real run for each way of tuning, stage and form of data.

| run | tuning | stage | data |
|---|---|---|---|
| Llama, bf16, tied, in several files; two nodes | lora | sft | sharegpt, json |
| Qwen2, fp32, untied; two ranks | lora | dpo | a folder with dataset_info.json, jsonl |
| Llama, bf16, tied | full | sft | alpaca without input, jsonl |
| Qwen2 | freeze | sft | csv |
| Llama | lora | pt | txt |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkuslurm.preflight.estimate import SMALL, Estimate, estimate
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from tests.conftest import Ended, environment, run
from tests.e2e import models

pytestmark = pytest.mark.real
SHORT = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1"]
SHORT += ["train.cutoff_len=64", "infer.max_new_tokens=8", "infer.prompts=[苹果是什么颜色的,one two]"]


def tuned(weird: Path, cache: Path, *arguments: str) -> tuple[Ended, RunDir]:
    ended = run([*arguments, *SHORT], weird, environment(weird, PKUSLURM_CACHE=str(cache)))
    assert ended.code == 0, ended.err
    where = RunDir(Path(ended.last))
    # without an expectation there is no verdict
    assert [answer["passed"] for answer in read_jsonl(where.answers)] == [None, None]
    return ended, where


def result(where: RunDir, kind: str) -> dict[str, Any]:
    return read_json(where.result(kind)) or {}


def estimated(where: RunDir, base: Path) -> Estimate:
    """The estimate for the run, which its files keep below and do not miss by far."""
    train = yaml.safe_load(where.train_yaml.read_text(encoding="utf-8"))
    found = estimate(base, train, 1, 1, "cpu")
    assert found is not None
    # links once: a full fine-tune's merged/ is its adapter/
    files = {file.stat().st_ino: file.stat().st_size for file in where.path.rglob("*") if file.is_file()}
    used = sum(files.values())
    assert used < found.disk_run
    assert used > (found.disk_run - SMALL) / 4
    return found


def tensor_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def test_lora_of_a_bf16_tied_sharded_llama(weird: Path, cache: Path) -> None:
    base = weird / "模型 llama"
    models.llama(base)
    models.sharegpt(weird / "数据 (1).json")
    model = ["model.path=模型 llama", "model.template=default", "dataset.path=数据 (1).json"]
    _, where = tuned(weird, cache, "nodes=2", "train.max_steps=3", *model)
    merge = result(where, "merge")
    assert merge["equal"] == merge["tensors"] > 0 and "bfloat16" in merge["dtype"]
    config = json.loads((where.merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert (where.merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert result(where, "prepare")["dataset"]["formatting"] == "sharegpt"
    assert result(where, "train")["global_step"] == 3
    found = estimated(where, base)
    assert tensor_bytes(where.adapter / "adapter_model.safetensors") == found.trainable * 4
    assert sum(tensor_bytes(file) for file in base.glob("*.safetensors")) == found.weights_bytes == found.parameters * 2


def test_dpo_of_an_fp32_untied_qwen_on_two_ranks(weird: Path, cache: Path) -> None:
    models.qwen(weird / "qwen")
    models.preferences(weird / "偏好")
    ranks = ["nodes=1", "cluster.nproc_per_node=2"]
    data = ["model.path=qwen", "dataset.path=偏好", "train.stage=dpo"]
    _, where = tuned(weird, cache, "train.max_steps=2", *ranks, *data)
    dataset = result(where, "prepare")["dataset"]
    assert dataset["kept"] == dataset["rows"] == 8
    log = (read_json(where.adapter / "trainer_state.json") or {})["log_history"]
    assert [entry["step"] for entry in log if "rewards/margins" in entry] == [1, 2]
    assert result(where, "infer")["adapter_merged_equal"] == [2, 2]
    assert "float32" in result(where, "merge")["dtype"]


def test_full_of_rows_without_input_makes_a_bf16_model_fp32(weird: Path, cache: Path) -> None:
    models.llama(weird / "llama")
    models.alpaca_without_input(weird / "rows.jsonl")
    data = ["model.path=llama", "model.template=default", "dataset.path=rows.jsonl", "train.finetuning_type=full"]
    ended, where = tuned(weird, cache, "train.max_steps=2", *data)
    assert "a whole model already" in ended.err
    assert (where.merged / "model.safetensors").samefile(where.adapter / "model.safetensors")
    assert all(answer["base"] is not None for answer in read_jsonl(where.answers))
    found = estimated(where, weird / "llama")
    assert tensor_bytes(where.adapter / "model.safetensors") == found.trainable * 4 == found.parameters * 4
    assert "float32" in result(where, "merge")["dtype"]


def test_freeze_of_a_csv_trains_the_last_layers_alone(weird: Path, cache: Path) -> None:
    models.qwen(weird / "qwen")
    models.table(weird / "表格.csv")
    data = [
        "model.path=qwen",
        "dataset.path=表格.csv",
        "train.finetuning_type=freeze",
        "train.freeze_trainable_layers=1",
    ]
    _, where = tuned(weird, cache, "train.max_steps=2", *data)
    before, after = (models.tensors(folder) for folder in (weird / "qwen", where.merged))
    changed = {name.split(".")[2] if ".layers." in name else name for name in before if before[name] != after[name]}
    assert changed == {"1"}
    assert result(where, "merge")["mode"] == "copy"
    trained = sum(len(value) for name, value in after.items() if ".layers.1." in name)
    assert estimated(where, weird / "qwen").trainable * 4 == trained


def test_pretraining_on_plain_text(weird: Path, cache: Path) -> None:
    models.llama(weird / "llama")
    models.text(weird / "text.txt")
    data = ["model.path=llama", "model.template=default", "dataset.path=text.txt", "dataset.columns={prompt: text}"]
    _, where = tuned(weird, cache, "train.max_steps=2", "train.stage=pt", *data)
    steps = result(where, "prepare")["steps"]
    assert steps["total"] == 2 and result(where, "prepare")["dataset"]["train_rows"] > 4
    assert result(where, "merge")["equal"] == result(where, "merge")["tensors"] > 0
