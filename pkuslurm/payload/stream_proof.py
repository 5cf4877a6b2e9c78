"""Whether merged files are base + adapter: read back and computed once more, number by number, by other code than made
them.

It starts from the files, not from a plan: each tensor that is found asks the adapter for its parts, every part must be
asked for, what has none must be the base's to the byte. Blocks are others, and a number is not rounded but judged:
what is stored must be the nearest one, the even one of two. What both share is how a product is computed (``form_for``
holds that against exact arithmetic) and how settings become one scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from .arithmetic import STEP, STORED, Array, form_for, has_nan, in_parts, narrow, room, row_norms, widen
from .models import Proof, Unequal
from .shares import Failed, in_shares
from .spans import FLOATS, Layout, Span, layout, read_into
from .stream import block_rows, heights, raw, read
from .stream_plan import PREFIX, Plan

_PIECE = 1 << 18
_LAST = 1 << 16  # the last bit that bfloat16 keeps of a float32
_HALF = _LAST >> 1
Check = Callable[[], bool]


def prove(plan: Plan, folder: Path, beside: Callable[[], None] | None = None) -> Proof:
    """Every number of the files in ``folder``; ``beside`` is done meanwhile. Raises Unequal, OSError, ValueError."""
    adapter = layout(plan.adapter.path)
    parts = {span.name: span for span in adapter.spans}
    used: set[str] = set()
    tensors, dtypes = 0, set()
    for base in plan.files:
        merged = layout(folder / base.path.name)
        if (base.size, base.data, base.spans) != (merged.size, merged.data, merged.spans):
            raise Unequal(f"{merged.path.name} is not laid out as the base's", names=True)
        tensors += len(merged.spans)
        dtypes |= {FLOATS.get(span.dtype, span.dtype.lower()) for span in merged.spans}
        for span in merged.spans:
            found = _parts(span, parts)
            used.update(found)
            _learn_forms(span, found)
    for name in sorted(parts.keys() - used):
        raise Unequal(f"adapter tensor {name} is not used: the base has no place for it")
    handle = os.open(adapter.path, os.O_RDONLY)
    try:
        in_shares(lambda: chain.from_iterable(_file(plan, base, folder, handle, parts) for base in plan.files), beside)
    except Failed as error:
        raise Unequal(str(error)) from None
    finally:
        os.close(handle)
    return Proof(tensors, tensors, 0.0, dtypes.pop() if len(dtypes) == 1 else "mixed")


def _learn_forms(span: Span, found: dict[str, Span]) -> None:
    """Here, once: what a share finds out it does not tell the others."""
    for part in found.values():
        if part.name.removesuffix(".weight").endswith(("lora_A", "lora_embedding_A")):
            rows, columns = span.shape
            width = columns // 2 if _in_words(span, [*found]) else columns
            for height in heights(rows, columns, _height(columns)):
                form_for(height, width, part.shape[0])


def _in_words(span: Span, names: Collection[str]) -> bool:
    """Two columns are one word of the file, and can be computed apart."""
    plain = not any("lora_embedding" in name or "lora_magnitude" in name for name in names)
    return plain and span.dtype == "BF16" and span.shape[1] % (2 * STEP) == 0


def _file(plan: Plan, base: Layout, folder: Path, adapter: int, parts: dict[str, Span]) -> Iterator[Callable[[], None]]:
    one = os.open(base.path, os.O_RDONLY)
    try:
        other = os.open(folder / base.path.name, os.O_RDONLY)
        try:
            yield from _each(plan, base, one, other, adapter, parts)
        finally:
            os.close(other)
    finally:
        os.close(one)


def _each(
    plan: Plan, base: Layout, one: int, other: int, adapter: int, parts: dict[str, Span]
) -> Iterator[Callable[[], None]]:
    at = 0
    for span in base.spans:
        yield from _or_unequal(_same(one, other, at, span.start), f"the header of {base.path.name} is not the base's")
        if found := _parts(span, parts):
            yield from _or_unequal(
                _checks(plan, span, found, one, other, adapter), f"tensor {span.name} is not base + adapter"
            )
        else:
            yield from _or_unequal(_same(one, other, span.start, span.end), f"tensor {span.name} is not the base's")
        at = span.end
    yield from _or_unequal(_same(one, other, at, base.size), f"the end of {base.path.name} is not the base's")


def _or_unequal(checks: Iterator[Check], words: str) -> Iterator[Callable[[], None]]:
    def run(check: Check) -> None:
        if not check():
            raise Unequal(words)

    for check in checks:
        yield lambda check=check: run(check)  # type: ignore[misc]


def _parts(span: Span, parts: dict[str, Span]) -> dict[str, Span]:
    names = _names(span.name.removesuffix(".weight"), span.name)
    return {name: parts[name] for name in names if name in parts}


def _names(module: str, tensor: str) -> Iterator[str]:
    yield PREFIX + tensor
    yield f"{PREFIX}{module}.base_layer.weight"
    for end in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        yield f"{PREFIX}{module}.{end}"
        yield f"{PREFIX}{module}.{end}.weight"


def _same(one: int, other: int, start: int, end: int) -> Iterator[Check]:
    def same(start: int, end: int) -> bool:
        left, right = (room(name, (end - start,), np.uint8) for name in ("left", "right"))
        read_into(one, left.data, start)
        read_into(other, right.data, start)
        return bool(np.array_equal(left, right))

    for begin in range(start, end, _PIECE):
        yield partial(same, begin, min(begin + _PIECE, end))


def _checks(plan: Plan, span: Span, found: dict[str, Span], base: int, merged: int, adapter: int) -> Iterator[Check]:
    """Compute the tensor anew, in blocks of another height than it was made in."""
    loaded = {name.removeprefix(PREFIX).removesuffix(".weight"): read(adapter, one) for name, one in found.items()}
    module = span.name.removesuffix(".weight")
    if (beside := loaded.pop(f"{module}.base_layer", None)) is not None:
        before = beside.reshape(-1)
        yield lambda: _nearest(before, _stored(base, span, 0, before.shape), span.dtype)
    if list(loaded) == [module]:
        whole = loaded[module].reshape(-1)
        yield lambda: _nearest(whole, _stored(merged, span, 0, whole.shape), span.dtype)
        return
    rows, columns = span.shape
    embedding = f"{module}.lora_embedding_A" in loaded
    end = "lora_embedding" if embedding else "lora"
    down, up = loaded[f"{module}.{end}_A"], loaded[f"{module}.{end}_B"]
    magnitude = loaded.get(f"{module}.lora_magnitude_vector")
    scale = np.float32(plan.scale)
    height = _height(columns)
    words = _in_words(span, loaded)
    downs = [down[:, 1::2], down[:, ::2]] if words else [down]
    downs = [np.ascontiguousarray(one) for one in downs]

    def check(start: int) -> bool:
        stop = min(start + height, rows)
        shape = stop - start, columns
        old, new = (
            _stored(file, span, start * columns, shape, name) for file, name in ((base, "old"), (merged, "new"))
        )
        deltas = room("added", (len(downs), stop - start, columns // len(downs)), np.float32)
        for one, delta in zip(downs, deltas, strict=True):
            left, right = (one[:, start:stop].T, up.T) if embedding else (up[start:stop], one)
            form = form_for(*delta.shape, len(down))
            if form is None:
                return False
            form(np.ascontiguousarray(left), np.ascontiguousarray(right), delta)
        if scale != 1:
            np.multiply(deltas, scale, out=deltas)
        if words:
            return _nearest_words(deltas, old.view(np.int32), new.view(np.int32))
        return _nearest(wanted(deltas[0], old, start, stop), new, span.dtype)

    def wanted(delta: Array, old: Array, start: int, stop: int) -> Array:
        if embedding:
            widen(narrow(delta, span.dtype), span.dtype, delta)
        numbers = widen(old, span.dtype, room("wanted", delta.shape, np.float32))
        np.add(delta, numbers, out=numbers)
        if magnitude is not None:
            with np.errstate(all="ignore"):
                numbers *= (magnitude[start:stop] / row_norms(numbers)).reshape(-1, 1)
        return numbers

    for start in range(0, rows, height):
        yield partial(check, start)


def _height(columns: int) -> int:
    return max(STEP, block_rows(columns) * 2 // 3 // STEP * STEP)


def _stored(handle: int, span: Span, first: int, shape: tuple[int, ...], name: str = "new") -> Array:
    found = room(name, shape, STORED[span.dtype])
    if found.size:
        read_into(handle, raw(found), span.start + first * found.itemsize)
    return found


def _nearest(numbers: Array, stored: Array, dtype: str) -> bool:
    """Whether each of ``stored`` is what its number rounds to, to nearest even."""
    if has_nan(numbers):
        return False
    if dtype == "F32":
        return numbers.view(np.uint32).tobytes() == stored.view(np.uint32).tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).tobytes() == stored.tobytes()
    kept = widen(stored, dtype, room("kept", stored.shape, np.float32)).view(np.int32)
    return _close(np.subtract(numbers.view(np.int32), kept, out=kept), stored)


def _nearest_words(numbers: Array, old: Array, new: Array) -> bool:
    """Whether bfloat16 ``new`` are the nearest to ``numbers`` + ``old``; of each word of the file the upper halves are
    first in ``numbers``, then the lower ones."""
    upper, lower = numbers
    kept = room("kept", old.shape, np.int32)
    np.add(upper, np.bitwise_and(old, -_LAST, out=kept).view(np.float32), out=upper)
    np.add(lower, np.left_shift(old, 16, out=kept).view(np.float32), out=lower)
    if has_nan(numbers):
        return False
    upper, lower = numbers.view(np.int32)
    np.subtract(upper, np.bitwise_and(new, -_LAST, out=kept), out=upper)
    np.subtract(lower, np.left_shift(new, 16, out=kept), out=lower)
    halves = new.view(np.uint16)
    return _close(upper, halves[:, 1::2]) and _close(lower, halves[:, ::2])


def _close(distance: Array, stored: Array) -> bool:
    """Whether each number is at most half of the last bit away from what is stored, and that far only from what is
    even. Of one sign, float32 lie in the order of their bits, so a distance is one of bits."""
    if not distance.size:
        return True
    parts = in_parts(distance)
    least, most = np.minimum.reduce(parts, axis=1), np.maximum.reduce(parts, axis=1)
    if least.min() < -_HALF or most.max() > _HALF:
        return False
    # one number in 65536 lies in the middle of two
    for place in np.flatnonzero((least == -_HALF) | (most == _HALF)):
        ties = np.flatnonzero(np.abs(parts[place]) == _HALF) + place * parts.shape[1]
        if (stored[np.unravel_index(ties, stored.shape)] & 1).any():
            return False
    return True
