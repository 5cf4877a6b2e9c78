"""One HTTP connection to an engine: over its UNIX socket or the node's loopback, so that no proxy is ever asked."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LISTENS = "0A"
# as /proc/net/tcp and tcp6 write them: what answers at 127.0.0.1
_ANSWERS = ("0100007F", "00000000", 32 * "0", "0000000000000000FFFF00000100007F")


@dataclass(frozen=True)
class Address:
    """Where an engine listens: ``socket`` (a path), or else ``port`` of loopback; ``key``: what it asks of us."""

    key: str
    socket: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Events:
    """An answer that came as server-sent events."""

    data: bytes


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connect(address: Address, timeout: float | None = None) -> http.client.HTTPConnection:
    """A connection that is not open yet. ``timeout``: for each read; None: an answer may take as long as it takes."""
    if address.socket is not None:
        return _Unix(address.socket, timeout)
    return http.client.HTTPConnection("127.0.0.1", address.port, timeout=timeout)


def send(
    connection: http.client.HTTPConnection, address: Address, method: str, path: str, body: Mapping[str, Any] | None
) -> http.client.HTTPResponse:
    """The engine's answer, of which the head has been read. Raises OSError or http.client.HTTPException."""
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    if body is None:
        connection.request(method, path, headers=headers)
    else:
        connection.request(method, path, json.dumps(body).encode(), headers | {"Content-Type": "application/json"})
    return connection.getresponse()


def ask(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
) -> tuple[int, Any]:
    """Status and JSON value of a whole answer (its text where it is no JSON, Events where it was streamed).

    Raises as ``send`` does.
    """
    connection = connect(address, timeout)
    try:
        response = send(connection, address, method, path, body)
        streamed = "event-stream" in response.headers.get("Content-Type", "")
        return response.status, Events(response.read()) if streamed else value_of(response.read())
    finally:
        connection.close()


def listeners(port: int, table: str) -> set[int]:
    """The users whose processes answer at ``port`` of 127.0.0.1. ``table``: what /proc/net/tcp or tcp6 holds."""
    rows = [words for line in table.splitlines()[1:] if len(words := line.split()) > 7 and words[3] == _LISTENS]
    places = [(*row[1].split(":")[:2], row[7]) for row in rows]
    return {int(user) for host, number, user in places if host in _ANSWERS and int(number, 16) == port}


def value_of(data: bytes) -> Any:
    """The JSON value in ``data``; its text where it holds none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", errors="replace")


def words_of(value: Any) -> str:
    """What an engine's error answer says: each of them has another shape for it."""
    if isinstance(value, dict):
        for name in ("error", "message", "detail", "msg"):
            if value.get(name):
                return words_of(value[name])
    if isinstance(value, list) and value:  # pydantic: one object a mistake
        return "; ".join(words_of(one) for one in value[:3])
    return " ".join(str(value).split())[:1000]
