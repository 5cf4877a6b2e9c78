"""Talks from the terminal to a run that is served: a client of its endpoint, of the standard library alone."""

from __future__ import annotations

import http.client
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, TextIO

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read.endpoint import Endpoint
from pkuslurm.read.text import between, duration, safe

# Of silence: on a busy CPU the first word takes minutes, a connection that hangs must end at some time.
SILENCE_SECONDS = 600.0
LIST_SECONDS = 20.0
COMMANDS = {
    "tuned": "talk to the tuned model",
    "base": "talk to the base model",
    "both": "ask base and tuned, one after the other",
    "system": "/system TEXT: the system message from now on; without TEXT none",
    "clear": "begin a new conversation",
    "help": "this list; a question that begins with / is typed with //",
    "quit": "end (Ctrl-D, too)",
}


class Failed(Exception):
    """An answer failed: why, and what to do, in one line."""


class Cut(Failed):
    """An answer that is as long as the server allows: no failure."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint; in messages: where its key lies, and what starts it again."""

    base_url: str
    key: str
    key_file: str = "the file that `pkuslurm serve` shows"
    again: str = "pkuslurm serve RUN"


@dataclass(frozen=True)
class Talk:
    """Whom one talks to, and what has been said: each model remembers its own answers."""

    models: tuple[str, ...]
    to: tuple[str, ...]
    system: str = ""
    said: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def messages(self, model: str, question: str) -> list[dict[str, str]]:
        turns = [*self.said.get(model, ()), (question, "")]
        spoken = [("system", self.system)]
        spoken += [pair for asked, got in turns for pair in (("user", asked), ("assistant", got))]
        return [{"role": role, "content": text} for role, text in spoken if text]

    def after(self, model: str, question: str, answer: str) -> Talk:
        """A question of which nothing came is as if it had not been asked: roles must alternate."""
        turns = (*self.said.get(model, ()), (question, answer))
        return replace(self, said={**self.said, model: turns}) if answer else self


def main(endpoint: Endpoint, key: str, run: str, key_file: str, base_url: str | None = None) -> int:
    """Talk to ``run``, served at ``endpoint``; ``base_url``: by another way, as a tunnel."""
    for stream, mend in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # bytes of another encoding are no reason to end
            stream.reconfigure(errors=mend)
    server = Server(base_url or endpoint.base_url, key, key_file, command("serve", run))
    left = between(datetime.now().astimezone().isoformat(), endpoint.ends) if endpoint.ends else None
    facts = [
        f"{run}: {', '.join(endpoint.models)}",
        endpoint.engine,
        f"the job's time ends in {duration(left)}" if left is not None else "",
        f"stops after {endpoint.idle_minutes:g} minutes without a question" if endpoint.idle_minutes else "",
    ]
    return talk(server, endpoint.models, "; ".join(fact for fact in facts if fact))


