"""One line of what doctor says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line. ``remedy``: what to do; ``needed``: without it nothing works, and doctor ends with 1."""

    check: str
    ok: bool
    detail: str
    remedy: str | None = None
    needed: bool = False

    def to_json(self) -> dict[str, object]:
        return {"check": self.check, "ok": self.ok, "detail": self.detail, "remedy": self.remedy}
