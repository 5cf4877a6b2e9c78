"""Whether merged files are base + adapter: read back and computed once more, number by number, by other code than made
them.

It starts from the files, not from a plan: each tensor that is found asks the adapter for its parts, every part must be
asked for, what has none must be the base's to the byte. Blocks are others, and a number is not rounded but judged:
what is stored must be the nearest one, the even one of two. What both share is how a product is computed (``form_for``
holds that against exact arithmetic) and how settings become one scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .arithmetic import STEP, STORED, Array, form_for, has_nan, narrow, room, row_norms, widen
from .models import Proof, Unequal
from .shares import Failed, in_shares
from .spans import FLOATS, Layout, Span, layout, read_into
from .stream import block_rows, raw, read
from .stream_plan import PREFIX, Plan

_PIECE = 1 << 20
_HALF = 1 << 15  # of the last bit that bfloat16 keeps of a float32
Check = Callable[[], bool]


def prove(plan: Plan, folder: Path) -> Proof:
    """Every number of the files in ``folder``. Raises Unequal, OSError, ValueError."""
    adapter = layout(plan.adapter.path)
    parts = {span.name: span for span in adapter.spans}
    used: set[str] = set()
    tensors, dtypes = 0, set()
    handle = os.open(adapter.path, os.O_RDONLY)
    try:
        for base in plan.files:
            merged = layout(folder / base.path.name)
            if (base.size, base.data, base.spans) != (merged.size, merged.data, merged.spans):
                raise Unequal(f"{merged.path.name} is not laid out as the base's", names=True)
            tensors += len(merged.spans)
            dtypes |= {FLOATS.get(span.dtype, span.dtype.lower()) for span in merged.spans}
            for span in merged.spans:
                used.update(_parts(span, parts))
            try:
                _file(plan, base, merged, handle, parts)
            except Failed as error:
                raise Unequal(f"{merged.path.name}: {error}") from None
    finally:
        os.close(handle)
    for name in sorted(parts.keys() - used):
        raise Unequal(f"adapter tensor {name} is not used: the base has no place for it")
    return Proof(tensors, tensors, 0.0, dtypes.pop() if len(dtypes) == 1 else "mixed")


def _file(plan: Plan, base: Layout, merged: Layout, adapter: int, parts: dict[str, Span]) -> None:
    one, other = os.open(base.path, os.O_RDONLY), os.open(merged.path, os.O_RDONLY)
    try:
        in_shares(lambda: _each(plan, base, one, other, adapter, parts))
    finally:
        os.close(one)
        os.close(other)


def _each(
    plan: Plan, base: Layout, one: int, other: int, adapter: int, parts: dict[str, Span]
) -> Iterator[Callable[[], None]]:
    at = 0
    for span in base.spans:
        yield from _or_unequal(_same(one, other, at, span.start), "the header is not the base's")
        if found := _parts(span, parts):
            yield from _or_unequal(
                _checks(plan, span, found, one, other, adapter), f"tensor {span.name} is not base + adapter"
            )
        else:
            yield from _or_unequal(_same(one, other, span.start, span.end), f"tensor {span.name} is not the base's")
        at = span.end
    yield from _or_unequal(_same(one, other, at, base.size), "the end is not the base's")


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
        yield lambda begin=begin: same(begin, min(begin + _PIECE, end))  # type: ignore[misc]


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
    height = max(STEP, block_rows(columns) // 2 // STEP * STEP)

    def check(start: int) -> bool:
        stop = min(start + height, rows)
        left, right = (down[:, start:stop].T, up.T) if embedding else (up[start:stop], down)
        form = form_for(stop - start, columns, len(down))
        if form is None:
            return False
        shape = stop - start, columns
        wanted, delta = (room(name, shape, np.float32) for name in ("wanted", "added"))
        form(np.ascontiguousarray(left), np.ascontiguousarray(right), delta)
        np.multiply(delta, scale, out=delta)
        if embedding:
            widen(narrow(delta, span.dtype), span.dtype, delta)
        widen(_stored(base, span, start * columns, shape), span.dtype, wanted)
        np.add(delta, wanted, out=wanted)
        if magnitude is not None:
            with np.errstate(all="ignore"):
                wanted *= (magnitude[start:stop] / row_norms(wanted)).reshape(-1, 1)
        return _nearest(wanted, _stored(merged, span, start * columns, shape), span.dtype)

    for start in range(0, rows, height):
        yield lambda start=start: check(start)  # type: ignore[misc]


def _stored(handle: int, span: Span, first: int, shape: tuple[int, ...]) -> Array:
    found = room("stored", shape, STORED[span.dtype])
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
    # of one sign, float32 lie in the order of their bits: the distance is one of bits
    distance = np.subtract(numbers.view(np.int32), kept, out=kept)
    if not distance.size:
        return True
    least, most = int(distance.min()), int(distance.max())
    if least < -_HALF or most > _HALF:
        return False
    if least > -_HALF and most < _HALF:
        return True
    ties = np.abs(distance) == _HALF
    return not bool((stored[ties] & 1).any())
