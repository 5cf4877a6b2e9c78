"""What stands before an engine's app: the key, the few routes there are, and whether the client is still there."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CHAT = "/v1/chat/completions"
MOST_BYTES = 8 << 20
_JSON = (b"content-type", b"application/json")


@dataclass
class Request:
    """One chat request: ``stop`` ends its generation after the next token; ``ids`` of the prompt, once rendered;
    ``made``: the number of tokens answered, ``cut``: that was all it might have."""

    stop: bool = False
    ids: list[int] | None = None
    made: int | None = None
    cut: bool = False
    error: str | None = None


# of the request that the running code works for
REQUEST: ContextVar[Request | None] = ContextVar("request", default=None)


class Refused(Exception):
    """A status and a message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def listen(app: App, payload: dict[str, Any]) -> None:
    """Serve ``app`` on the payload's UNIX socket, for this user alone, until a signal ends it."""
    uvicorn: Any = importlib.import_module("uvicorn")
    place = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        # under its own name only once who connects is not refused
        place.bind(f"{payload['socket']}~")
    finally:
        os.umask(before)
    place.listen(128)
    Path(f"{payload['socket']}~").rename(payload["socket"])
    # warnings only: no request is in the log
    config = uvicorn.Config(
        guarded(app, payload["key"], payload["name"]),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[place])


def guarded(app: App, key: str, name: str) -> App:
    """``app`` for who has the key: its chat, POST /tokenize, GET /v1/models and GET /health, and nothing else of it."""

    async def route(scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key.encode()):
            raise Refused(401, "the engine's key is missing or wrong")
        wanted = (scope["method"], scope["path"])
        if wanted == ("GET", "/health"):
            await answer(send, 200, {"status": "ok"})
        elif wanted == ("GET", "/v1/models"):
            await answer(send, 200, {"object": "list", "data": [{"id": name, "object": "model"}]})
        elif wanted in (("POST", CHAT), ("POST", "/tokenize")):
            body = check(await read(receive), name)
            await (chat if wanted[1] == CHAT else tokenize)(app, scope, body, receive, send)
        else:
            raise Refused(404, f"there is no {wanted[0]} {wanted[1]}")

    async def asgi(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        try:
            await route(scope, receive, send)
        except Refused as refused:
            await answer(send, refused.status, problem(str(refused)))

    return asgi


async def read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MOST_BYTES:
            raise Refused(413, "the request is too long")
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


def check(data: bytes, name: str) -> dict[str, Any]:
    """The request with the name that the app knows, each content one text (the apps join parts differently).

    Pictures are refused: the app would fetch them from anywhere."""
    try:
        body = json.loads(data)
    except ValueError:
        raise Refused(400, "the request is no JSON") from None
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Refused(400, "messages: a list of {role, content} is needed")
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise Refused(400, "messages: each needs a role")
    return {**body, "model": name, "messages": [{**one, "content": as_text(one.get("content"))} for one in messages]}


def as_text(content: Any) -> str:
    parts = [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Refused(400, "messages: content is a text")
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
        raise Refused(400, "messages: only text can be asked")
    return "".join(part["text"] for part in parts)


async def chat(app: App, scope: Message, body: dict[str, Any], receive: Receive, send: Send) -> None:
    """The app's answer; its generation ends when the client goes away."""
    request, gone = Request(), asyncio.Event()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        request.stop = True
        gone.set()

    watcher = asyncio.create_task(watch())
    try:
        await (stream if body.get("stream") else at_once)(app, scope, body, request, gone, send)
    finally:
        request.stop = True
        watcher.cancel()


async def at_once(
    app: App, scope: Message, body: dict[str, Any], request: Request, gone: asyncio.Event, send: Send
) -> None:
    # "stream": null is no boolean to LLaMA-Factory
    status, kind, data = await whole(app, scope, {**body, "stream": False}, request, gone)
    if request.error:
        await answer(send, 500, problem(request.error))
    elif status == 200 and kind.startswith(b"text/event-stream"):
        # transformers 4 knows nothing but streams
        await answer(send, 200, joined(data, request))
    else:
        await send({"type": "http.response.start", "status": status, "headers": [_JSON]})
        await send({"type": "http.response.body", "body": data})


async def stream(
    app: App, scope: Message, body: dict[str, Any], request: Request, gone: asyncio.Event, send: Send
) -> None:
    """The app's stream; what goes wrong after its begin is its last event, in the form of any other error."""
    begun = ended = False

    async def end() -> None:
        nonlocal ended
        ended = True
        event = f"data: {json.dumps(problem(request.error or ''))}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": False})

    async def relay(message: Message) -> None:
        nonlocal begun
        if ended:
            return
        if begun and request.error:
            await end()
        else:
            begun = True
            await send(message)

    try:
        await ask(app, scope, body, request, gone, relay)
    except Exception as error:
        request.error = request.error or words(error)
        if not begun:
            await answer(send, 500, problem(request.error))
        elif not ended:
            await end()


