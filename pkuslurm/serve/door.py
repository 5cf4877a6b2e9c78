"""The door's HTTP: who asks is let in or not, what is asked goes to an engine, its answer comes back as it comes."""

from __future__ import annotations

import http.client
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.serve import access, limits, relay, requests, upstream
from pkuslurm.serve.behind import Behind
from pkuslurm.serve.refusal import BadRequest
from pkuslurm.serve.upstream import Address
from pkuslurm.serve.wire import JSON, Wire

MOST_CONNECTIONS = 256
PORTS = 100
# until it has shown the key; whoever sends a byte now and then would hold its place for ever
STRANGER_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_PAGE = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Door(ThreadingHTTPServer):
    """Bound when it is made; it answers once ``serve_forever`` runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], behind: Behind) -> None:
        self.behind = behind
        self.stranger_seconds = STRANGER_SECONDS
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._strangers: dict[socket.socket, float] = {}  # and since when they are here
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks DNS for our name
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._strangers[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.welcome(request)
            self._free.release()

    def welcome(self, request: socket.socket) -> None:
        """This connection has shown the key: it may stay as long as it likes."""
        self._strangers.pop(request, None)

    def service_actions(self) -> None:
        """Called by ``serve_forever`` at each of its turns."""
        for request, since in list(self._strangers.items()):
            if time.monotonic() - since > self.stranger_seconds:
                self.welcome(request)  # once is enough
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread then ends

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"pkuslurm: the door failed at a request: {type(error).__name__}", file=sys.stderr, flush=True)


def bind(host: str, first: int, behind: Behind) -> Door:
    """A door at the first port from ``first`` on that is free. Raises PkuslurmError."""
    last = min(first + PORTS - 1, 65535)
    for port in range(first, last + 1):
        try:
            return Door((host, port), behind)
        except PermissionError as error:
            raise PkuslurmError(f"serve.port={port}: {error.strerror}; choose one from 1024 on") from None
        except OSError as error:
            trouble = error
    raise PkuslurmError(f"serve.port={first}: no port up to {last} is free on {host} ({trouble.strerror})")


class _Handler(Wire):
    server: Door

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_HEAD(self) -> None:
        self._answer(self.command)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_HEAD

    def _answer(self, method: str) -> None:
        self.begun = self.was_read = False
        try:
            self._let_in()
            path = self.path.partition("?")[0]
            routes = _ROUTES.get(path) or (_ROUTES["/v1/models/"] if path.startswith("/v1/models/") else None)
            if routes is None:
                raise BadRequest(f"there is nothing at {path[:80]!r}", status=404)
            if method not in routes:
                raise BadRequest(f"{method[:20]}: only {', '.join(routes)} here", status=405)
            if method == "GET":
                self.ignore_body()
            routes[method](self)
        except BadRequest as error:
            self.refuse(error)
        except OSError:
            self.close_connection = True  # the client has gone
        except Exception as error:
            print(f"pkuslurm: the door failed at a request: {type(error).__name__}", file=sys.stderr, flush=True)
            self.refuse(BadRequest("this is a bug of ours; the server's log names it", status=500))

    def _let_in(self) -> None:
        if access.refused_site(self.command, self.headers):  # type: ignore[arg-type]  # a Message has get, too
            raise BadRequest("a page of another site asks, and is not answered", status=403)
        if not access.shows(self.headers.get("Authorization"), self.server.behind.key):
            raise BadRequest(
                "the key is wanted: Authorization: Bearer KEY, or any name with the key as the password",
                status=401,
                code="invalid_api_key",
            )
        self.server.welcome(self.connection)

    # what is there

    def _page(self) -> None:
        name, kind = _FILES[self.path.partition("?")[0]]
        try:
            data = (_PAGE / name).read_bytes()
        except OSError:
            raise BadRequest(f"{name} is not installed", status=404) from None
        self.whole(200, kind, data, {"Content-Security-Policy": _CSP})

    def _models(self) -> None:
        rows = [self._row(name) for name in self.server.behind.models]
        self.json(200, {"object": "list", "data": rows})

    def _model(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if name not in (models := self.server.behind.models):
            words = f"there is no {name[:80]!r} here, only {' and '.join(models)}"
            raise BadRequest(words, status=404, code="model_not_found")
        self.json(200, self._row(name))

    def _row(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.behind.started, "owned_by": "pkuslurm"}

    def _info(self) -> None:
        self.json(200, self._ready().info)

    def _chat(self) -> None:
        behind = self.server.behind
        with behind.activity.busy():
            value = self.read_json()
            asked = requests.convert(value, self._ready().engines, behind.training)
            bounded = not requests.ENGINES[behind.engines[asked.model]].alternates  # a server of its own: it refuses
            limits.require(behind.limits.get(asked.model, limits.Limits()), asked.body, bounded)
            self._relay(asked, behind.addresses[asked.model])

    def _ready(self) -> Behind:
        if not self.server.behind.addresses:
            raise BadRequest("the models are still being loaded; ask again in a while", status=503, code="loading")
        return self.server.behind

    # to the engine and back

    def _relay(self, asked: requests.Asked, address: Address) -> None:
        connection = upstream.connect(address)
        over = threading.Event()
        try:
            connection.connect()
            threading.Thread(target=_hang_up, args=(self.connection, connection.sock, over), daemon=True).start()
            response = upstream.send(connection, address, "POST", "/v1/chat/completions", asked.body)
            if response.status != 200:
                raise relay.refusal(response.status, response.read(), asked.model)
            if not asked.stream:
                self.whole(200, JSON, relay.whole(response.read(), asked.model))
            elif "event-stream" not in response.headers.get("Content-Type", ""):
                raise relay.refusal(500, response.read(), asked.model)
            else:
                self._stream(response, asked.model)
        except (OSError, http.client.HTTPException) as error:
            if self.begun or _gone(self.connection):
                raise OSError from error
            words = f"the engine of {asked.model} broke off ({type(error).__name__})"
            raise BadRequest(words, status=502, code="engine_failed") from None
        finally:
            over.set()
            connection.close()

    def _stream(self, response: http.client.HTTPResponse, model: str) -> None:
        chunked = self.request_version != "HTTP/1.0"
        self.head(200, "text/event-stream; charset=utf-8", {"Transfer-Encoding": "chunked"} if chunked else {})
        if not chunked:
            self.close_connection = True
        for part in relay.stream(_lines(response), model):
            self.part(part, chunked)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")


_ROUTES: Mapping[str, Mapping[str, Callable[[_Handler], None]]] = {
    **{path: {"GET": _Handler._page} for path in _FILES},
    "/v1/models": {"GET": _Handler._models},
    "/v1/models/": {"GET": _Handler._model},
    "/info": {"GET": _Handler._info},
    "/v1/chat/completions": {"POST": _Handler._chat},
}


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Until its end, also where the engine broke off."""
    with suppress(OSError, http.client.HTTPException):
        while line := response.readline():
            yield line


def _gone(client: socket.socket) -> bool:
    """Whether the client has closed its side."""
    poller = select.poll()
    try:
        poller.register(client, select.POLLIN)
        return bool(poller.poll(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def _hang_up(client: socket.socket, engine: socket.socket, over: threading.Event) -> None:
    """End the engine's work for a client that went away while nothing could be written to it."""
    while not over.wait(_LOOK_SECONDS):
        if _gone(client):
            with suppress(OSError):
                engine.shutdown(socket.SHUT_RDWR)
            return
