"""What a person sees while a sweep works here: a line a point at its end, and what runs now."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pkuslurm.read import status
from pkuslurm.read.job import progress
from pkuslurm.read.report.logged import last
from pkuslurm.read.text import duration, safe
from pkuslurm.read.values import number
from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.submit.terminal import PLAIN_SECONDS, Terminal

if TYPE_CHECKING:
    from rich.progress import Progress

# A terminal's line moves this often.
LIVE_SECONDS = 0.5
# of what runs side by side; the others are counted
MOST_SHOWN = 3


@dataclass(frozen=True)
class Work:
    """What is to be done in a directory of the sweep: the jobs of a point, or what points share."""

    label: str
    run: RunDir
    kinds: tuple[str, ...]

    @property
    def is_share(self) -> bool:
        """Of several points, named by its one job."""
        return self.kinds == ("prepare",)


@dataclass(frozen=True)
class Ended:
    """``passed``: whether the expectations were met; None where there were none."""

    text: str
    complete: bool
    passed: bool | None = None


class Lines:
    """A line for each point that has ended, above the live line of those at work; ``say`` prints one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.live: Progress | None = None
        self.shown_at = time.monotonic()
        self.terminal = Terminal()

    def line(self, text: str) -> None:
        """Above the live line, which comes back by itself."""

        def show() -> None:
            self._close()
            self.say(text)

        self.terminal.show(show)

    def tick(self, running: Sequence[tuple[Work, float]]) -> None:
        """``running``: with the time.monotonic() of each beginning."""
        on_terminal = not self.terminal.gone and sys.stderr.isatty()
        if not running or time.monotonic() - self.shown_at < (LIVE_SECONDS if on_terminal else PLAIN_SECONDS):
            return
        self.shown_at = time.monotonic()
        text = now(running)
        self.terminal.show(lambda: self._refresh(text) if on_terminal else self.say(f"      {text}"))

    def close(self) -> None:
        self.terminal.show(self._close)

    def _refresh(self, text: str) -> None:
        if self.live is None:
            self.live = _progress()
            self.live.add_task("", total=None, text="")
            self.live.start()
        self.live.update(self.live.task_ids[0], text=text)
        self.live.refresh()

    def _close(self) -> None:
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    # refreshed from our own loop: a terminal that goes away must raise there, not in a thread
    return Progress(
        TextColumn("     "), SpinnerColumn(), text, console=Console(stderr=True), auto_refresh=False, transient=True
    )


def now(running: Sequence[tuple[Work, float]]) -> str:
    """``lr=1e-5: train step 3/9, loss 1.2345; lr=1e-4: merge, 4 s``."""
    shown = [f"{safe(work.label)}{_how_far(work, began)}" for work, began in running[:MOST_SHOWN]]
    return "; ".join(shown) + (f"; and {len(running) - MOST_SHOWN} more" if len(running) > MOST_SHOWN else "")


def _how_far(work: Work, began: float) -> str:
    if work.is_share:
        return f", {duration(time.monotonic() - began)}"
    kind = next((kind for kind in work.kinds if not work.run.done(kind).exists()), work.kinds[-1])
    found = progress(work.run, kind)
    if found is None or found["step"] is None:
        return f": {kind}, {duration(time.monotonic() - began)}"
    steps = f": {kind} step {found['step']}" + (f"/{found['total_steps']}" if found["total_steps"] else "")
    return steps + (f", loss {found['loss']:.4f}" if found["loss"] is not None else "")


def met(work: Work) -> bool:
    """Whether the answers of a complete point are as expected. Not its whole status: a thousand are asked at once."""
    return all(row.get("passed") is not False for row in read_jsonl(work.run.answers))


def outcome(work: Work, seconds: float, code: int, words: str) -> Ended:
    """How it ended. ``code``, ``words``: the exit code of its process, and what that had to say."""
    found = status.read(work.run.path)
    jobs = [job for job in found.jobs if job.kind in work.kinds]
    # a process may be told to stop when all is done already
    if code == 0 or (jobs and all(job.state == "COMPLETED" for job in jobs)):
        loss = _loss(work.run) if "train" in work.kinds else None
        fact = "" if loss is None else f"; loss {loss:.4f}"
        evaluated = last(work.run, ("eval_loss",), True).get("eval_loss") if "train" in work.kinds else None
        fact += "" if evaluated is None else f", eval loss {evaluated:.4f}"
        unmet = "; passed NO" if found.passed is False else ""
        return Ended(f"COMPLETED in {duration(seconds)}{fact}{unmet}", True, found.passed)
    rest = sorted((job for job in jobs if job.state != "COMPLETED"), key=lambda job: job.state == "SKIPPED")
    if words or not rest or code not in (1, 130):
        return Ended(f"FAILED: {safe(words or f'its process ended with exit code {code}')}", False)
    kind = "" if work.is_share else f" {rest[0].kind}"
    return Ended(f"{rest[0].state}{kind}: {safe(rest[0].reason or 'no reason known')}", False)


def _loss(run: RunDir) -> float | None:
    """The last one logged; the mean where none was."""
    found = progress(run, "train") or {}
    mean = (read_json(run.result("train")) or {}).get("train_loss")
    return number(mean) if found.get("loss") is None else number(found["loss"])
