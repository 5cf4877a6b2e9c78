"""The two hubs: which one is meant, what files a model has there, and under which address each is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch.web import Hub, get_json

MODELSCOPE, HUGGING_FACE = "https://www.modelscope.cn", "https://huggingface.co"
REVISIONS = {"modelscope": "master", "huggingface": "main"}
# ModelScope lists no more, and does not say so
_LISTED = 3000


@dataclass(frozen=True)
class RemoteFile:
    """``size`` in bytes. ``sha256`` of the content, or ``blob``, git's own SHA-1 of it; the hub may tell neither."""

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.blob


def hub_of(source: str | None, environ: Mapping[str, str]) -> Hub:
    """The hub that ``--from`` names; without it ModelScope, which is near to our users."""
    scope = environ.get("MODELSCOPE_ENDPOINT") or environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE
    hugging = environ.get("HF_ENDPOINT") or HUGGING_FACE
    if source in (None, "modelscope"):
        kind, endpoint = "modelscope", _url(scope)
    elif source in ("huggingface", "hf"):
        kind, endpoint = "huggingface", _url(hugging)
    elif re.match(r"https?://[^/]", source or ""):
        endpoint = _url(str(source))
        ours = endpoint == _url(scope) or "modelscope" in urlsplit(endpoint).netloc
        kind = "modelscope" if ours else "huggingface"
    else:
        raise PkuslurmError(f"--from {source}: it is modelscope, huggingface, or a mirror's address (https://…)")
    # a mirror that only the command line names is sent none
    known, variable = {
        "modelscope": ((_url(scope), MODELSCOPE), "MODELSCOPE_API_TOKEN"),
        "huggingface": ((_url(hugging), HUGGING_FACE), "HF_TOKEN"),
    }[kind]
    token = environ.get(variable, "").strip() or None if endpoint in known else None
    if token and not token.isascii():
        raise PkuslurmError(f"{variable}: it is no token, which is letters and digits; copy it from {endpoint}")
    place = urlsplit(endpoint)
    if token and place.scheme == "http" and place.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise PkuslurmError(f"{endpoint}: a token is not sent over http; give the address with https, or unset it")
    return Hub(kind, endpoint, token)


def _url(text: str) -> str:
    url = (text if "://" in text else f"https://{text}").rstrip("/")
    try:
        _ = urlsplit(url).port
        url.encode("ascii")
    except ValueError as error:
        raise PkuslurmError(f"{text}: no hub can have this address ({error})") from None
    return url


def listing(hub: Hub, model: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The revision to be read (on Hugging Face the commit, so that it cannot change meanwhile) and its files."""
    asked = revision or REVISIONS[hub.kind]
    return _of_modelscope(hub, model, asked) if hub.kind == "modelscope" else _of_hugging_face(hub, model, asked)


def address(hub: Hub, model: str, revision: str, path: str) -> str:
    if hub.kind == "modelscope":
        query = urlencode({"Revision": revision, "FilePath": path})
        return f"{hub.endpoint}/api/v1/models/{model}/repo?{query}"
    return f"{hub.endpoint}/{model}/resolve/{quote(revision, safe='')}/{quote(path)}"


def page(hub: Hub, model: str) -> str:
    return f"{hub.endpoint}/models/{model}" if hub.kind == "modelscope" else f"{hub.endpoint}/{model}"


def _of_modelscope(hub: Hub, model: str, revision: str) -> tuple[str, list[RemoteFile]]:
    query = urlencode({"Revision": revision, "Recursive": "True"})
    answer, _ = get_json(hub, f"{hub.endpoint}/api/v1/models/{model}/repo/files?{query}")
    data = answer.get("Data") if isinstance(answer, dict) else None
    rows = data.get("Files") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        said = answer.get("Message") if isinstance(answer, dict) else None
        raise PkuslurmError(f"{hub.host}: it lists no files ({said or 'nothing is said why'})")
    if len(rows) >= _LISTED:
        raise PkuslurmError(f"{hub.host}: {model} has more files than it lists; try --from huggingface")
    return revision, [
        _file(hub, row, row.get("Path"), row.get("Size"), sha256=row.get("Sha256"))
        for row in _objects(hub, rows)
        if row.get("Type") != "tree"
    ]


def _of_hugging_face(hub: Hub, model: str, revision: str) -> tuple[str, list[RemoteFile]]:
    root = f"{hub.endpoint}/api/models/{model}"
    answer, _ = get_json(hub, f"{root}/revision/{quote(revision, safe='')}")
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise PkuslurmError(f"{hub.host}: it names no commit of {model}; is this a mirror of Hugging Face?")
    query: dict[str, str] | None = {"recursive": "true"}
    files: list[RemoteFile] = []
    while query is not None:
        rows, headers = get_json(hub, f"{root}/tree/{commit}?{urlencode(query)}")
        for row in _objects(hub, rows):
            if row.get("type") == "file":
                large = row["lfs"] if isinstance(row.get("lfs"), dict) else {}
                blob = None if large else row.get("oid")
                size = large.get("size", row.get("size"))
                files.append(_file(hub, row, row.get("path"), size, sha256=large.get("oid"), blob=blob))
        query = _next(headers.get("Link"))
    return commit, files


def _objects(hub: Hub, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PkuslurmError(f"{hub.host}: it lists something else than files, {str(rows)[:200]}")
    return rows


def _next(link: str | None) -> dict[str, str] | None:
    """The query of the next page. Its host is not taken over: a mirror may pass on the original's."""
    found = re.search(r'<([^>]+)>;\s*rel="next"', link or "")
    return {name: values[0] for name, values in parse_qs(urlsplit(found[1]).query).items()} if found else None


def _file(hub: Hub, row: Any, path: Any, size: Any, sha256: Any, blob: Any = None) -> RemoteFile:
    for digest, form in ((sha256, r"[0-9a-f]{64}"), (blob, r"[0-9a-f]{40}")):
        if digest and not re.fullmatch(form, str(digest)):
            raise PkuslurmError(f"{hub.host}: a hash that is none, in {str(row)[:200]}")
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise PkuslurmError(f"{hub.host}: a file without name or size, {str(row)[:200]}")
    return RemoteFile(path, size, sha256 or None, blob or None)
