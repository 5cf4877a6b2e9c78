"""HTTP towards a hub, by the standard library: what is sent to whom, what is tried again, in which words it ends."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from pkuslurm import __version__
from pkuslurm.errors import PkuslurmError

T = TypeVar("T")
SECONDS = 30.0  # without a byte; a proxy that has forgotten us would hold us for ever
TRIES, PAUSE = 5, 1.0  # as often without a byte of progress; seconds before the second, then doubled
# whoever has no network is told so within half a minute
ASKED_SECONDS, ASKED_TRIES = 15.0, 2
LONGEST_PAUSE = 60.0
ANSWER_BYTES = 64_000_000  # a listing or an index is no larger


@dataclass(frozen=True)
class Hub:
    """Where models are: ``kind`` is modelscope or huggingface (whose mirrors speak the same); ``token`` is its own."""

    kind: str
    endpoint: str
    token: str | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc


def proxy_of(hub: Hub, url: str) -> str | None:
    """The proxy between here and ``url``, as HOST:PORT (VARIABLE), without the password that may stand in it."""
    scheme = urlsplit(url).scheme
    proxy = urllib.request.getproxies().get(scheme, "")
    if not proxy or urllib.request.proxy_bypass(hub.host):
        return None
    return f"{urlsplit(proxy if '://' in proxy else f'//{proxy}').netloc.rpartition('@')[2]} ({scheme}_proxy)"


class Unreachable(PkuslurmError):
    """No answer from the hub, whatever was tried: perhaps this machine has no network."""


class Again(Exception):
    """Perhaps another try helps. ``after``: seconds that the hub asks for; ``answered``: it is there."""

    def __init__(self, words: str, after: float | None = None, answered: bool = False) -> None:
        super().__init__(words)
        self.after = after
        self.answered = answered


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Weights lie on other hosts (a CDN), which are sent no token."""

    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
            fp.close()
            raise PkuslurmError(f"{before.netloc}: it leads to {after.scheme}://{after.netloc}, which is not safe")
        if new is not None and (before.scheme, before.netloc) != (after.scheme, after.netloc):
            for name in ("Authorization", "Cookie"):
                new.remove_header(name)
        return new


def ask(hub: Hub, url: str, headers: Mapping[str, str] | None = None, seconds: float = SECONDS) -> Any:
    """The open response to one GET. Raises Again, or PkuslurmError where no other try can help."""
    sent = {"User-Agent": f"pkuslurm/{__version__}", "Accept-Encoding": "identity", **(headers or {}), **_token(hub)}
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme, "")
    if proxy.startswith("socks") and not urllib.request.proxy_bypass(hub.host):
        raise PkuslurmError(f"{proxy.partition('://')[0]}: a SOCKS proxy cannot be used here; set https_proxy=http://…")
    opener = urllib.request.build_opener(_Redirects)  # with the proxies of the environment
    try:
        return opener.open(urllib.request.Request(url, headers=sent), timeout=seconds)
    except HTTPError as error:
        with error:
            raise _answer(hub, error) from None
    except (OSError, HTTPException) as error:
        raise no_answer(hub, error, proxy_of(hub, url)) from None


def get_json(hub: Hub, url: str) -> tuple[Any, Mapping[str, str]]:
    """The JSON document at ``url`` and the answer's headers; tried again while that may help."""

    def once() -> tuple[Any, Mapping[str, str]]:
        with ask(hub, url, seconds=ASKED_SECONDS) as answer:
            try:
                body = answer.read(ANSWER_BYTES + 1)
            except (OSError, HTTPException) as error:
                raise no_answer(hub, error) from None
            if len(body) > ANSWER_BYTES:
                raise PkuslurmError(f"{hub.host}: its answer has no end; is this a hub of models?")
            try:
                return json.loads(body), answer.headers
            except ValueError:
                raise PkuslurmError(
                    f"{hub.host}: its answer is no JSON ({body[:60]!r}); is this a hub of models, or does a proxy "
                    "want you to log in?"
                ) from None

    return tried(hub, once, unanswered=ASKED_TRIES)


