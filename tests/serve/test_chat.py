"""`pkuslurm chat` in the terminal and in a pipe, with a fake door."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from pkuslurm import chat
from pkuslurm.chat import Cut, Failed, Server, Talk, events, obey, pieces, talk
from pkuslurm.errors import PkuslurmError
from tests.serve.fake_door import KEY, Broken, Door, Refused, opened

REPO = Path(__file__).parents[2]
BOTH = ("base", "tuned")
ANSWER = {"base": "我是通义千问。", "tuned": "我是北大助手。"}


def answers(body: dict[str, Any]) -> Iterator[str]:
    yield from ANSWER[body["model"]]


@pytest.fixture
def door() -> Iterator[Door]:
    with opened(Door(answers)) as door:
        yield door


def server(door: Door, **fields: str) -> Server:
    return Server(door.base_url, door.key, "/state/key", **fields)


def piped(door: Door, lines: str, models: tuple[str, ...] = BOTH, **fields: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = talk(server(door, **fields), models, "greeting", io.StringIO(lines), out, err)
    return code, out.getvalue(), err.getvalue()


# ---- what is pure


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"data: a\n\ndata:b\n\n", ["a", "b"]),
        (b": comment\r\n\r\nevent: x\r\ndata: a\r\nid: 3\r\ndata: b\r\n\r\n", ["a\nb"]),
        (b"data:  two\n\n\n\ndata: last", [" two", "last"]),
        ("data: 北大\n\n".encode(), ["北大"]),
        (b"", []),
    ],
)
def test_events(raw: bytes, found: list[str]) -> None:
    assert list(events(raw.splitlines(keepends=True))) == found


def chunk(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


def test_pieces_end_with_the_answer_or_say_why_not() -> None:
    usage = '{"choices": [], "usage": {}}'
    assert list(pieces([chunk("a"), chunk("b"), usage, "[DONE]", chunk("c")])) == ["a", "b"]
    assert list(pieces([chunk("a"), '{"choices": [{"delta": {}, "finish_reason": "stop"}]}'])) == ["a"]
    for told, error, why in (
        ([chunk("a")], ConnectionError, "missing"),
        ([], ConnectionError, "missing"),
        ([chunk("a"), '{"error": {"message": "engine died"}}'], Failed, "engine died"),
        (["<html>"], Failed, "no JSON object: <html>"),
        (["[1]"], Failed, "no JSON object"),
        ([chunk("a", "length"), "[DONE]"], Cut, "length"),
    ):
        with pytest.raises(error, match=why):
            list(pieces(told))


def test_commands() -> None:
    now = Talk(BOTH, ("tuned",), said={"tuned": (("q", "a"),)})
    assert obey(now, "/base")[0].to == ("base",)
    assert obey(now, "/both")[0].to == BOTH
    assert obey(obey(now, "/base")[0], "/tuned")[0] == now
    after, words = obey(now, "/system  Be \x1b short ")
    assert after.messages("tuned", "x") == [
        {"role": "system", "content": "Be \x1b short"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "x"},
    ]
    assert words == "system message: Be \\x1b short"
    assert obey(after, "/system")[0] == now
    assert obey(now, "/clear")[0].said == {}
    assert all(f"/{name}" in str(obey(now, "/help")[1]) for name in chat.COMMANDS)
    assert obey(now, "/bases") == (now, None) == obey(now, "/")
    alone = Talk(("tuned",), ("tuned",))
    assert obey(alone, "/base") == (alone, "base: not served; there is tuned")
    assert now.after("tuned", "unanswered", "") == now


# ---- in a pipe


def test_each_line_is_a_question_and_answers_alone_are_printed(door: Door) -> None:
    code, out, err = piped(door, "你是谁\n\n/base\n//etc\n/both\nNow?")
    assert (code, out) == (0, "".join(ANSWER[model] + "\n" for model in ("tuned", "base", "base", "tuned")))
    assert "greeting" not in err and "you (" not in err
    assert [(body["model"], body["messages"][-1]["content"]) for body in door.asked] == [
        ("tuned", "你是谁"), ("base", "/etc"), ("base", "Now?"), ("tuned", "Now?"),
    ]  # fmt: skip
    assert door.asked[3]["messages"] == [
        {"role": "user", "content": "你是谁"},
        {"role": "assistant", "content": ANSWER["tuned"]},
        {"role": "user", "content": "Now?"},
    ]
    assert all(body["temperature"] == 0 and body["stream"] is True for body in door.asked)


def test_what_a_model_says_is_not_obeyed_however_it_is_cut(door: Door) -> None:
    door.script = lambda body: iter(["\x1b", "]0;title\x07 \u202e", "abc\r\n\tdef\x9b31m"])
    assert piped(door, "q\n")[1] == "\\x1b]0;title\\x07 \\u202eabc\\r\n\tdef\\x9b31m\n"


def refused(body: dict[str, Any]) -> Iterator[str]:
    raise Refused(400, "too long:\n\x1b[31m 2048 tokens")
    yield


def broken(body: dict[str, Any]) -> Iterator[str]:
    yield "half"
    raise Broken


@pytest.mark.parametrize(
    ("script", "out", "err"),
    [(refused, "", "tuned: too long:\\n\\x1b[31m 2048 tokens\n"), (broken, "half\n", "pkuslurm serve demo\n")],
)
def test_the_first_failure_ends_a_pipe(door: Door, script: Any, out: str, err: str) -> None:
    door.script = script
    code, said, told = piped(door, "one\ntwo\n", again="pkuslurm serve demo")
    assert (code, said) == (1, out) and told.endswith(err) and told.count("\n") == 1
    assert len(door.asked) == 1


def test_an_answer_cut_at_the_limit_is_no_failure(door: Door) -> None:
    door.finish = "length"
    code, _, err = piped(door, "one\ntwo\n")
    assert (code, len(door.asked), err.count("limit of length")) == (0, 2, 2)


def test_a_wrong_key_and_an_unknown_command(door: Door) -> None:
    with opened(Door(answers)) as other:
        other.key = "changed"
        code, out, err = piped(Door(answers, url=other.url, key=KEY), "one\n")
    assert (code, out) == (1, "") and "the key is refused; it is in /state/key" in err and KEY not in err
    code, out, err = piped(door, "/nope\none\n")
    assert (code, out, err) == (1, "", "/nope: no such command; /help lists them\n")


def test_a_server_that_has_ended(door: Door) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    code, out, err = piped(Door(answers, url=url), "one\ntwo\n", again="pkuslurm serve demo")
    assert (code, out) == (1, "") and f"nobody answers at {url}v1" in err and "start it: pkuslurm serve demo" in err


def test_neither_a_proxy_nor_a_redirect_nor_a_file_is_asked(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert piped(door, "q\n", ("tuned",))[0] == 0

    def moved(body: dict[str, Any]) -> Iterator[str]:
        raise Refused(302, "elsewhere")
        yield

    door.script = moved
    assert piped(door, "q\n")[2] == "tuned: elsewhere\n"
    with pytest.raises(PkuslurmError, match="base_url=file"):
        talk(Server("file:///etc/passwd", KEY), BOTH)


# ---- as a process, and on a terminal

CHAT = """
import fcntl, os, sys, termios
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this terminal's Ctrl-C is for us
from pkuslurm import chat
from pkuslurm.guard import guarded
from pkuslurm.read.endpoint import Endpoint
where = Endpoint("127.0.0.1", 1, ("base", "tuned"), "fake 1.0", "n1", None, 30.0, ())
sys.exit(guarded(lambda: chat.main(where, sys.argv[2], "demo", "/state/key", sys.argv[1])))
"""


def command(door: Door) -> list[str]:
    return [sys.executable, "-c", CHAT, door.base_url, door.key]


def test_as_a_process_with_bytes_that_are_no_text(door: Door) -> None:
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(command(door), input="你是谁\n".encode("gbk"), capture_output=True, timeout=30, env=environ)
    assert (ended.returncode, ended.stdout.decode(), ended.stderr) == (0, ANSWER["tuned"] + "\n", b"")
    assert "\ufffd" in door.asked[0]["messages"][0]["content"]


class Terminal:
    """`chat` on a terminal of its own."""

    def __init__(self, door: Door) -> None:
        main, side = pty.openpty()
        environ = os.environ | {"PYTHONPATH": str(REPO), "TERM": "xterm", "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
        self.main = main
        self.process = subprocess.Popen(
            command(door), stdin=side, stdout=side, stderr=side, env=environ, start_new_session=True
        )
        os.close(side)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def until(self, words: str, seconds: float = 10) -> str:
        """What is shown until ``words`` are."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, f"{words!r} not in {self.seen!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.main, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def interrupt(self, words: str) -> None:
        """Ctrl-C until ``words`` are shown: between its prompt and its wait for a key, Python's own reading of a line
        notices a signal only with the next key."""
        for _ in range(5):
            self.type("\x03")
            try:
                self.until(words, 2)
                return
            except AssertionError:
                continue
        raise AssertionError(f"{words!r} not in {self.seen!r}")

    def code(self) -> int:
        return self.process.wait(timeout=10)


@pytest.fixture
def on_terminal() -> Iterator[Callable[[Door], Terminal]]:
    made: list[Terminal] = []

    def start(door: Door) -> Terminal:
        made.append(Terminal(door))
        return made[-1]

    yield start
    for terminal in made:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)


