"""Mistakes that a user can make: shown as one line, never as a traceback."""

from __future__ import annotations


class PkuslurmError(Exception):
    """Refused, and why: names the field, the value, what is allowed and what to do. Exit code 2."""

    exit_code = 2


class PartlySubmitted(PkuslurmError):
    """The run is written, but not all its jobs are submitted: ``retry`` goes on. Exit code 3."""

    exit_code = 3
