"""A model folder's files, read without a library: JSON objects and the headers of safetensors files. Never raises."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# a safetensors header of more than this is refused by the library too
_LARGEST_HEADER = 100_000_000
NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "I8": "int8", "U8": "int8"}


@dataclass(frozen=True)
class Weights:
    """What the weights hold: ``parameters`` numbers in ``size`` bytes, most of them as ``dtype`` (bf16, fp32, …)."""

    parameters: int
    size: int
    dtype: str


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def header(file: Path) -> dict[str, Any] | None:
    """The tensors that a safetensors file promises; None where it is not whole."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                return None
            tensors = json.loads(stream.read(length))
        tensors.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return dict(tensors) if size == 8 + length + end else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that would be loaded: those of the index, else model.safetensors, else all."""
    listed = read_object(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(listed, dict) and listed:
        return [folder / name for name in sorted({str(name) for name in listed.values()})]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def weights(folder: Path) -> Weights:
    """What the headers say of the weights in ``folder``; all zero where there are none."""
    by_type: dict[str, int] = {}
    size = 0
    for file in weight_files(folder):
        for tensor in (header(file) or {}).values():
            try:
                by_type[tensor["dtype"]] = by_type.get(tensor["dtype"], 0) + prod(tensor["shape"])
                size += tensor["data_offsets"][1] - tensor["data_offsets"][0]
            except (KeyError, TypeError, IndexError):
                continue
    most = max(by_type, key=lambda name: by_type[name]) if by_type else "?"
    return Weights(sum(by_type.values()), size, NAMES.get(most, most.lower()))
