"""What ends the door, apart from a refusal (PkuslurmError, exit code 2)."""

from __future__ import annotations


class Failed(Exception):
    """Something broke, or is not what it should be: shown in one line, exit code 1."""
