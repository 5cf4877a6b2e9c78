"""Where people watch a run or a sweep that works here, until they close it."""

from __future__ import annotations

from collections.abc import Callable

# Without a terminal (a log file, CI) a line as often as this is enough.
PLAIN_SECONDS = 10.0


class Terminal:
    """A terminal that went away (SIGHUP) is ``gone``: that silences it and ends nothing."""

    def __init__(self) -> None:
        self.gone = False

    def show(self, what: Callable[[], object]) -> None:
        """Call ``what``, which prints, unless nobody can see it any more."""
        if self.gone:
            return
        try:
            what()
        except OSError:
            self.gone = True
