"""Numbers as PEFT computes with them on a CPU, bit for bit, by numpy alone: in float32, rounded to nearest even.

What torch does with ``B @ A`` for a rank of up to 192 is one chain for each number: product after product is added,
each time with one rounding (a fused multiply-add). Which order numpy's BLAS takes depends on the processor, so
``form_for`` tries it for each shape, against the chain computed exactly.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_THREADS = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
os.environ.update(dict.fromkeys(_THREADS, "1"))  # BLAS reads it once; here whole blocks are computed side by side
import numpy as np  # noqa: E402

for _name, _value in _THREADS.items():
    os.environ.pop(_name)
    if _value is not None:
        os.environ[_name] = _value

Array = np.ndarray[Any, Any]
STORED: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# beyond it torch's BLAS cuts the chain; and it computes odd and narrow matrices in other orders
LARGEST_RANK = 192
STEP = 16
_TILE, _EDGE, _STRIPS = 304, 8, 48
_BF16_NAN = 0x7FC0
Form = Callable[[Array, Array, Array], None]
_rooms = threading.local()


def room(name: str, shape: tuple[int, ...], kind: Any) -> Array:
    """An array of this thread's own, not cleared; the next call with ``name`` gives the same memory. New memory for
    each block would cost more than what is computed in it."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    kept = getattr(_rooms, name, None)
    if kept is None or len(kept) < size:
        kept = np.empty(size, np.uint8)
        setattr(_rooms, name, kept)
    found: Array = kept[:size].view(kind).reshape(shape)
    return found


def widen(stored: Array, dtype: str, out: Array) -> Array:
    """Numbers as they are in a file (``STORED``), as float32 in ``out``."""
    if dtype != "BF16":
        np.copyto(out, stored)
        return out
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, 16, out=bits)
    return out


def narrow(numbers: Array, dtype: str) -> Array:
    """float32 rounded to what a file holds, in a room of its own; ``numbers`` are used up."""
    if dtype == "F32":
        return numbers
    rounded = room("rounded", numbers.shape, STORED[dtype])
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(rounded, numbers, casting="same_kind")
        return rounded
    nan = np.isnan(numbers) if not sum_is_finite(numbers) else None
    bits, odd = numbers.view(np.uint32), room("odd", numbers.shape, np.uint32)
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(rounded, bits, casting="same_kind")
    if nan is not None:
        rounded[nan] = _BF16_NAN  # the addition above may carry into the sign
    return rounded


def sum_is_finite(numbers: Array) -> bool:
    """False wherever a number is not finite, and seldom else: a quick look before a slow one."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.add.reduce(numbers, axis=None)))


def has_nan(numbers: Array) -> bool:
    return not sum_is_finite(numbers) and bool(np.isnan(numbers).any())


def row_norms(numbers: Array) -> Array:
    """‖row‖₂ in float32, added up in eight lanes and then lane after lane, as torch does on x86; whole lanes only."""
    squares = np.multiply(numbers, numbers, out=room("odd", numbers.shape, np.float32))
    sums = np.add.reduce(squares.reshape(len(numbers), -1, 8), axis=1, dtype=np.float32)
    total: Array = np.zeros(len(numbers), np.float32)
    for lane in range(8):
        total += sums[:, lane]
    return np.sqrt(total)


def plain(left: Array, right: Array, out: Array) -> None:
    np.matmul(left, right, out=out)


def inner(left: Array, right: Array, out: Array) -> None:
    """``left @ right`` by tiles of its columns, each a little wider than what is kept of it, and with rows of nothing
    at its end: OpenBLAS's kernel for AVX2 takes another order at the edges and in what is left of strips of 12."""
    rows, columns = len(left), right.shape[1]
    left = np.concatenate([left, np.zeros((-rows % _STRIPS, left.shape[1]), np.float32)])
    wide = np.zeros((len(right), columns + 2 * _EDGE), np.float32)
    wide[:, _EDGE:-_EDGE] = right
    for start in range(0, columns, _TILE):
        end = min(start + _TILE, columns)
        out[:, start:end] = (left @ wide[:, start : end + 2 * _EDGE])[:rows, _EDGE:-_EDGE]


@lru_cache(maxsize=256)
def form_for(rows: int, columns: int, rank: int) -> Form | None:
    """The way of multiplying such a block that makes the chain on this processor; None if there is none."""
    if rank > LARGEST_RANK or rows % STEP or columns % STEP:
        return None
    random = np.random.default_rng(rows * columns * rank)
    left = random.standard_normal((rows, rank), dtype=np.float32)
    right = random.standard_normal((rank, columns), dtype=np.float32)
    # a fault of a kernel lies in whole strips: some columns show it, and those at both ends
    some = random.choice(columns, min(columns, max(64, 400_000 // (rows * rank))), replace=False)
    some = np.unique(np.concatenate([np.arange(STEP), np.arange(columns - STEP, columns), some]))
    wanted = chain(left, np.ascontiguousarray(right[:, some]))
    found = np.empty((rows, columns), np.float32)
    for form in (plain, inner):
        form(left, right, found)
        if np.array_equal(found[:, some].view(np.uint32), wanted.view(np.uint32)):
            return form
    return None


def chain(left: Array, right: Array) -> Array:
    """``left @ right`` with one rounding for each product that is added, in their order: exact, and slow."""
    total: Array = np.zeros((len(left), right.shape[1]), np.float32)
    for place in range(len(right)):
        total = _multiply_add(left[:, place, None], right[place], total)
    return total


def _multiply_add(one: Array, other: Array, more: Array) -> Array:
    """one * other + more, rounded once. float64 holds the product; its sum is rounded to odd, so that rounding that to
    float32 is as good as one rounding."""
    product, addend = one.astype(np.float64) * other, more.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)