def tried(
    hub: Hub,
    once: Callable[[], T],
    moved: Callable[[], bool] = lambda: False,
    stop: threading.Event | None = None,
    unanswered: int = TRIES,
) -> T:
    """``once()`` until it gives something, or TRIES times in vain; ``unanswered`` times where nobody answers.

    ``moved()``: the last try was not for nothing, so that it does not count. ``stop`` ends the waiting by Again.
    """
    waiting = stop or threading.Event()
    failures = 0
    while True:
        try:
            return once()
        except Again as problem:
            failures = 1 if moved() else failures + 1
            if failures >= (TRIES if problem.answered else unanswered):
                words = f"{hub.host}: {problem}"
                if problem.answered:
                    raise PkuslurmError(f"{words}; try again later, it goes on from where it stands") from None
                raise Unreachable(words) from None
            pause = PAUSE * 2 ** (failures - 1) if problem.after is None else problem.after
            if waiting.wait(min(pause, LONGEST_PAUSE)):
                raise


def _token(hub: Hub) -> dict[str, str]:
    if hub.token is None:
        return {}
    sent = {"Authorization": f"Bearer {hub.token}"}
    # ModelScope's older interfaces know a session only
    return sent | ({"Cookie": f"m_session_id={hub.token}"} if hub.kind == "modelscope" else {})


def _answer(hub: Hub, error: HTTPError) -> Exception:
    variable = "HF_TOKEN" if hub.kind == "huggingface" else "MODELSCOPE_API_TOKEN"
    told = _told(error)
    code = error.code
    if code in (408, 416, 425, 429) or code >= 500:
        after = str(error.headers.get("Retry-After", ""))
        words = "too many requests (429)" if code == 429 else f"it answers {code}{told}"
        return Again(words, float(after) if after.isdecimal() else None, answered=True)
    if code in (401, 403):
        mine = f"that of ${variable} is not enough" if hub.token else f"export {variable}=… (yours, from its web page)"
        return PkuslurmError(
            f"{hub.host}: not without a token that may read it ({code}{told}): there is no such model, or it is "
            f"private, or its conditions are to be accepted on its page first; {mine}"
        )
    if code == 407:
        return PkuslurmError("the proxy wants a name and a password: https_proxy=http://NAME:PASSWORD@HOST:PORT")
    return (
        PkuslurmError(f"{hub.host}: it answers {code}{told}") if code != 404 else Missing(f"{hub.host}: {code}{told}")
    )


class Missing(PkuslurmError):
    """The hub knows no such model, revision or file (404)."""


def _told(error: HTTPError) -> str:
    """What the hub says in its own words, in a line; "": nothing that is one."""
    said = error.headers.get("X-Error-Message")
    if not said:
        try:
            body = json.loads(error.read(10_000))
        except (OSError, ValueError, HTTPException):
            return ""
        said = (body.get("Message") or body.get("error")) if isinstance(body, dict) else None
    return f", {str(said)[:200]}" if said else ""


def no_answer(hub: Hub, error: Exception, proxy: str | None = None) -> Exception:
    """What to do with a connection that did not come about (through ``proxy``, if there is one), or broke."""
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return PkuslurmError(
            f"{hub.host}: its certificate cannot be trusted ({reason.verify_message}); where a proxy opens TLS, "
            "export SSL_CERT_FILE=/path/to/its/ca.pem"
        )
    through = "" if proxy is None else f"the proxy {proxy}: "
    if isinstance(reason, socket.gaierror):
        return Again(f"{through}its name is not known here (DNS)")
    if isinstance(reason, TimeoutError):
        return Again(f"{through}it does not answer in time")
    words = (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or type(reason).__name__
    return Again(through + words)
