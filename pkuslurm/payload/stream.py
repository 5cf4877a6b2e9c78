"""The merge by streaming: the base's files again, block by block, with other numbers where the adapter changes them.

Headers, names, order and dtypes stay. Needs numpy and a few megabytes; no torch, no device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import STEP, STORED, Array, Form, form_for, has_nan, narrow, room, row_norms, widen
from .files import no_room
from .shares import in_shares
from .spans import Layout, Span, read_into, write_all
from .stream_plan import Change, NotStreamable, Plan

# numbers that are computed at once: they and what is made of them stay in the processor's cache
BLOCK = 1 << 16
_COPY = 1 << 20
Block = Callable[[], None]


def stream(plan: Plan, folder: Path) -> None:
    """Write the merged weights into ``folder``. Raises NotStreamable, Failed, OSError."""
    _check_forms(plan)
    handle = os.open(plan.adapter.path, os.O_RDONLY)
    try:
        for file in plan.files:
            _write(plan, file, handle, folder / file.path.name)
    finally:
        os.close(handle)
    _sync(folder)


def block_rows(columns: int) -> int:
    """Rows of a block, of which each has ``columns`` numbers."""
    return max(STEP, BLOCK // max(columns, 1) // STEP * STEP)


def _check_forms(plan: Plan) -> None:
    places = {span.name: span for file in plan.files for span in file.spans}
    for name, change in plan.changes.items():
        if change.kind != "whole":
            rows, columns = places[name].shape
            for some in _heights(rows, columns):
                _form(name, some, columns, _rank(change))


def _form(name: str, rows: int, columns: int, rank: int) -> Form:
    found = form_for(rows, columns, rank)
    if found is None:
        raise NotStreamable(f"{name}: numpy here does not multiply {rows}x{rank} by {rank}x{columns} as torch does")
    return found


def _rank(change: Change) -> int:
    part = change.parts.get("A") or change.parts["embedding_A"]
    return part.shape[0]


def _heights(rows: int, columns: int) -> set[int]:
    most = block_rows(columns)
    return {min(most, rows)} | ({rows % most} - {0} if rows > most else set()) if rows and columns else set()


def _write(plan: Plan, file: Layout, adapter: int, target: Path) -> None:
    source = os.open(file.path, os.O_RDONLY)
    try:
        made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            in_shares(lambda: _blocks(plan, file, source, made, adapter))
            os.fsync(made)
        except OSError as error:
            if no_room(error):
                error.filename = str(target)
            raise
        finally:
            os.close(made)
    finally:
        os.close(source)


def _blocks(plan: Plan, file: Layout, source: int, made: int, adapter: int) -> Iterator[Block]:
    """Every byte of the file, once: what is between the changed tensors is copied."""
    at = 0
    for span in file.spans:
        change = plan.changes.get(span.name)
        if change is None or span.start == span.end:
            continue
        yield from _copies(source, made, at, span.start)
        yield from _changed(plan, span, change, source, made, adapter)
        at = span.end
    yield from _copies(source, made, at, file.size)


def _copies(source: int, made: int, start: int, end: int) -> Iterator[Block]:
    def copy(start: int, end: int) -> None:
        buffer = room("copied", (end - start,), np.uint8).data
        read_into(source, buffer, start)
        write_all(made, buffer, start)

    for begin in range(start, end, _COPY):
        yield lambda begin=begin: copy(begin, min(begin + _COPY, end))  # type: ignore[misc]


def _changed(plan: Plan, span: Span, change: Change, source: int, made: int, adapter: int) -> Iterator[Block]:
    if change.kind == "whole":
        yield from _wholes(span, change.parts["whole"], made, adapter)
        return
    rows, columns = span.shape
    parts = {part: read(adapter, one) for part, one in change.parts.items()}
    if change.kind == "embedding":
        left, right = parts["embedding_A"].T, np.ascontiguousarray(parts["embedding_B"].T)
    else:
        left, right = parts["B"], parts["A"]
    magnitude, scale, embedding = parts.get("magnitude"), np.float32(plan.scale), change.kind == "embedding"
    width = columns * np.dtype(STORED[span.dtype]).itemsize
    most, rank = block_rows(columns), _rank(change)

    def block(start: int) -> None:
        end = min(start + most, rows)
        shape = end - start, columns
        stored, delta = room("stored", shape, STORED[span.dtype]), room("delta", shape, np.float32)
        read_into(source, raw(stored), span.start + start * width)
        _form(span.name, *shape, rank)(np.ascontiguousarray(left[start:end]), right, delta)
        delta *= scale
        if embedding:
            # PEFT rounds this one before it adds it
            widen(narrow(delta, span.dtype), span.dtype, delta)
        numbers = widen(stored, span.dtype, room("numbers", shape, np.float32))
        numbers += delta
        if magnitude is not None:
            with np.errstate(all="ignore"):
                numbers *= (magnitude[start:end] / row_norms(numbers))[:, None]
        if has_nan(numbers):
            raise NotStreamable(f"{span.name} would hold what is no number")
        result = narrow(numbers, span.dtype)
        write_all(made, raw(result), span.start + start * width)

    for start in range(0, rows, most):
        yield lambda start=start: block(start)  # type: ignore[misc]


def _wholes(span: Span, other: Span, made: int, adapter: int) -> Iterator[Block]:
    size, width = np.dtype(STORED[other.dtype]).itemsize, np.dtype(STORED[span.dtype]).itemsize
    count = (other.end - other.start) // size

    def block(start: int) -> None:
        stored = room("stored", (min(BLOCK, count - start),), STORED[other.dtype])
        read_into(adapter, raw(stored), other.start + start * size)
        numbers = widen(stored, other.dtype, room("numbers", stored.shape, np.float32))
        if has_nan(numbers):
            raise NotStreamable(f"{span.name} would hold what is no number")
        write_all(made, raw(narrow(numbers, span.dtype)), span.start + start * width)

    for start in range(0, count, BLOCK):
        yield lambda start=start: block(start)  # type: ignore[misc]


def read(handle: int, span: Span) -> Array:
    """One tensor as float32."""
    stored: Any = np.empty(span.shape, STORED[span.dtype])
    if stored.size:
        read_into(handle, raw(stored), span.start)
    return widen(stored, span.dtype, np.empty(span.shape, np.float32))


def raw(stored: Array) -> memoryview:
    """The bytes of an array that lies whole in memory."""
    return stored.reshape(-1).view(np.uint8).data


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
