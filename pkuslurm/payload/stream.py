"""The merge by streaming: the base's files again, block by block, with other numbers where the adapter changes them.

Headers, names, order and dtypes stay. Needs numpy and a few megabytes; no torch, no device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import (
    STEP,
    STORED,
    Array,
    Form,
    add_pairs,
    even_and_odd,
    form_for,
    has_nan,
    narrow,
    narrow_pairs,
    room,
    row_norms,
    scaled,
    widen,
)
from .files import no_room
from .shares import in_shares
from .spans import Layout, Span, read_into, write_all
from .stream_plan import Change, NotStreamable, Plan

# numbers that are computed at once: they and what is made of them stay in the processor's cache
BLOCK = 3 << 15
_COPY = 1 << 18
Block = Callable[[], None]


def stream(plan: Plan, folder: Path) -> None:
    """Write the merged weights into ``folder``; ``sync`` brings them onto the disk. Raises NotStreamable, Failed,
    OSError."""
    _check_forms(plan)
    targets = [folder / file.path.name for file in plan.files]
    for target in targets:
        os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    handle = os.open(plan.adapter.path, os.O_RDONLY)
    try:
        in_shares(lambda: chain.from_iterable(map(_file, repeat(plan), plan.files, targets, repeat(handle))))
    finally:
        os.close(handle)


def sync(plan: Plan, folder: Path) -> None:
    """Wait until what ``stream`` wrote is on the disk. Raises OSError."""
    for path in (*(folder / file.path.name for file in plan.files), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            os.close(handle)


def block_rows(columns: int) -> int:
    """Rows of a block, of which each has ``columns`` numbers."""
    return max(STEP, BLOCK // max(columns, 1) // STEP * STEP)


def _check_forms(plan: Plan) -> None:
    places = {span.name: span for file in plan.files for span in file.spans}
    for name, change in plan.changes.items():
        if change.kind != "whole":
            rows, columns = places[name].shape
            width = columns // 2 if in_pairs(places[name], change.kind) else columns
            for some in heights(rows, columns, block_rows(columns)):
                _form(name, some, width, _rank(change))


def in_pairs(span: Span, kind: str) -> bool:
    """Whether its even columns can be computed apart from the odd ones."""
    return kind == "lora" and span.dtype == "BF16" and span.shape[1] % (2 * STEP) == 0


def _form(name: str, rows: int, columns: int, rank: int) -> Form:
    found = form_for(rows, columns, rank)
    if found is None:
        raise NotStreamable(f"{name}: numpy here does not multiply {rows}x{rank} by {rank}x{columns} as torch does")
    return found


def _rank(change: Change) -> int:
    part = change.parts.get("A") or change.parts["embedding_A"]
    return part.shape[0]


def heights(rows: int, columns: int, most: int) -> set[int]:
    """Of the blocks of ``most`` rows that such a matrix is cut into."""
    return {min(most, rows), rows % most} - {0} if columns else set()


def _file(plan: Plan, file: Layout, target: Path, adapter: int) -> Iterator[Block]:
    source = os.open(file.path, os.O_RDONLY)
    try:
        made = os.open(target, os.O_RDWR)
        try:
            for block in _blocks(plan, file, source, made, adapter):
                yield partial(_or_no_room, block, target)
        finally:
            os.close(made)
    finally:
        os.close(source)


def _or_no_room(block: Block, target: Path) -> None:
    try:
        block()
    except OSError as error:
        if no_room(error):
            error.filename = str(target)
        raise


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
        yield partial(copy, begin, min(begin + _COPY, end))


def _changed(plan: Plan, span: Span, change: Change, source: int, made: int, adapter: int) -> Iterator[Block]:
    if change.kind == "whole":
        yield from _wholes(span, change.parts["whole"], made, adapter)
        return
    rows, columns = span.shape
    parts = {part: read(adapter, one) for part, one in change.parts.items()}
    embedding, pairs = change.kind == "embedding", in_pairs(span, change.kind)
    if embedding:
        left, right = parts["embedding_A"].T, np.ascontiguousarray(parts["embedding_B"].T)
    else:
        left, right = parts["B"], even_and_odd(parts["A"]) if pairs else parts["A"]
    before = scaled(left, right, plan.scale)
    left = left if before is None else before
    magnitude, scale = parts.get("magnitude"), np.float32(plan.scale)
    width = columns * np.dtype(STORED[span.dtype]).itemsize
    most, rank = block_rows(columns), _rank(change)

    def block(start: int) -> None:
        end = min(start + most, rows)
        shape = end - start, columns
        stored = room("stored", shape, STORED[span.dtype])
        read_into(source, raw(stored), span.start + start * width)
        some = np.ascontiguousarray(left[start:end])
        if pairs:
            result = in_words(some, stored)
        else:
            delta = product(some, right, room("delta", shape, np.float32))
            result = narrow(_numbers(span, whole(delta, stored, start, end)), span.dtype)
        write_all(made, raw(result), span.start + start * width)

    def product(some: Array, right: Array, delta: Array) -> Array:
        _form(span.name, len(delta), delta.shape[1], rank)(some, right, delta)
        if before is None:
            np.multiply(delta, scale, out=delta)
        return delta

    def in_words(some: Array, stored: Array) -> Array:
        numbers = room("delta", (2, len(stored), columns // 2), np.float32)
        for half, one in zip(numbers, right, strict=True):
            product(some, one, half)
        add_pairs(numbers, stored)
        return narrow_pairs(_numbers(span, numbers))

    def whole(delta: Array, stored: Array, start: int, end: int) -> Array:
        if embedding:
            # PEFT rounds this one before it adds it
            widen(narrow(delta, span.dtype), span.dtype, delta)
        numbers = widen(stored, span.dtype, room("numbers", delta.shape, np.float32))
        numbers += delta
        if magnitude is not None:
            with np.errstate(all="ignore"):
                numbers *= (magnitude[start:end] / row_norms(numbers))[:, None]
        return numbers

    for start in range(0, rows, most):
        yield partial(block, start)


def _numbers(span: Span, numbers: Array) -> Array:
    if has_nan(numbers):
        raise NotStreamable(f"{span.name} would hold what is no number")
    return numbers


def _wholes(span: Span, other: Span, made: int, adapter: int) -> Iterator[Block]:
    size, width = np.dtype(STORED[other.dtype]).itemsize, np.dtype(STORED[span.dtype]).itemsize
    count = (other.end - other.start) // size

    def block(start: int) -> None:
        stored = room("stored", (min(BLOCK, count - start),), STORED[other.dtype])
        read_into(adapter, raw(stored), other.start + start * size)
        numbers = _numbers(span, widen(stored, other.dtype, room("numbers", stored.shape, np.float32)))
        write_all(made, raw(narrow(numbers, span.dtype)), span.start + start * width)

    for start in range(0, count, BLOCK):
        yield partial(block, start)


def read(handle: int, span: Span) -> Array:
    """One tensor as float32."""
    stored: Any = np.empty(span.shape, STORED[span.dtype])
    if stored.size:
        read_into(handle, raw(stored), span.start)
    return widen(stored, span.dtype, np.empty(span.shape, np.float32))


def raw(stored: Array) -> memoryview:
    """The bytes of an array that lies whole in memory."""
    return stored.reshape(-1).view(np.uint8).data
