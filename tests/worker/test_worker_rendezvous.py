from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import hostlist
from pkuslurm.worker.rendezvous import own_rank, rendezvous

SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "ascend[01-02]",
    "SLURM_JOB_NODELIST": "ascend[01-04]",
    "SLURMD_NODENAME": "ascend02",
    "SLURM_JOB_ID": "36001",
}
BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
KUBERNETES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environ", "nodes", "expected"),
    [
        (SLURM, 2, (1, "ascend01", 10001, ("ascend01", "ascend02"))),
        ({**SLURM, "MASTER_PORT": "1234"}, 2, (1, "ascend01", 1234, ("ascend01", "ascend02"))),
        ({**SLURM, "PKUSLURM_MASTER": "10.0.0.9:11111", "MASTER_ADDR": "old"}, 2, (1, "10.0.0.9", 11111, None)),
        (BY_HAND, 2, (1, "10.0.0.1", 29500, ())),
        (KUBERNETES, 2, (1, "job-0", 23456, ())),
        ({**SLURM, **BY_HAND, "NODE_RANK": "0"}, 2, (0, "10.0.0.1", 29500, ())),
        ({**KUBERNETES, **SLURM}, 2, (1, "ascend01", 23456, ("ascend01", "ascend02"))),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, 4, None),
        ({**SLURM, "SLURM_STEP_NODELIST": "", "SLURM_NTASKS": "4"}, 4, (1, "ascend01", 10001, None)),
    ],
)
def test_sources_and_their_order(environ: dict[str, str], nodes: int, expected: tuple[object, ...] | None) -> None:
    if expected is None:
        with pytest.raises(PkuslurmError, match="SLURM_NTASKS=2"):
            rendezvous(environ, nodes)
        return
    found = rendezvous(environ, nodes)
    assert (found.node_rank, found.master_addr, found.master_port) == expected[:3]
    assert expected[3] is None or found.hosts == expected[3]
    assert found.nodes == nodes
    assert own_rank(environ) == found.node_rank


@pytest.mark.parametrize("environ", [{}, {"NODE_RANK": "0"}, {"SLURM_PROCID": "0"}, {"RANK": "0"}])
def test_a_single_node_needs_nothing(environ: dict[str, str]) -> None:
    found = rendezvous(environ, 1)
    assert (found.node_rank, found.nodes, found.master_addr) == (0, 1, "127.0.0.1")
    assert 1024 <= found.master_port <= 65535
    assert found.variables()["NNODES"] == "1"


@pytest.mark.parametrize(
    ("environ", "nodes", "words"),
    [
        ({}, 2, "NODE_RANK is not set"),
        ({**BY_HAND, "NODE_RANK": "2"}, 2, "NODE_RANK=2: must be a number from 0 to 1"),
        ({**BY_HAND, "NODE_RANK": "-1"}, 2, "NODE_RANK=-1"),
        ({**BY_HAND, "NODE_RANK": "²"}, 2, "NODE_RANK=²"),
        ({**BY_HAND, "MASTER_ADDR": ""}, 2, "MASTER_ADDR is not set"),
        ({**BY_HAND, "MASTER_PORT": ""}, 2, "MASTER_PORT is not set"),
        ({**BY_HAND, "MASTER_PORT": "70000"}, 2, "MASTER_PORT=70000"),
        ({"NODE_RANK": "1"}, 1, "NODE_RANK=1"),
        ({**KUBERNETES, "WORLD_SIZE": "4"}, 2, "WORLD_SIZE=4"),
        ({**KUBERNETES, "MASTER_ADDR": " "}, 2, "MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_PROCID": "3"}, 2, "SLURM_PROCID=3"),
        ({**SLURM, "SLURM_NTASKS": "8"}, 2, "SLURM_NTASKS=8"),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "ascend[01-03]"},
            2,
            r"SLURM_STEP_NODELIST=ascend\[01-03\]: 3 node",
        ),
        ({**SLURM, "SLURMD_NODENAME": "ascend01"}, 2, "SLURM_PROCID=1 on ascend01"),
        ({**SLURM, "SLURM_STEP_NODELIST": "ascend[01-"}, 2, "brackets"),
        ({**SLURM, "SLURM_JOB_ID": "x"}, 2, "SLURM_JOB_ID=x"),
        ({"SLURM_PROCID": "0"}, 2, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_misfits_name_the_variable_and_its_value(environ: dict[str, str], nodes: int, words: str) -> None:
    with pytest.raises(PkuslurmError, match=words):
        rendezvous(environ, nodes)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("a[08-11]", ["a08", "a09", "a10", "a11"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[1-2]-ib,login", ["n1-ib", "n2-ib", "login"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert hostlist.expand(text) == hosts
    if shutil.which("scontrol"):
        asked = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, check=False)
        assert asked.returncode != 0 or asked.stdout.split() == hosts


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a,",
        "a[",
        "a]",
        "a[[1]]",
        "a[3-1]",
        "a[x]",
        "a[]",
        "a b",
        "a[1-999999999]",
        "a[1-]",
        "a[1-9999]b[1-9999]",
    ],
)
def test_damaged_node_lists_are_refused(text: str) -> None:
    with pytest.raises(PkuslurmError):
        hostlist.expand(text)


names = st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True)
ranges = st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(1, 4))
words = st.tuples(names, st.lists(ranges, max_size=3), st.sampled_from(["", "-ib"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=4))
def test_node_lists_round_trip(parts: list[tuple[str, list[tuple[int, int, int]], str]]) -> None:
    texts, hosts = [], []
    for prefix, brackets, suffix in parts:
        inside, numbers = [], []
        for low, more, width in brackets:
            inside.append(f"{low:0{width}d}" + (f"-{low + more:0{width}d}" if more else ""))
            numbers += [f"{n:0{len(f'{low:0{width}d}')}d}" for n in range(low, low + more + 1)]
        texts.append(prefix + (f"[{','.join(inside)}]" if inside else "") + suffix)
        hosts += [prefix + number + suffix for number in numbers or [""]]
    assert hostlist.expand(",".join(texts)) == hosts
    assert hostlist.expand(",".join(hosts)) == hosts


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a1,[]- 0", max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        hosts = hostlist.expand(text)
    except PkuslurmError:
        return
    assert hosts and all(hosts)
    assert not set("".join(itertools.chain(*hosts))) & set("[], ")