async def tokenize(app: App, scope: Message, body: dict[str, Any], receive: Receive, send: Send) -> None:
    """The prompt's ids, as the app's own chat has them: it is asked, and stopped as soon as it generates."""
    request = Request(stop=True)
    asked = {"model": body["model"], "messages": body["messages"], "max_tokens": 1, "temperature": 0.0}
    status, _, data = await whole(app, scope, asked, request, asyncio.Event())
    if request.ids is None:
        await send({"type": "http.response.start", "status": max(status, 400), "headers": [_JSON]})
        await send({"type": "http.response.body", "body": data})
    else:
        await answer(send, 200, {"tokens": request.ids, "count": len(request.ids)})


async def ask(
    app: App, scope: Message, body: dict[str, Any], request: Request, gone: asyncio.Event, send: Send
) -> None:
    """One chat request to the app, made of ``body``."""
    data = json.dumps(body).encode()
    kept = [(key, value) for key, value in scope["headers"] if key not in (b"content-length", b"content-type")]
    inner = {**scope, "path": CHAT, "raw_path": CHAT.encode(), "headers": [*kept, _JSON]}
    unread = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    REQUEST.set(request)
    await app(inner, receive, send)


async def whole(
    app: App, scope: Message, body: dict[str, Any], request: Request, gone: asyncio.Event
) -> tuple[int, bytes, bytes]:
    """Status, content type and body of the app's answer; 500 where the app raises."""
    status, kind, parts = 500, b"", []

    async def keep(message: Message) -> None:
        nonlocal status, kind
        if message["type"] == "http.response.start":
            status, kind = message["status"], dict(message["headers"]).get(b"content-type", b"")
        else:
            parts.append(message.get("body", b""))

    try:
        await ask(app, scope, body, request, gone, keep)
    except Exception as error:
        request.error = request.error or words(error)
        return 500, b"", json.dumps(problem(request.error)).encode()
    return status, kind, b"".join(parts)


def joined(data: bytes, request: Request) -> dict[str, Any]:
    """A stream's chunks as the one answer that they are."""
    chunks = list(events(data.decode("utf-8").split("\n")))
    first: dict[str, Any] = chunks[0] if chunks else {}
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    kept: dict[str, Any] = {name: first[name] for name in ("id", "created", "model") if name in first}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length" if request.cut else "stop"}
    asked, made = len(request.ids or ()), request.made or 0
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return {**kept, "object": "chat.completion", "choices": [choice], "usage": usage}


def events(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        if line.startswith("data:") and line[5:].strip() != "[DONE]":
            with suppress(ValueError):
                yield json.loads(line[5:])


def words(error: BaseException) -> str:
    """What went wrong; the log gets its kind alone, for a message may quote the request."""
    while getattr(error, "exceptions", ()):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    print(f"a request failed: {type(error).__name__}", file=sys.stderr, flush=True)
    return str(getattr(error, "detail", "") or f"{type(error).__name__}: {error}")


def problem(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "engine", "param": None, "code": None}}


async def answer(send: Send, status: int, value: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [_JSON]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})
