"""The merge's numbers against plain definitions of them, where they are rare: the middle of two, the largest, the
smallest, what is none; and blocks that do not come out even."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from pkuslurm.payload import arithmetic, shares, stream, stream_plan, stream_proof  # noqa: E402
from tests.payload.test_stream_falls_back import BASE, CONFIG, LORA, SETTINGS, save  # noqa: E402

# ties below and above an even number, both signs; zeros; subnormals; the largest, which round to infinity or do not
BITS = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0xBF818000, 0, 1 << 31, 1, 0x8000, 0x18000]
BITS += [0x80008000, 0x80018000, 0x007F8000, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF, 0x7F7E8000, 0x7F800000, 0xFF800000]


def rounded(bits: int) -> int:
    """To the nearest, the even one of two, by integers without an end."""
    kept, rest = divmod(bits, 1 << 16)
    return kept + (rest > 0x8000 or (rest == 0x8000 and kept & 1 == 1))


def numbers(shape: tuple[int, ...]) -> Any:
    """As a block of a model has them, with the rare ones strewn in."""
    random = np.random.default_rng(math.prod(shape))
    found = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    places = random.permutation(found.size)[: len(BITS)]
    found.reshape(-1)[places] = np.array(BITS[: len(places)], np.uint32).view(np.float32)
    return found


@pytest.mark.parametrize("shape", [(16, 32), (48, 160), (3, 7), (1, 2), (257,), (0,), (0, 4)])
def test_rounding_in_blocks_of_any_shape(shape: tuple[int, ...]) -> None:
    given = numbers(shape)
    wanted = [rounded(int(bits)) for bits in given.view(np.uint32).reshape(-1)]
    assert arithmetic.narrow(given.copy(), "BF16").reshape(-1).tolist() == wanted
    if len(shape) == 2 and shape[0] and shape[1] % 2 == 0:
        words = arithmetic.narrow_pairs(arithmetic.even_and_odd(given))
        assert words.view(np.uint16).reshape(-1).tolist() == wanted


def test_many_ties_and_nothing_else() -> None:
    bits = (np.arange(64 * 64, dtype=np.uint32).reshape(64, 64) << 16) + 0x3F808000 - (1 << 27)
    wanted = [rounded(int(one)) for one in bits.reshape(-1)]
    words = arithmetic.narrow_pairs(arithmetic.even_and_odd(bits.view(np.float32)))
    assert words.view(np.uint16).reshape(-1).tolist() == wanted


def test_words_of_the_file_are_added_each_to_its_number() -> None:
    given, stored = numbers((16, 64)), (numbers((16, 64)).view(np.uint32) >> 16).astype(np.uint16)
    both = arithmetic.even_and_odd(given)
    with np.errstate(all="ignore"):
        arithmetic.add_pairs(both, stored)
        wanted = given + (stored.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(both, arithmetic.even_and_odd(wanted), equal_nan=True)


@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001])
def test_what_is_no_number_is_seen(place: int, bits: int) -> None:
    given = numbers((16, 33))
    assert not arithmetic.has_nan(given)
    given.view(np.uint32).reshape(-1)[place] = bits
    assert arithmetic.has_nan(given)


@pytest.mark.parametrize("scale", [2.0, 0.125, 1.0, 2.0**100, 2.0**-100, 2.0**-120])
@pytest.mark.parametrize("size", [1e-3, 1e-19, 1e-22, 1e18])
def test_a_scale_goes_into_a_factor_only_where_no_bit_changes(scale: float, size: float) -> None:
    random = np.random.default_rng(1)
    left, right = ((random.standard_normal(shape) * size).astype(np.float32) for shape in ((16, 8), (8, 32)))
    left[0], right[:, 5] = 0, 0
    with np.errstate(all="ignore"):
        wanted = arithmetic.chain(left, right) * np.float32(scale)
        found = arithmetic.scaled(left, right, scale)
        assert (found is not None) == (size == 1e-3 and scale != 2.0**-120 and scale != 2.0**-100)
        if found is not None:
            assert np.array_equal(arithmetic.chain(found, right).view(np.uint32), wanted.view(np.uint32))


def test_other_scales_stay_outside() -> None:
    left, right = np.ones((16, 8), np.float32), np.ones((8, 16), np.float32)
    assert arithmetic.scaled(left, right, 3.0) is None
    left[3, 3] = np.inf
    assert arithmetic.scaled(left, right, 2.0) is None
    left[3, 3] = np.nan
    assert arithmetic.scaled(left, right, 2.0) is None


def test_the_chain_rounds_once_for_each_product() -> None:
    """Against whole numbers without an end; factors of few bits meet the middle between two float32 all the time."""
    random = np.random.default_rng(2)
    left, right = (random.integers(-(1 << 13), 1 << 13, shape).astype(np.float32) for shape in ((9, 6), (6, 40)))
    found = arithmetic.chain(left, right)
    for row in range(9):
        for column in range(40):
            total = 0
            for one, other in zip(left[row].tolist(), right[:, column].tolist(), strict=True):
                total = nearest(total + int(one) * int(other))
            assert int(found[row, column]) == total


def test_the_chain_is_not_rounded_twice() -> None:
    """A sum just below the middle between two float32, which float64 rounds to that middle; and one of few bits."""
    one, above = np.float32(1 + 2.0**-23), 2.0**-12 * (1 + 2.0**-15)
    left = np.array([[1, 2.0**-12 * (1 - 2.0**-15)], [0, 2.0**-126 * (1 + 2.0**-22)]], np.float32)
    found = arithmetic.chain(left, np.array([[one], [above]], np.float32))
    assert found[0, 0] == one
    assert found[1, 0] == np.float32(float(left[1, 1]) * float(np.float32(above)))


def nearest(whole: int) -> int:
    """The float32 next to it, the even one of two."""
    shift = max(0, abs(whole).bit_length() - 24)
    kept, rest = divmod(abs(whole), 1 << shift)
    kept += 2 * rest > 1 << shift or (2 * rest == 1 << shift and kept & 1)
    return int(math.copysign(kept << shift, whole))


def test_the_proof_judges_every_number() -> None:
    """What rounding gives is right; one off in any place is not, the odd one of two neither."""
    given = numbers((16, 64))
    given[np.abs(given) < 1e-30] = 0.5
    given.view(np.uint32)[2, 2:4] = 0x3F808000, 0x3F818000
    nothing = np.zeros((16, 32), np.int32)
    right = np.array([rounded(int(bits)) for bits in given.view(np.uint32).reshape(-1)], np.uint16).reshape(16, 64)

    def judged(stored: Any) -> list[bool]:
        both = np.stack([given[:, 1::2], given[:, ::2]])
        return [
            stream_proof._nearest_words(both, nothing, stored.view(np.int32)),
            stream_proof._nearest(given.copy(), stored, "BF16"),
        ]

    assert judged(right) == [True, True]
    for place in [(0, 0), (2, 2), (2, 3), (7, 31), (15, 62), (15, 63)]:
        for step in (1, -1, 1 << 15):
            wrong = right.copy()
            wrong[place] += np.array(step).astype(np.uint16)
            assert judged(wrong) == [False, False], (place, step)


def test_a_base_that_holds_no_number_is_left_to_the_export(tmp_path: Path) -> None:
    folders = tmp_path / "base", tmp_path / "adapter"
    for folder, name, value in zip(folders, ("config.json", "adapter_config.json"), (CONFIG, SETTINGS), strict=True):
        folder.mkdir()
        (folder / name).write_text(json.dumps(value))
    save(folders[0] / "model.safetensors", BASE, "BF16")
    save(folders[1] / "adapter_model.safetensors", LORA)
    planned = stream_plan.plan({"template": "chatml", "finetuning_type": "lora"}, *folders)
    whole = bytearray((folders[0] / "model.safetensors").read_bytes())
    place = planned.files[0].data + 2 * (5 * 32 + 7)
    whole[place : place + 2] = 0x7FC0.to_bytes(2, "little")
    (folders[0] / "model.safetensors").write_bytes(whole)
    (tmp_path / "merged").mkdir()
    with pytest.raises((stream_plan.NotStreamable, shares.Failed), match="no number"):
        stream.stream(planned, tmp_path / "merged")


def test_what_is_done_beside_the_shares_is_done_and_may_fail(tmp_path: Path) -> None:
    done = tmp_path / "done"
    shares.in_shares(lambda: [lambda: None], done.touch)
    assert done.exists()

    def full() -> None:
        raise OSError(28, "No space left on device", "file")

    with pytest.raises(OSError, match="No space left"):
        shares.in_shares(lambda: [(tmp_path / "share").touch], full)
