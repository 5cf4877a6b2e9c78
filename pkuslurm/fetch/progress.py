"""How far it is: one line on a terminal that changes; elsewhere a line now and then."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from contextlib import suppress

from pkuslurm.read.text import duration, size, width

LINE_SECONDS = 15.0
_REDRAW_SECONDS = 0.2
_WINDOW = 10.0  # seconds over which the rate is taken


class Progress:
    """Bytes that came, of ``total``; ``here`` of them were there before."""

    def __init__(self, total: int, here: int) -> None:
        self.total = total
        self.done = here
        self.lock = threading.Lock()
        self.terminal = sys.stderr.isatty()
        self.came: deque[tuple[float, int]] = deque([(time.monotonic(), here)])
        self.shown = time.monotonic()

    def add(self, count: int) -> None:
        """``count`` bytes more; less than 0: they were not what they should be."""
        with self.lock:
            self.done += count

    def show(self) -> None:
        now = time.monotonic()
        if now - self.shown < (_REDRAW_SECONDS if self.terminal else LINE_SECONDS):
            return
        self.shown = now
        self.came.append((now, self.done))
        while len(self.came) > 2 and now - self.came[0][0] > max(_WINDOW, LINE_SECONDS):
            self.came.popleft()
        self._say(self.line())

    def line(self) -> str:
        (since, before), (now, done) = self.came[0], self.came[-1]
        rate = max(0.0, (done - before) / (now - since)) if now > since else 0.0
        left = f", {duration((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        part = 100 * done // self.total if self.total else 100
        return f"{part:3d}%  {size(done)} of {size(self.total)}, {size(rate)}/s{left}"

    def end(self) -> None:
        """Take the changing line away."""
        if self.terminal:
            self._write("\r\x1b[K")

    def _say(self, text: str) -> None:
        if not self.terminal:
            self._write(f"{text}\n")
            return
        columns = shutil.get_terminal_size().columns
        self._write(f"\r{text if width(text) < columns else text[: columns - 1]}\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal may go away, and the model comes all the same
            sys.stderr.write(text)
            sys.stderr.flush()
