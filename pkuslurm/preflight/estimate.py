"""How much memory and disk a run will want, from config.json and the weights' headers. Reads only, without torch.

Rough: within an eighth of what LLaMA-Factory took on a CPU (58 M parameters, lora and full); on devices not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.preflight.modelfiles import header, read_object, weight_files, weights

GB = 1e9
# A process that has imported torch and LLaMA-Factory; on a device: its context, collectives and what is fragmented.
PROCESS = 0.9 * GB
DEVICE = 1.5 * GB
SMALL = 0.2 * GB  # tokenized data, logs, answers, the report
ADAM = 8  # two fp32 moments
# Bytes of one logit at the loss: as it is computed, as fp32, its softmax and its gradient.
LOGIT = 14
# Layers that attention and MLP are made of, where lora_target is "all": everything linear but the head.
_HEADS = ("lm_head", "embed_tokens", "wte", "output_layer", "embeddings", "score", "v_head")
_LAYER = re.compile(r"\.(?:layers|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True)
class Estimate:
    """Bytes, but for the two counts. ``lines`` say it to people."""

    parameters: int
    trainable: int
    weights_bytes: int
    memory_per_rank: int
    memory_merge: int
    disk_run: int
    lines: tuple[str, ...]


def estimate(
    folder: Path, train: Mapping[str, Any], nodes: int, nproc: int, accelerator: str, merges: bool = True
) -> Estimate | None:
    """What ``train`` (LLaMA-Factory's keys) on the model in ``folder`` wants; None where its weights cannot be read.

    ``merges``: a merge follows, whose memory is said.
    """
    found = weights(folder)
    if not found.parameters:
        return None
    config = read_object(folder / "config.json")
    config = config | (config.get("text_config") or {})
    ranks = max(1, nodes * nproc)
    trainable = _trainable(folder, train, found.parameters)
    each = found.size / found.parameters  # bytes a number, as it is in the files and thus in memory
    states = _states(train, found.size, found.parameters, trainable, each, ranks)
    logits = _tokens(train) * _number(config, "vocab_size") * LOGIT if train.get("stage") != "rm" else 0
    device = PROCESS if accelerator == "cpu" else DEVICE
    memory = states + _activations(train, config, each) + logits + device
    tuned = found.size if _kind(train) in ("lora", "oft") else trainable * 4 + (found.parameters - trainable) * each
    merge = found.size * 1.3 + PROCESS
    result, checkpoint, kept = _saved(train, folder, trainable, tuned)
    merged = 2 * found.size if _kind(train) in ("lora", "oft") else 0  # a full fine-tune's is linked
    disk = result + kept * checkpoint + merged + SMALL
    lines = [
        f"{_count(found.parameters)} parameters, {_gb(found.size)} of weights ({found.dtype}); "
        f"{_kind(train)} trains {_count(trainable)} of them",
        f"needs up to about {_gb(memory)} of memory {_where(nodes, nproc, accelerator)}, {_gb(disk)} on disk"
        + (f", {_gb(merge)} of memory for the merge" if merges else ""),
        saving(train, checkpoint),
    ]
    if logits > memory / 2 and logits > 4 * GB:
        lines.append(
            f"{_gb(logits)} of that are for one batch of answers (cutoff_len {train.get('cutoff_len', 2048)} × batch "
            f"{_batch(train)} × {config.get('vocab_size')} words): lower train.per_device_train_batch_size and raise "
            "train.gradient_accumulation_steps by as much"
        )
    elif accelerator == "npu" and memory > 60 * GB:
        lines.append(
            "an Ascend 910B has 64 GB, some have 32: lower train.per_device_train_batch_size, take lora, or share the "
            "states out with train.deepspeed"
        )
    return Estimate(
        found.parameters, trainable, found.size, round(memory), round(merge), round(disk), tuple(lines)
    )  # fmt: skip


def _trainable(folder: Path, train: Mapping[str, Any], parameters: int) -> int:
    kind = _kind(train)
    if kind == "full":
        return parameters
    shapes = {
        name.removesuffix(".weight"): [int(size) for size in tensor.get("shape") or ()]
        for file in weight_files(folder)
        for name, tensor in (header(file) or {}).items()
    }
    if kind == "freeze":
        return _last_layers(shapes, int(train.get("freeze_trainable_layers") or 2))
    rank = int(train.get("lora_rank") or 8)
    wanted = _words(train.get("lora_target", "all"))
    extra = _words(train.get("additional_target"))
    total = 0
    for name, shape in shapes.items():
        last = name.rpartition(".")[2]
        if last in extra:
            total += math.prod(shape)
        elif len(shape) == 2 and (last in wanted or ("all" in wanted and last not in _HEADS)):
            total += rank * sum(shape)
    return total


def _last_layers(shapes: Mapping[str, list[int]], layers: int) -> int:
    """The parameters of the last ``layers`` layers, or, if negative, of the first."""
    by_layer: dict[int, int] = {}
    for name, shape in shapes.items():
        if found := _LAYER.search(name + "."):
            number = int(found.group(1))
            by_layer[number] = by_layer.get(number, 0) + math.prod(shape)
    numbers = sorted(by_layer)
    chosen = numbers[-layers:] if layers > 0 else numbers[:-layers]
    return sum(by_layer[number] for number in chosen)


def _states(
    train: Mapping[str, Any], size: int, parameters: int, trainable: int, each: float, ranks: int
) -> float:  # fmt: skip
    """Weights, gradients and Adam's moments on one rank, DDP's or those that DeepSpeed shares out."""
    bits = train.get("quantization_bit")
    frozen = (parameters - trainable if _kind(train) in ("full", "freeze") else parameters) * each
    if bits:
        frozen = parameters * int(bits) / 8 * 1.1
    # LLaMA-Factory trains what is trained in fp32, unless pure_bf16
    number = 2 if train.get("pure_bf16") else 4
    held = gradient = float(trainable * number)
    moments = trainable * 2.0 * number
    stage = _zero(train)
    if stage >= 1:
        moments = trainable * (ADAM + 4) / ranks
        held = gradient = trainable * 2.0
    elif ranks > 1:
        gradient *= 2  # DDP's buckets beside the gradients
    if stage >= 2:
        gradient = gradient / ranks
    if stage >= 3:
        held, frozen = held / ranks, frozen / ranks
    reference = size if train.get("stage") in ("dpo", "kto", "ppo") and _kind(train) not in ("lora", "oft") else 0
    if reference and train.get("pref_loss") in ("orpo", "simpo"):
        reference = 0
    return frozen + held + gradient + moments + reference


def _activations(train: Mapping[str, Any], config: Mapping[str, Any], each: float) -> float:
    """Each layer's input, kept for the way back, and one layer with all that is inside it."""
    hidden, layers = _number(config, "hidden_size"), _number(config, "num_hidden_layers")
    inner = _number(config, "intermediate_size") or 4 * hidden
    number = 2 if train.get("bf16") or train.get("fp16") or train.get("pure_bf16") else max(each, 2)
    inside = 16 * hidden + 6 * inner
    whole = layers if train.get("disable_gradient_checkpointing") else 1
    return _tokens(train) * number * (layers * hidden + whole * inside)


def _saved(train: Mapping[str, Any], folder: Path, trainable: int, tuned: float) -> tuple[float, float, int]:
    """Bytes of what the training leaves, of one checkpoint, and how many of those lie there at once."""
    number = 2 if train.get("pure_bf16") else 4
    saved = trainable * number if _kind(train) in ("lora", "oft") else tuned
    tokenizer = sum(file.stat().st_size for name in ("tokenizer*", "vocab*", "merges*") for file in folder.glob(name))
    optimizer = 0 if train.get("save_only_model") else trainable * 2 * number
    limit = train.get("save_total_limit")
    kept = 0 if train.get("save_strategy") == "no" else (int(limit) if limit else 5) + 1  # one more while it is written
    return saved + tokenizer, saved + optimizer + tokenizer, kept


def saving(train: Mapping[str, Any], checkpoint: float | None = None) -> str:
    """How often, how large (bytes; None: not known yet), how many are kept; or what a stop would lose."""
    if train.get("save_only_model"):
        return "train.save_only_model=true: its checkpoints lack the optimizer, a training that is cut off starts anew"
    strategy = train.get("save_strategy", "steps")
    if strategy == "no":
        return "train.save_strategy=no: no checkpoints, a training that is cut off starts anew"
    limit = train.get("save_total_limit")
    often = f"every {train.get('save_steps', 500)} steps" if strategy == "steps" else f"every {strategy}"
    size = "" if checkpoint is None else f" ({_gb(checkpoint)})"
    return f"a checkpoint {often}{size}, {f'the last {limit}' if limit else 'all'} kept"


def _zero(train: Mapping[str, Any]) -> int:
    """The ZeRO stage of the DeepSpeed configuration, by its file, its text or its file's usual name; 0 without one."""
    given = train.get("deepspeed")
    if not given:
        return 0
    content = given if isinstance(given, Mapping) else read_object(Path(str(given)))
    stage = (content.get("zero_optimization") or {}).get("stage") if content else None
    if isinstance(stage, int):
        return stage
    named = re.search(r"z(?:ero)?_?-?(\d)", str(given).rpartition("/")[2])
    return int(named.group(1)) if named else 1


def _tokens(train: Mapping[str, Any]) -> int:
    """Of one batch on one rank, if every row is as long as allowed. Preferences come in pairs."""
    pairs = 2 if train.get("stage") in ("dpo", "rm", "kto") else 1
    return int(train.get("cutoff_len") or 2048) * _batch(train) * pairs


def _batch(train: Mapping[str, Any]) -> int:
    return int(train.get("per_device_train_batch_size") or 8)


def _kind(train: Mapping[str, Any]) -> str:
    return str(train.get("finetuning_type") or "lora")


def _words(value: object) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(word) for word in value]
    return [word.strip() for word in str(value).split(",")] if value else []


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def _where(nodes: int, nproc: int, accelerator: str) -> str:
    unit = "process" if accelerator == "cpu" else "device"
    ranks = nodes * nproc
    if ranks == 1:
        return f"in its {unit}" if accelerator == "cpu" else f"on its {unit}"
    plural = "processes" if unit == "process" else "devices"
    return f"in each of {ranks} {plural}" if accelerator == "cpu" else f"on each of {ranks} {plural}"


def _gb(size: float) -> str:
    if size < 0.095 * GB:
        return f"{size / 1e6:.0f} MB"
    return f"{size / GB:.1f} GB" if size < 9.95 * GB else f"{size / GB:.0f} GB"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            value = number / size
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return str(number)