def talk(
    server: Server,
    models: Sequence[str],
    greeting: str = "",
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Ask what is typed until the end of ``stdin``. Only a terminal sees prompts, and ``stdout`` gets answers only.

    From a pipe each line is a question, and the first answer that fails ends it with 1: the next would be asked
    without it. A person reads why, and goes on.
    """
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    if not server.base_url.startswith(("http://", "https://")):
        raise PkuslurmError(f"base_url={server.base_url}: not a URL; it begins with http:// or https://")
    person = stdin.isatty()
    now = Talk(tuple(models), ("tuned",) if "tuned" in models else tuple(models[:1]))
    tell = partial(print, file=stderr, flush=True)
    if person:
        tell(safe(greeting) + ("\n" if greeting else "") + "/help: the commands; Ctrl-C stops an answer, Ctrl-D ends")
    read = _prompted(stdin, stdout, stderr) if person else _line(stdin)
    while True:
        try:
            line = read(f"you ({'+'.join(now.to)})> ").strip()
        except EOFError:
            if person:
                tell()
            return 0
        except KeyboardInterrupt:
            if not person:
                raise
            tell("\n(Ctrl-D or /quit ends)")
            continue
        if line in ("/quit", "/exit"):
            return 0
        try:
            if line.startswith("/") and not line.startswith("//"):
                now, failed = _obeyed(now, line, tell)
            else:
                now, failed = _asked(server, now, line.removeprefix("/"), stdout, tell, person)
        except KeyboardInterrupt:  # a second Ctrl-C, right behind the one that stopped the answer
            if not person:
                raise
            failed = False
        if failed and not person:
            return 1


def obey(talk: Talk, line: str) -> tuple[Talk, str | None]:
    """``talk`` after the command ``line``, and what to say of it; None: there is no such command."""
    name, _, rest = line[1:].partition(" ")
    if name in ("tuned", "base", "both"):
        to = talk.models if name == "both" else (name,)
        if set(to) - set(talk.models):
            return talk, f"{name}: not served; there is {', '.join(talk.models)}"
        return replace(talk, to=to), f"you talk to {' and '.join(to)}"
    if name == "system":
        system = rest.strip()
        return replace(talk, system=system), f"system message: {safe(system)}" if system else "no system message"
    if name == "clear":
        return replace(talk, said={}), "a new conversation"
    if name == "help":
        return talk, "\n".join(f"  /{name:<8}{what}" for name, what in COMMANDS.items())
    return talk, None


def _obeyed(now: Talk, line: str, tell: Callable[[str], None]) -> tuple[Talk, bool]:
    after, words = obey(now, line)
    tell(f"{safe(line.split()[0])}: no such command; /help lists them" if words is None else words)
    return after, words is None


def _asked(
    server: Server, now: Talk, question: str, out: TextIO, tell: Callable[[str], None], person: bool
) -> tuple[Talk, bool]:
    """``now`` after ``question``, and whether an answer failed. Ctrl-C stops one answer; the next is still asked."""
    question = question.encode("utf-8", "replace").decode("utf-8")  # lone surrogates are no JSON
    failed = False
    for model in now.to if question else ():
        if len(now.to) > 1:
            tell(f"{model}:")
        parts: list[str] = []
        remark = ""
        try:
            with closing(answer(server, model, now.messages(model, question))) as pieces:
                for piece in pieces:
                    parts.append(piece)
                    # by the character, so that no cut between two pieces hides anything
                    out.write(safe(piece, "\n\t"))
                    out.flush()
        except KeyboardInterrupt:
            if not person:
                raise
            remark = "(stopped; what was said is remembered)" if parts else "(stopped)"
        except Failed as error:
            remark = f"{model}: {safe(error)}"
            failed = failed or not isinstance(error, Cut)
        said = "".join(parts)
        if said and not said.endswith("\n"):
            print(file=out, flush=True)
        if remark or not said:
            tell(remark or f"({model} said nothing)")
        now = now.after(model, question, said)
    return now, failed


def models(server: Server) -> tuple[str, ...]:
    """The names of the models that ``server`` has. Raises PkuslurmError."""
    try:
        with _opened(server, "/models", None, LIST_SECONDS) as response:
            listed = json.loads(response.read(1 << 20))["data"]
            return tuple(str(one["id"]) for one in listed)
    except Failed as error:
        raise PkuslurmError(str(error)) from None
    except (ValueError, KeyError, TypeError):
        raise PkuslurmError(f"{server.base_url}: this is no OpenAI-compatible endpoint; its URL ends in /v1") from None


def answer(server: Server, model: str, messages: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
    """The answer's pieces as they come; closing the iterator closes the connection, which stops the engine."""
    body = {"model": model, "messages": list(messages), "temperature": 0, "stream": True}
    with _opened(server, "/chat/completions", body, SILENCE_SECONDS) as response:
        yield from pieces(events(response))


@contextmanager
def _opened(server: Server, path: str, body: object, seconds: float) -> Iterator[http.client.HTTPResponse]:
    """The server's response, until it is read; Failed where there is none, or it breaks off."""
    request = urllib.request.Request(
        server.base_url.rstrip("/") + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"},
    )
    try:
        with _OPENER.open(request, timeout=seconds) as response:
            yield response
    except urllib.error.HTTPError as error:
        with error:
            raise Failed(_refusal(server, error.code, error.read(1 << 16))) from None
    except (OSError, http.client.HTTPException) as error:
        raise Failed(_unreached(server, error)) from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


# A proxy of the environment would be asked for another machine's 127.0.0.1, and shown the key.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event."""
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


def pieces(events: Iterable[str]) -> Iterator[str]:
    """The text in the events of one streamed answer; Failed where one is an error."""
    finish = None
    for data in events:
        if data == "[DONE]":
            break
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise Failed(f"the server sent what is no JSON object: {data[:80]}")
        if message := _message(chunk):
            raise Failed(message)
        for choice in chunk.get("choices") or []:
            finish = choice.get("finish_reason") or finish
            if text := (choice.get("delta") or {}).get("content"):
                yield str(text)
    else:
        if finish is None:
            raise ConnectionError("the last event is missing")
    if finish == "length":
        raise Cut("cut at the server's limit of length")


def _message(body: object) -> str | None:
    """The message of an error in OpenAI's shape."""
    error = body.get("error") if isinstance(body, dict) else None
    return None if not error else str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _refusal(server: Server, code: int, body: bytes) -> str:
    if code == 401:
        return f"the key is refused; it is in {server.key_file} (a server that was started again has a new one)"
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = None
    said = body[:200].decode("utf-8", "replace").strip() or "no message"
    return message or f"HTTP {code} from {server.base_url}: {said}"


def _unreached(server: Server, error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"{server.base_url}: no word for {duration(SILENCE_SECONDS)}"
    if isinstance(reason, ConnectionRefusedError):
        return f"nobody answers at {server.base_url}: the server has ended, or its tunnel; start it: {server.again}"
    if isinstance(error, urllib.error.URLError):
        return f"{server.base_url} cannot be reached: {reason}"
    return f"the connection broke off: the server has ended, or its tunnel; start it: {server.again}"


def _prompted(stdin: TextIO, stdout: TextIO, stderr: TextIO) -> Callable[[str], str]:
    """A line from the terminal, edited by readline where there is one."""
    if (stdin, stdout.isatty()) != (sys.stdin, True):
        return lambda prompt: _line(stdin)(print(prompt, end="", file=stderr, flush=True) or "")
    try:
        import readline  # noqa: F401 (input() edits with it, Chinese too)
    except ImportError:
        pass
    return input


def _line(stdin: TextIO) -> Callable[[str], str]:
    def read(_: str) -> str:
        if not (line := stdin.readline()):
            raise EOFError
        return line

    return read
