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
_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_UPPER = np.uint32(0xFFFF0000)
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
    nan = np.isnan(numbers) if has_nan(numbers) else None
    bits = _round(numbers)
    np.right_shift(bits, 16, out=bits)
    np.copyto(rounded, bits, casting="same_kind")
    if nan is not None:
        rounded[nan] = _BF16_NAN  # what is added to round may carry into the sign
    return rounded


def _round(numbers: Array) -> Array:
    """The bits of ``numbers``, in place, so that their upper halves are the nearest bfloat16, the even one of two."""
    parts = in_parts(numbers.view(np.uint32))
    np.add(parts, 0x8000, out=parts)
    if parts.size:
        # a number from the middle of two, one in 65536, has a lower half of 0 now
        for place in np.flatnonzero(np.minimum.reduce(parts.view(np.uint16), axis=1) == 0):
            part = parts[place]
            part[part & 0xFFFF == 0] &= 0xFFFE0000
    return parts.reshape(numbers.shape)


def in_parts(numbers: Array) -> Array:
    """In a few long rows: to look for what is rare row by row is as quick as over the whole, and tells where it is."""
    return numbers.reshape(1 if numbers.size % 16 else 16, -1)


def even_and_odd(matrix: Array) -> Array:
    """Its columns 0, 2, 4 … and its columns 1, 3, 5 …"""
    return np.stack([matrix[:, ::2], matrix[:, 1::2]])


def add_pairs(numbers: Array, stored: Array) -> None:
    """Add bfloat16 as they are in a file to ``numbers``, which are ``even_and_odd``. In a word of the file the even one
    is the lower half; numpy is quick with words that follow each other, slow with halves."""
    words = stored.view(np.uint32)
    wide, (even, odd) = room("words", words.shape, np.uint32), numbers
    added = wide.view(np.float32)
    np.left_shift(words, 16, out=wide)
    np.add(even, added, out=even)
    np.bitwise_and(words, _UPPER, out=wide)
    np.add(odd, added, out=odd)


def narrow_pairs(numbers: Array) -> Array:
    """As ``narrow`` to bfloat16, of what is ``even_and_odd`` and no NaN: words as a file has them."""
    even, odd = _round(numbers)
    words = room("words", even.shape, np.uint32)
    np.right_shift(even, 16, out=words)
    np.bitwise_and(odd, _UPPER, out=odd)
    np.bitwise_or(words, odd, out=words)
    return words


def scaled(left: Array, right: Array, scale: float) -> Array | None:
    """``left * scale``, if its product with ``right`` is to the bit ``(left @ right) * scale``; else None.

    For a power of two it is, as long as nothing is rounded because it is too small, or too large: everything that is
    added up is a multiple of the last bits of the smallest factors, and that must be one that float32 has."""
    fraction, power = math.frexp(scale)
    ranges = _exponents(left), _exponents(right)
    if fraction != 0.5 or None in ranges:
        return None
    power -= 1
    (small, large), (other, most) = ranges  # type: ignore[misc]
    last = min(small + other - 48, small - 24)
    first = max(large + most + 9, large)  # a sum of at most LARGEST_RANK
    if last + min(power, 0) < -149 or first + max(power, 0) > 127:
        return None
    return left * np.float32(scale)


def _exponents(numbers: Array) -> tuple[int, int] | None:
    """Of the smallest (but for 0) and the largest, as frexp has them; None if one is not finite."""
    sizes = np.abs(numbers[numbers != 0])
    if not sizes.size:
        return 0, 0
    most = float(sizes.max())
    return (math.frexp(sizes.min())[1], math.frexp(most)[1]) if math.isfinite(most) else None


def has_nan(numbers: Array) -> bool:
    return bool(numbers.size) and math.isnan(np.maximum.reduce(numbers, axis=None))


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
    ones, others = left.astype(np.float64), right.astype(np.float64)
    total: Array = np.zeros((len(left), right.shape[1]), np.float32)
    for start in range(0, len(left), 8):  # more at once do not stay in the processor's cache
        rows = slice(start, start + 8)
        for place in range(len(right)):
            total[rows] = _add(ones[rows, place, None] * others[place], total[rows].astype(np.float64))
    return total


def _add(product: Array, addend: Array) -> Array:
    """Their sum, rounded to float32 once. float64 holds a product of two float32, and of the sum enough, unless it is
    the middle between two float32 by its own rounding, or of fewer bits: those are added up slowly."""
    total = product + addend
    rounded = total.astype(np.float32)
    doubtful = (total.view(np.int64) & 0x1FFF_FFFF == 0x1000_0000) | (np.abs(total) < _SMALLEST)
    if doubtful.any():
        rounded[doubtful] = _add_slowly(product[doubtful], addend[doubtful])
    return rounded


def _add_slowly(product: Array, addend: Array) -> Array:
    """The sum is rounded to odd in float64, so that rounding that to float32 is as good as one rounding."""
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)
