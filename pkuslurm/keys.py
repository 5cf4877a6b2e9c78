"""The key of a run's endpoint: for its owner's eyes alone, in no argv, no log and nothing of the run's."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import find
from pkuslurm.rundir import RunDir, write_text


def file_of(run: RunDir, environ: Mapping[str, str]) -> Path:
    """Where the key of ``run``'s endpoint is kept: in the user's state directory, never in the run's.

    A copy of a run has the same id, and another place.
    """
    listed = find.state_file(environ)
    if listed is None:
        raise PkuslurmError(
            "HOME: it is not set, so there is no place for the endpoint's key; set it, or XDG_STATE_HOME"
        )
    place = hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:8]
    return listed.parent / "keys" / f"{run.run_id.replace('/', '-')}-{place}.key"


def make(file: Path) -> None:
    """A new key, for this user's eyes alone; no other process of the machine sees it in an argv or a log."""
    try:
        before = os.umask(0o077)  # also what is above it is nobody else's
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        finally:
            os.umask(before)
        os.chmod(file.parent, 0o700)
        write_text(file, secrets.token_urlsafe(32) + "\n")
    except OSError as error:
        raise PkuslurmError(f"{file}: the endpoint's key cannot be written there: {error.strerror}") from None


def given(file: str | None) -> str:
    if file is not None:
        return read(Path(file))
    if key := os.environ.get("OPENAI_API_KEY"):
        return _good(key, "$OPENAI_API_KEY")
    raise PkuslurmError("chat --url: its key is wanted, in $OPENAI_API_KEY or by --key-file FILE")


def read(file: Path) -> str:
    try:
        return _good(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or "it is no text"
        raise PkuslurmError(f"{file}: the endpoint's key cannot be read there: {words}") from None


def _good(text: str, place: str) -> str:
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise PkuslurmError(f"{place}: this is no key, which is one word of ASCII characters")
    return key
