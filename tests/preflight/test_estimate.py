"""Estimates against numbers worked out by hand; tests/e2e/test_own_models.py holds them against real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.preflight.estimate import DEVICE, LOGIT, PROCESS, SMALL, estimate

GB = 1e9
# Qwen2.5-0.5B, as its config.json and its safetensors header have it
CONFIG = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
LINEAR = {"q_proj": (896, 896), "k_proj": (128, 896), "v_proj": (128, 896), "o_proj": (896, 896)}
MLP = {"gate_proj": (4864, 896), "up_proj": (4864, 896), "down_proj": (896, 4864)}
LAYER = sum(a * b for a, b in (LINEAR | MLP).values()) + 896 + 128 + 128 + 2 * 896
PARAMETERS = 494_032_768
LORA = 8 * sum(a + b for a, b in (LINEAR | MLP).values()) * 24


def sparse(folder: Path, dtype: str = "BF16", size: int = 2) -> Path:
    """The model's shapes in a file that is as long as the real one and takes no disk."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 896), "model.norm.weight": (896,)}
    for layer in range(24):
        head = f"model.layers.{layer}."
        shapes |= {f"{head}self_attn.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {f"{head}self_attn.{name}.bias": (LINEAR[name][0],) for name in ("q_proj", "k_proj", "v_proj")}
        shapes |= {f"{head}mlp.{name}.weight": shape for name, shape in MLP.items()}
        shapes |= {f"{head}{name}.weight": (896,) for name in ("input_layernorm", "post_attention_layernorm")}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        length = size * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("estimate") / "qwen")


def ask(folder: Path, nodes: int = 2, nproc: int = 2, accelerator: str = "npu", **train: Any) -> Any:
    found = estimate(folder, train, nodes, nproc, accelerator)
    assert found is not None
    return found


SFT = {"cutoff_len": 1024, "per_device_train_batch_size": 8, "save_total_limit": 2}


def logits(batch: int = 8) -> int:
    return 1024 * batch * 151936 * LOGIT


def test_lora_of_half_a_billion_parameters(model: Path) -> None:
    found = ask(model, finetuning_type="lora", lora_rank=8, lora_target="all", **SFT)
    assert (found.parameters, found.weights_bytes) == (PARAMETERS, PARAMETERS * 2)
    assert found.trainable == LORA == 4_399_104  # what PEFT prints for this model
    kept = 1024 * 8 * 2 * (24 * 896 + 16 * 896 + 6 * 4864)
    by_hand = PARAMETERS * 2 + LORA * (4 + 8 + 8) + kept + logits() + DEVICE
    assert found.memory_per_rank == pytest.approx(by_hand, rel=1e-6)
    adapter, optimizer = LORA * 4, LORA * 8
    assert found.disk_run == pytest.approx(adapter + 3 * (adapter + optimizer) + 4 * PARAMETERS + SMALL, rel=1e-6)
    assert found.lines[0] == "494 M parameters, 1.0 GB of weights (bf16); lora trains 4.4 M of them"
    assert found.lines[1].startswith(
        f"needs up to about {by_hand / GB:.0f} GB of memory on each of 4 devices, 2.4 GB on"
    )


def test_the_answers_logits_are_named_where_they_are_most_of_it(model: Path) -> None:
    assert any("lower train.per_device_train_batch_size" in line for line in ask(model, **SFT).lines)
    assert len(ask(model, **SFT | {"per_device_train_batch_size": 1}).lines) == 3
    one, two = (ask(model, **SFT | {"per_device_train_batch_size": batch}).memory_per_rank for batch in (1, 2))
    assert two - one >= logits(1)


def test_full_holds_everything_in_fp32_with_both_moments(model: Path) -> None:
    small = {"finetuning_type": "full", "cutoff_len": 16, "per_device_train_batch_size": 1, "save_total_limit": 2}
    alone = ask(model, 1, 1, **small)
    assert alone.trainable == PARAMETERS
    assert alone.memory_per_rank == pytest.approx(PARAMETERS * 16 + DEVICE, rel=0.02)
    assert ask(model, 2, 2, **small).memory_per_rank == pytest.approx(PARAMETERS * 20 + DEVICE, rel=0.02)
    # the model is saved in fp32, thrice with its optimizer while the last is written, and linked for merged/
    assert alone.disk_run == pytest.approx(PARAMETERS * (4 + 3 * 12) + SMALL, rel=0.001)
    assert ask(model, 1, 1, **small, save_only_model=True).disk_run == pytest.approx(PARAMETERS * 16 + SMALL, rel=0.001)
    pure = ask(model, 1, 1, **small, pure_bf16=True)
    assert pure.memory_per_rank == pytest.approx(PARAMETERS * 8 + DEVICE, rel=0.02)


