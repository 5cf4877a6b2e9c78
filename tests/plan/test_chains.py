"""Which points go to Slurm together, and what they wait for."""

from __future__ import annotations

import pytest

from pkuslurm.plan.chains import Chain, after_shares, chains

FULL = ("train", "merge", "infer")


def test_points_that_ask_for_the_same_are_one_chain_in_their_order() -> None:
    members = {"0": (FULL, "1 node"), "1": (FULL, "2 nodes"), "2": (FULL, "1 node"), "3": (("train",), "1 node")}
    assert chains(members, 1000) == [
        Chain(("0", "2"), FULL),
        Chain(("1",), FULL),
        Chain(("3",), ("train",)),
    ]


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(5, 2, [2, 2, 1]), (4, 4, [4]), (3, 1, [1, 1, 1]), (2500, 1001, [1001, 1001, 498])]
)
def test_a_chain_is_split_at_the_clusters_limit(count: int, most: int, sizes: list[int]) -> None:
    found = chains({str(n): (FULL, "") for n in range(count)}, most)
    assert [len(chain.members) for chain in found] == sizes
    assert [name for chain in found for name in chain.members] == [str(n) for n in range(count)]


def test_no_points_no_chains() -> None:
    assert chains({}, 1000) == []


@pytest.mark.parametrize(
    ("needs", "expression"),
    [
        ([], ""),
        ([None, None], ""),
        (["7_0"], "afterok:7_0"),
        (["7_0"] * 3, "afterok:7_0"),
        (["7_2"] * 3, "afterok:7_2"),
        (["7"] * 2, "afterok:7"),  # without arrays
        (["7_0", "7_1", "7_2"], "aftercorr:7"),
        (["7_1", "7_0"], "afterany:7_1:7_0"),
        (["7_1", "7_2"], "afterany:7_1:7_2"),  # the second half of a chain
        (["7_0", "7_0", "7_1"], "afterany:7_0:7_1"),
        (["7_0", "8_1"], "afterany:7_0:8_1"),
        (["7_0", None], "afterany:7_0"),  # else the one whose share is there would be lost with the other's
        ([None, "7_1"], "afterany:7_1"),
        ([f"7_{n // 2}" for n in range(24)], "afterany:7"),
        ([f"{7 + n % 2}_{n}" for n in range(12)], "afterany:7:8"),
    ],
)
def test_what_points_wait_for(needs: list[str | None], expression: str) -> None:
    assert after_shares(needs) == expression


@pytest.mark.parametrize(("count", "most", "sizes"), [(1, 1, [1]), (5, 3, [3, 2]), (4, 2, [2, 2])])
def test_pieces_lose_nobody(count: int, most: int, sizes: list[int]) -> None:
    chain = Chain(tuple(map(str, range(count))), FULL)
    pieces = chain.pieces(most)
    assert [len(piece.members) for piece in pieces] == sizes and {piece.kinds for piece in pieces} == {FULL}
    assert tuple(name for piece in pieces for name in piece.members) == chain.members
