"""Labels: what differs in a point of a sweep, short and safe as the name of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LONGEST = 60
SHORT = {
    "dataset": "ds",
    "dataset.path": "ds",
    "model.path": "model",
    "train.learning_rate": "lr",
    "train.num_train_epochs": "epochs",
    "train.max_steps": "steps",
    "train.per_device_train_batch_size": "bs",
    "train.gradient_accumulation_steps": "accum",
    "train.lora_rank": "rank",
    "train.lora_alpha": "alpha",
    "train.lora_dropout": "dropout",
    "train.weight_decay": "wd",
    "train.warmup_ratio": "warmup",
    "train.lr_scheduler_type": "schedule",
    "train.cutoff_len": "cutoff",
    "train.max_samples": "samples",
    "train.finetuning_type": "tuning",
    "cluster.nproc_per_node": "nproc",
}


def labels_of(points: Sequence[Mapping[str, str]]) -> list[str]:
    """A label for each point, from what varies in it; no two are the same."""
    names = _names(list(points[0]))
    labels: list[str] = []
    taken: set[str] = set()
    for values in points:
        label = _fitting([(names[key], _safe(value)) for key, value in values.items()])
        unique, number = label, 1
        while unique.lower() in taken:  # not every file system tells a from A
            number += 1
            unique = f"{label[: LONGEST - len(f'~{number}')]}~{number}"
        taken.add(unique.lower())
        labels.append(unique)
    return labels


def _names(keys: Sequence[str]) -> dict[str, str]:
    short = {key: SHORT.get(key, key.rpartition(".")[2]) for key in keys}
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _safe(value: str) -> str:
    text = value.strip().strip("'\"")
    if re.fullmatch(r"[^\s${]*/[^/\s{}]+/?", text):
        text = text.rstrip("/").rpartition("/")[2]  # of a path, the file
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "_"


def _fitting(parts: Sequence[tuple[str, str]]) -> str:
    """As long as a label may be: the longest values are cut."""
    longest = max((len(value) for _, value in parts), default=0)
    label = ""
    for length in range(longest, 2, -1):
        label = ",".join(f"{name}={value[:length]}" for name, value in parts)
        if len(label) <= LONGEST:
            return label
    return (label or ",".join(f"{name}={value}" for name, value in parts))[:LONGEST] or "point"