@pytest.mark.parametrize(("stage", "bytes_each"), [(1, 2 + 2 + 3), (2, 2 + 0.5 + 3), (3, 0.5 + 0.5 + 3)])
@pytest.mark.parametrize("form", ["file", "name"])
def test_deepspeed_shares_the_states_out(model: Path, tmp_path: Path, form: str, stage: int, bytes_each: float) -> None:
    file = tmp_path / ("ds.json" if form == "file" else f"ds_z{stage}_config.json")
    if form == "file":
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    train = {"finetuning_type": "full", "cutoff_len": 16, "per_device_train_batch_size": 1, "deepspeed": str(file)}
    found = ask(model, 2, 2, **train)
    assert found.memory_per_rank == pytest.approx(PARAMETERS * bytes_each + DEVICE, rel=0.03)


def test_freeze_trains_the_last_layers(model: Path) -> None:
    assert ask(model, finetuning_type="freeze", **SFT).trainable == 2 * LAYER
    assert ask(model, finetuning_type="freeze", freeze_trainable_layers=-3, **SFT).trainable == 3 * LAYER


def test_lora_target_and_rank_count(model: Path) -> None:
    assert ask(model, lora_target="q_proj,v_proj", lora_rank=16).trainable == 16 * 24 * (2 * 896 + 896 + 128)
    assert (
        ask(model, lora_target=["q_proj"], additional_target="embed_tokens").trainable == 8 * 24 * 1792 + 151936 * 896
    )


def test_preferences_double_the_rows_and_full_ones_the_model(model: Path) -> None:
    train = SFT | {"per_device_train_batch_size": 1}
    sft, dpo = ask(model, **train), ask(model, **train, stage="dpo")
    assert dpo.memory_per_rank - sft.memory_per_rank >= logits(1)
    full = train | {"finetuning_type": "full"}
    more = ask(model, **full, stage="dpo").memory_per_rank - ask(model, **full).memory_per_rank
    assert more == pytest.approx(dpo.memory_per_rank - sft.memory_per_rank + PARAMETERS * 2, rel=0.01)


def test_on_a_cpu_processes_are_counted_and_fp32_weights_double(tmp_path: Path) -> None:
    found = ask(sparse(tmp_path / "m", "F32", 4), 1, 2, "cpu", cutoff_len=16, per_device_train_batch_size=1)
    assert found.weights_bytes == PARAMETERS * 4 and "(fp32)" in found.lines[0]
    assert "in each of 2 processes" in found.lines[1]
    assert found.memory_per_rank == pytest.approx(PARAMETERS * 4 + PROCESS, rel=0.15)


def test_a_folder_without_weights_is_not_estimated(tmp_path: Path) -> None:
    assert estimate(tmp_path, {}, 1, 1, "cpu") is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"save_steps": 100}, "a checkpoint every 100 steps (53 MB), the last 2 kept"),
        ({"save_strategy": "epoch", "save_total_limit": None}, "a checkpoint every epoch (53 MB), all kept"),
        ({"save_strategy": "no"}, "train.save_strategy=no: no checkpoints, a training that is cut off starts anew"),
        ({"save_only_model": True}, "its checkpoints lack the optimizer, a training that is cut off starts anew"),
    ],
)
def test_how_often_it_is_saved(model: Path, given: dict[str, object], words: str) -> None:
    assert any(line.endswith(words) for line in ask(model, **SFT | given).lines)


def test_the_memory_of_a_merge_is_said_where_there_is_one(model: Path) -> None:
    said = [str(estimate(model, {}, 1, 1, "cpu", merges)) for merges in (True, False)]
    assert ["of memory for the merge" in text for text in said] == [True, False]
