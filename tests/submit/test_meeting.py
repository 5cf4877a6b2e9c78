"""How nodes come together through a folder: who is host, who may join, and what a dead host leaves behind."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import living
from pkuslurm.submit import gathering, meeting, meeting_files
from pkuslurm.submit.gathering import Gathering
from pkuslurm.submit.meeting import Guest, Host, Wish
from pkuslurm.worker import beats

WISH = Wish(2, None, ("nodes=2",), "10.0.0.1", "1", "from_yaml=/a.yaml")
Ended = Host | Guest | BaseException


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenths instead of seconds."""
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(beats, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(beats, "ABSENT_SECONDS", 0.3)
    monkeypatch.setattr(meeting, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(gathering, "POLL_SECONDS", 0.02)
    for state, seconds in {"waiting": 0.8, "running": 1.5, "ended": 0.8}.items():
        monkeypatch.setitem(meeting.PATIENCE, state, seconds)


@pytest.fixture
def folder(weird: Path) -> Iterator[Path]:
    yield meeting_files.folder(weird)
    for entry in threading.enumerate():
        assert not entry.name.startswith("beat"), "somebody still writes"


class Nodes:
    """Each node a thread; ``ended``: what it came to, in the order in which they were started."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "meeting.json"
        self.threads: list[threading.Thread] = []
        self.ended: list[Ended | None] = []
        self.said: list[list[str]] = []
        self.interrupted = [False] * 99

    def start(self, wish: Wish = WISH, timeout: float = 10.0) -> None:
        place = len(self.threads)
        self.ended.append(None)
        self.said.append([])

        def stopped() -> bool:
            return self.interrupted[place]

        def come() -> None:
            try:
                gathering = Gathering(self.file, wish, timeout, self.said[place].append, stopped, "type this")
                self.ended[place] = gathering.come_together()
            except BaseException as error:
                self.ended[place] = error

        self.threads.append(threading.Thread(target=come))
        self.threads[-1].start()

    def wait(self, *places: int) -> list[Ended]:
        found = []
        for place in places or range(len(self.threads)):
            self.threads[place].join(20)
            party = self.ended[place]
            assert party is not None, "it still waits"
            found.append(party)
        return found

    def close(self) -> None:
        """The hosts say farewell as soon as the guests have gone."""
        for party in self.ended:
            if isinstance(party, Guest):
                party.post.close()
        for party in self.ended:
            if isinstance(party, Host):
                party.end(0)


def until_there(path: Path) -> None:
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dead(file: Path, state: str = "waiting", **more: object) -> None:
    """What a host that was killed has left."""
    value = WISH.said() | {"nonce": "dead", "beat": 7, "state": state, "members": {}, "refused": {}, "host": "gone"}
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(json.dumps(value | more), encoding="utf-8")
    file.with_name("meeting.dead.abc.json").write_text('{"nonce": "abc", "beat": 1}', encoding="utf-8")


def test_at_the_same_instant_exactly_one_is_host(folder: Path) -> None:
    nodes = Nodes(folder)
    for _ in range(4):
        nodes.start(replace(WISH, nodes=4))
    parties = nodes.wait()
    assert sorted(type(party).__name__ for party in parties) == ["Guest", "Guest", "Guest", "Host"], parties
    assert sorted(party.rank for party in parties if isinstance(party, Guest)) == [1, 2, 3]
    assert nodes.file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    nodes.close()
    assert not folder.exists(), "nothing is left"


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_a_dead_hosts_meeting_is_never_joined_and_replaced_by_one(folder: Path, state: str) -> None:
    nodes = Nodes(folder)
    dead(nodes.file, state, nodes=7, settings=["other"])  # what it wanted is no matter any more
    for _ in range(3):
        nodes.start(replace(WISH, nodes=3))
    parties = nodes.wait()
    assert sorted(type(party).__name__ for party in parties) == ["Guest", "Guest", "Host"], parties
    assert all(party.nonce != "dead" for party in parties if isinstance(party, Guest | Host))
    nodes.close()
    assert not folder.exists()


def test_a_torn_file_is_replaced(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.file.write_text('{"nonce": "de', encoding="utf-8")
    nodes.start()
    nodes.start()
    assert {type(party) for party in nodes.wait()} == {Host, Guest}
    nodes.close()


def test_a_dead_guest_is_not_taken_for_one(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.start(timeout=1.5)
    until_there(nodes.file)
    host = json.loads(nodes.file.read_text(encoding="utf-8"))["nonce"]
    nodes.file.with_name(f"meeting.{host}.abc.json").write_text('{"nonce": "abc", "beat": 1, "rank": null}')
    [party] = nodes.wait()
    assert isinstance(party, PkuslurmError) and "node 1 of 2 did not come" in str(party)
    assert "type this" in str(party) and str(folder) in str(party)
    assert not folder.exists()


def test_ranks_that_are_given(folder: Path) -> None:
    nodes = Nodes(folder)
    for rank in (2, 1, 1, 0):
        nodes.start(replace(WISH, nodes=3, rank=rank))
    parties = nodes.wait()
    assert isinstance(parties[3], Host)
    guests = [party for party in parties[:3] if isinstance(party, Guest)]
    assert sorted(guest.rank for guest in guests) == [1, 2]
    [other] = [str(party) for party in parties[:3] if not isinstance(party, Guest)]
    assert "node 1 of 3 has come already" in other or "have come together already" in other
    nodes.close()


def test_without_node_0_the_others_say_so(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.start(replace(WISH, rank=1), timeout=0.5)
    [party] = nodes.wait()
    assert isinstance(party, PkuslurmError) and "node 0 of 2 did not come" in str(party)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(WISH, nodes=3), "nodes=3: {host}, which waits in {folder}, was started with nodes=2"),
        (replace(WISH, settings=("nodes=2", "train.x=1")), "train.x=1 here, but nothing of it on {host}"),
        (replace(WISH, settings=()), "nothing of it here, but nodes=2 on {host}"),
        (
            replace(WISH, settings=("nodes=2", "train.x=1"), source="from_yaml=/b.yaml"),
            "from_yaml=/b.yaml: train.x=1 here, but nothing of it on {host} (from_yaml=/a.yaml), which waits",
        ),
        (replace(WISH, version="2"), "pkuslurm 2 here, 1 on {host}"),
    ],
)
def test_who_wants_something_else_is_told_and_the_host_waits_on(folder: Path, other: Wish, words: str) -> None:
    nodes = Nodes(folder)
    nodes.start()
    until_there(nodes.file)
    nodes.start(other)
    [party] = nodes.wait(1)
    expected = words.format(host=WISH.said()["host"], folder=folder)
    assert isinstance(party, PkuslurmError) and expected in str(party), party
    nodes.start()
    assert {type(party) for party in nodes.wait(0, 2)} == {Host, Guest}
    nodes.close()


def test_a_third_one_is_refused_and_may_come_when_they_have_ended(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.start()
    nodes.start()
    nodes.wait(0, 1)
    nodes.start()
    [party] = nodes.wait(2)
    assert isinstance(party, PkuslurmError) and "that many have come together already" in str(party)
    nodes.close()
    nodes.start(timeout=0.3)
    [party] = nodes.wait(3)
    assert isinstance(party, PkuslurmError) and "node 1 of 2 did not come" in str(party)


@pytest.mark.parametrize("first", [0, 1])
def test_who_is_interrupted_leaves_nothing(folder: Path, first: int) -> None:
    nodes = Nodes(folder)
    nodes.start(replace(WISH, nodes=3, rank=0))
    until_there(nodes.file)
    nodes.start(replace(WISH, nodes=3))
    deadline = time.monotonic() + 5
    while not any("node 1 is here" in line for line in nodes.said[0]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for place in (first, 1 - first):
        nodes.interrupted[place] = True
        assert isinstance(nodes.wait(place)[0], KeyboardInterrupt)
    assert not folder.exists()


def test_a_suspended_host_that_was_replaced_becomes_a_guest(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.start()
    until_there(nodes.file)
    aside = nodes.file.with_name("aside")
    other = Host(aside, WISH)
    other.post.begin()
    other.post.path = other.file = nodes.file
    other.post.path.unlink()
    aside.rename(nodes.file)  # in its place, while it was suspended
    deadline = time.monotonic() + 10
    while not other.look():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.post.say(state="running")
    [party] = nodes.wait()
    assert isinstance(party, Guest) and party.nonce == other.nonce
    nodes.close()
    other.end(0)


def test_what_another_has_put_in_the_folders_place_is_refused(weird: Path) -> None:
    own = meeting_files.folder(weird)
    own.rmdir()
    own.symlink_to(weird)
    with pytest.raises(PkuslurmError, match="is not a folder of yours"):
        meeting_files.folder(weird)


def test_another_users_words_are_not_read(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weird / "x.json"
    file.write_text("{}", encoding="utf-8")
    assert beats.read(file) == {}
    monkeypatch.setattr(beats.os, "geteuid", lambda: file.stat().st_uid + 1)
    assert beats.read(file) is None


def test_one_alone_is_refused_by_whoever_is_there_and_exactly_one_follows_the_dead(folder: Path) -> None:
    nodes = Nodes(folder)
    nodes.start()
    until_there(nodes.file)
    with pytest.raises(PkuslurmError, match="is at it already"):
        gathering.alone(nodes.file, lambda: False)
    nodes.interrupted[0] = True
    nodes.wait()
    folder.mkdir(mode=0o700)
    dead(nodes.file, "running")
    found: list[object] = []

    def come() -> None:
        try:
            found.append(gathering.alone(nodes.file, lambda: False))
        except PkuslurmError as error:
            found.append(error)

    threads = [threading.Thread(target=come) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(one).__name__ for one in found) == ["Host", "PkuslurmError", "PkuslurmError"], found
    for one in found:
        if isinstance(one, Host):
            one.close()


@pytest.mark.parametrize("rank", [None, 1])
def test_who_comes_as_a_waiting_host_leaves_goes_on(folder: Path, rank: int | None) -> None:
    """The folder is gone by the time at which its request is put there."""
    nodes = Nodes(folder)
    nodes.start()
    until_there(nodes.file)
    guest = Gathering(nodes.file, replace(WISH, rank=rank), 10, print, lambda: False, "")
    there = json.loads(nodes.file.read_text(encoding="utf-8"))
    nodes.interrupted[0] = True
    nodes.wait()
    assert not folder.exists()
    assert guest._ask(there) is None and folder.is_dir()
    folder.rmdir()
    if rank is None:
        assert guest._try_to_host(None) is None and folder.is_dir()


def test_on_a_full_disk_who_lives_is_still_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(folder / "meeting.json", WISH)
    host.post.begin()
    watch = beats.Watch(host.file)
    watch.look()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(beats.os, "replace", full)
    host.post.say(run="/a/run")
    deadline = time.monotonic() + 5
    while watch.moves < 3:
        assert time.monotonic() < deadline, "it is silent"
        time.sleep(0.02)
        watch.look()
    assert (watch.value or {})["run"] == "/a/run"
    host.close()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOENT])
def test_a_hiccup_of_the_file_server_ends_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    host = Host(folder / "meeting.json", WISH)
    host.post.begin()
    watch = beats.Watch(host.file)
    watch.look()

    class Hidden(type(host.file)):  # type: ignore[misc]
        def lstat(self) -> os.stat_result:
            raise OSError(number, os.strerror(number))

        def __fspath__(self) -> str:
            return f"{host.file}-hidden"

    watch.path = Hidden(host.file)
    time.sleep(0.05)
    watch.look()
    assert watch.there and watch.value is not None
    time.sleep(0.4)
    watch.look()
    assert watch.there is (number != errno.ENOENT)
    host.close()


def test_what_is_long_dead_is_not_listened_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead(folder / "meeting.json")
    os.utime(folder / "meeting.json", (1, 1))
    monkeypatch.setattr(beats.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert beats.alive(folder / "meeting.json", "dead", 30) is False
    document = {"launcher": {"host": "gone", "meeting": str(folder / "meeting.json"), "nonce": "dead"}}
    launched = living.launcher(document, "here")
    assert living.worker({"host": "gone", "pid": 1, "pid_start": 1}, document, launched, "here") is False
    assert living.worker({"host": "elsewhere", "pid": 1, "pid_start": 1}, document, launched, "here") is None
    for file in list(folder.iterdir()):
        file.unlink()
    os.utime(folder, (1, 1))
    assert beats.alive(folder / "meeting.json", "dead", 30) is False, "nor what is no longer there"


def test_the_place_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(PkuslurmError, match=f"^run_root={tmp_path}/x: "):
        meeting_files.folder(tmp_path / "x", "run_root")
