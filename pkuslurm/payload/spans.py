"""Safetensors files by their bytes: where each tensor lies, reading and writing parts of a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LARGEST_HEADER = 100_000_000
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class Span:
    """One tensor: its bytes are ``start`` to ``end`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A file of ``size`` bytes; its ``spans`` in their order on disk, the first at ``data`` or after it."""

    path: Path
    size: int
    data: int
    spans: tuple[Span, ...]


def layout(path: Path) -> Layout:
    """Where everything is. Raises OSError, and ValueError for what is no whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{path.name} is no whole safetensors file")
        header = json.loads(stream.read(length), object_pairs_hook=_unique)
    data = 8 + length
    header.pop("__metadata__", None)
    try:
        spans = [
            Span(name, tensor["dtype"], tuple(tensor["shape"]), *(data + offset for offset in tensor["data_offsets"]))
            for name, tensor in header.items()
        ]
    except (KeyError, TypeError):
        raise ValueError(f"the header of {path.name} cannot be read") from None
    spans.sort(key=lambda span: (span.start, span.end))
    end = data
    for span in spans:
        wanted = math.prod(span.shape) * SIZES.get(span.dtype, 0) if span.dtype in SIZES else span.end - span.start
        if span.start < end or span.end - span.start != wanted:
            raise ValueError(f"tensor {span.name} of {path.name} is not where its header says")
        end = span.end
    if end > size:
        raise ValueError(f"{path.name} is truncated")
    return Layout(path, size, data, tuple(spans))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is in the header twice")
    return found


def read_into(handle: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset`` on. Raises OSError, also where the file ends too early."""
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at {offset + done}, {len(buffer) - done} bytes too early")
        done += count


def write_all(handle: int, buffer: memoryview, offset: int) -> None:
    """Raises OSError."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(handle, buffer[done:], offset + done)
