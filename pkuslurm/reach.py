"""What to type to reach a run's models from here, from one's own computer, or from another chat program. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.read.closing import form
from pkuslurm.read.endpoint import Endpoint
from pkuslurm.read.text import aligned, safe
from pkuslurm.worker.network import is_loopback

# What PKU's platform sets in its applications.
SCOW = ("SCOW_AI_MODEL_PATH", "SCOW_AI_DATASET_PATH", "XDL_IP")


@dataclass(frozen=True)
class Here:
    """This machine, as one's own computer would call it; ``environ``: what the shell here has; ``command``: pkuslurm,
    as it is typed here."""

    user: str
    host: str
    environ: Mapping[str, str]
    command: str = "pkuslurm"

    @property
    def remote(self) -> bool:
        """Whether somebody is logged in here from elsewhere."""
        return bool(self.environ.get("SSH_CONNECTION"))

    @property
    def address(self) -> str:
        """The name or address under which this machine was reached."""
        words = self.environ.get("SSH_CONNECTION", "").split()
        return words[2] if len(words) == 4 else self.host

    @property
    def login(self) -> list[str]:
        """What ssh is told to get here."""
        words = self.environ.get("SSH_CONNECTION", "").split()
        port = ["-p", words[3]] if len(words) == 4 and words[3] != "22" else []
        return [*port, f"{self.user}@{self.address}"]


def tunnel(endpoint: Endpoint, here: Here) -> str | None:
    """The ssh command for one's own computer; None where the models answer on it."""
    if is_loopback(endpoint.host) and not here.remote:
        return None
    forward = f"{endpoint.port}:{endpoint.host}:{endpoint.port}"
    return shlex.join(["ssh", "-N", "-L", forward, *here.login])


def document(endpoint: Endpoint, key_file: Path, here: Here) -> dict[str, Any]:
    """The contract's JSON line of ``serve``."""
    return {
        "base_url": endpoint.base_url,
        "key_file": str(key_file),
        "models": list(endpoint.models),
        "page_url": endpoint.page_url,
        "tunnel": tunnel(endpoint, here),
    }


def lines(endpoint: Endpoint, key_file: Path, merged: Path, run_id: str, here: Here) -> list[str]:
    """The same for people, with what other programs want to be told."""
    through = tunnel(endpoint, here)
    cat = f"cat {shlex.quote(str(key_file))}"
    # what is typed here, and what on one's own computer, where neither the node's address nor the key's file is
    key = f'"$({cat})"'
    page, there = endpoint.page_url, key
    if through is not None:
        page = f"http://127.0.0.1:{endpoint.port}/"
        there = f'"$({shlex.join(["ssh", *here.login, cat])})"'
    rows = []
    if through is not None:
        rows.append(("tunnel", f"{through}   (first, on your own computer; what has 127.0.0.1 in it is for there)"))
    rows.append(("page", f"{page}   (any name; the password is the key)"))
    template = here.environ.get(
        "VSCODE_PROXY_URI"
    )  # code-server, as PKU's platform has it: leads to its own node alone
    if template and is_loopback(endpoint.host):
        rows.append(("code-server", template.replace("{{port}}", str(endpoint.port))))
    rows += [("key", cat), ("terminal", f"{here.command} chat {shlex.quote(run_id)}")]
    if through is not None:
        rows.append(("OpenAI, here", _openai(endpoint.base_url, key, endpoint.host)))
    rows += [
        ("OpenAI", _openai(f"{page}v1", there, "127.0.0.1")),
        ("NextChat", f"BASE_URL={page} OPENAI_API_KEY={there} CUSTOM_MODELS=-all,{_plus(endpoint)}"),
        ("Open WebUI", f"OPENAI_API_BASE_URL={page}v1 OPENAI_API_KEY={there}"),
    ]
    if any(here.environ.get(name) for name in SCOW):
        rows.append(("SCOW NextChat", form(merged)))
    return [safe(line) for line in aligned(rows)]


def _openai(url: str, key: str, host: str) -> str:
    return f'export OPENAI_BASE_URL={url} OPENAI_API_KEY={key} NO_PROXY="$NO_PROXY,{host}"'


def headline(endpoint: Endpoint, run_id: str) -> str:
    """Which models answer where, and until when."""
    until = f", until {endpoint.ends.replace('T', ' ')[:16]} (the job's time limit)" if endpoint.ends else ""
    idle = f"; it ends after {endpoint.idle_minutes:g} minutes without a question" if endpoint.idle_minutes else ""
    return safe(f"{run_id}: {', '.join(endpoint.models)} answer on {endpoint.node} ({endpoint.engine}){until}{idle}")


def _plus(endpoint: Endpoint) -> str:
    return ",".join(f"+{name}" for name in reversed(endpoint.models))
