"""Where the ranks meet, as the first node finds it."""

from __future__ import annotations

import socket

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import network
from pkuslurm.worker.head import head


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = network.free_port(5)
    with socket.socket() as listener:
        listener.bind(("", first))
        listener.listen()
        second = network.free_port(first - network.FIRST_PORT)
    assert second != first and network.FIRST_PORT <= second < network.FIRST_PORT + network.PORTS


def test_the_interface_of_an_address() -> None:
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("203.0.113.7") is None


def test_the_address_towards_a_host() -> None:
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(PkuslurmError, match="no-such-host"):
        network.address_towards("no-such-host.invalid")


def test_the_head_of_a_job() -> None:
    words = head({"SLURM_JOB_NODELIST": "a01", "SLURMD_NODENAME": "a01", "SLURM_JOB_ID": "77"})
    address, _, port = words.partition(":")
    assert address == "127.0.0.1" and 10000 <= int(port) < 28000
    again = head({"SLURM_JOB_NODELIST": "a01", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})
    assert again != words, "a requeued attempt looks from another port on"


def test_it_must_run_on_the_first_node() -> None:
    with pytest.raises(PkuslurmError, match=r"first node of a\[01-02\] is a01"):
        head({"SLURM_JOB_NODELIST": "a[01-02]", "SLURMD_NODENAME": "a02"})
    with pytest.raises(PkuslurmError, match="leads to this very node"):
        head({"SLURM_JOB_NODELIST": "a01,localhost", "SLURMD_NODENAME": "a01"})