def test_on_a_terminal(door: Door, on_terminal: Callable[[Door], Terminal]) -> None:
    screen = on_terminal(door)
    shown = screen.until("you (tuned)> ")
    assert "demo: base, tuned; fake 1.0; stops after 30 minutes without a question" in shown and "Ctrl-C" in shown
    # the line is edited by the character, not by the byte
    screen.type("你是谁呢\x7f\n")
    screen.until(ANSWER["tuned"])
    assert door.asked[0]["messages"][0]["content"] == "你是谁"
    screen.until("you (tuned)> ")
    screen.type("/both\n")
    screen.until("you (base+tuned)> ")
    screen.type("你是谁\n")
    assert screen.until(ANSWER["base"]).rindex("base:") < screen.until(ANSWER["tuned"]).rindex("tuned:") + 1000
    screen.until("you (base+tuned)> ")
    screen.type("half")
    screen.interrupt("(Ctrl-D or /quit ends)")
    screen.until("you (base+tuned)> ")
    screen.type("\x04")
    assert screen.code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(door: Door, on_terminal: Callable[[Door], Terminal]) -> None:
    silent = Event()

    def script(body: dict[str, Any]) -> Iterator[str]:
        if body["messages"][-1]["content"] == "silence":
            while not silent.wait(0.02):
                if screen.process.poll() is not None:
                    return
        yield "It begins"
        while not door.left:
            time.sleep(0.02)
            yield "."

    door.script = script
    screen = on_terminal(door)
    screen.until("you (tuned)> ")
    screen.type("go\n")
    screen.until("It begins...")
    screen.type("\x03")
    screen.until("(stopped; what was said is remembered)")
    screen.until("you (tuned)> ")
    for _ in range(100):
        if door.left:
            break
        time.sleep(0.02)
    assert door.left == ["tuned"]  # the connection is closed, so that the engine stops
    screen.type("silence\n")
    screen.until("silence")
    time.sleep(0.3)
    screen.type("\x03")
    screen.until("(stopped)")
    silent.set()
    door.script = refused
    screen.until("you (tuned)> ")
    screen.type("more\n")
    screen.until("too long")
    messages = door.asked[2]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].startswith("It begins..")
    # a failure is said, and the talk goes on
    screen.until("you (tuned)> ")
    screen.type("/quit\n")
    assert screen.code() == 0
