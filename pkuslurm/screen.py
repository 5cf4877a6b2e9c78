"""What a person sees while a run works here: job by job on stderr, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkuslurm.read.present import duration, safe
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.submit.terminal import PLAIN_SECONDS, Terminal

if TYPE_CHECKING:
    from rich.progress import Progress

_HOW_FAR = re.compile(r"[a-z]+ \d+/\d+")
WHAT = {
    "prepare": "make the model if asked, check and tokenize the data",
    "train": "fine-tune with LLaMA-Factory",
    "merge": "merge the adapter into the model, prove it tensor by tensor",
    "infer": "ask base and tuned model the same questions",
    "report": "write the report",
}


def _what(run: RunDir, kind: str) -> str:
    if kind == "merge" and not ((read_json(run.job(kind)) or {}).get("payload") or {}).get("adapter", True):
        return "copy the model, which has no adapter, and load the copy"
    return WHAT[kind]


class Screen:
    """A watcher of the local executor."""

    def __init__(self, run: RunDir, kinds: tuple[str, ...], told: Sequence[str] = ()) -> None:
        """``told``: what launch has warned of already."""
        self.run = run
        self.told = told
        self.kinds = kinds
        self.started_at = 0.0
        self.printed_at = 0.0
        self.live: Progress | None = None
        self.terminal = Terminal()

    def started(self, kind: str) -> None:
        self.started_at = self.printed_at = time.monotonic()
        self.terminal.show(lambda: self._begin(kind))

    def tick(self, kind: str) -> None:
        if self.live is not None:
            self.terminal.show(lambda: self._refresh(kind))
        elif time.monotonic() - self.printed_at > PLAIN_SECONDS:
            self.printed_at = time.monotonic()
            self.terminal.show(lambda: _say(f"      {kind}: {self._doing(kind)}"))

    def ended(self, kind: str, state: str, reason: str | None) -> None:
        self.terminal.show(lambda: self._finish(kind, state, reason))

    def _begin(self, kind: str) -> None:
        number = self.kinds.index(kind) + 1
        _say(f"[{number}/{len(self.kinds)}] {kind:<8} {_what(self.run, kind)}")
        if sys.stderr.isatty():
            self.live = _progress()
            self.live.add_task(kind, total=None, text="")
            self.live.start()

    def _refresh(self, kind: str) -> None:
        assert self.live is not None
        progress = read_json(self.run.progress(kind)) or {}
        task = self.live.task_ids[0]
        self.live.update(
            task, completed=progress.get("step", 0), total=progress.get("total_steps"), text=self._doing(kind)
        )
        if time.monotonic() - self.printed_at > 0.2:
            self.printed_at = time.monotonic()
            self.live.refresh()

    def _doing(self, kind: str) -> str:
        progress = read_json(self.run.progress(kind))
        if progress is None:
            took = duration(time.monotonic() - self.started_at)
            if kind == "prepare" and (made := _model_in_the_making(self.run)):
                return f"making the {safe(made)} model, once, about a minute; {took} so far"
            return f"{took}{_last_words(self.run, kind)}"
        loss = progress.get("loss")
        left = progress.get("eta_seconds")
        parts = [f"step {progress.get('step')}/{progress.get('total_steps')}"]
        parts += [f"loss {loss:.4f}"] if isinstance(loss, float | int) else []
        parts += [f"{duration(left)} left"] if isinstance(left, float | int) else []
        return ", ".join(parts)

    def _finish(self, kind: str, state: str, reason: str | None) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        seconds = duration(time.monotonic() - self.started_at)
        if state == "COMPLETED":
            _say(f"      {state} in {seconds}{_fact(kind, read_json(self.run.result(kind)) or {}, self.told)}")
        elif state == "SKIPPED":
            _say(f"[-] {kind}: SKIPPED, {safe(reason or '')}")
        else:
            _say(f"      {kind}: {state}: {safe(reason or 'no reason known')}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("     "),
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    # refreshed from our own loop: a terminal that goes away must raise there, not in a thread
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)


def _last_words(run: RunDir, kind: str) -> str:
    """What the payload said last, where it says how far it is (``base 16/96``)."""
    job = read_json(run.job(kind)) or {}
    log = run.log(kind, f"local-{job.get('first_attempt', 1)}", 0)
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 400))
            lines = stream.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    said = (line.strip() for line in reversed(lines))
    words = next((line for line in said if line), "")
    return f", {words}" if _HOW_FAR.fullmatch(words) else ""


def _model_in_the_making(run: RunDir) -> str | None:
    """The name of the model that prepare is to make (``tiny``), until it is there."""
    payload = (read_json(run.job("prepare")) or {}).get("payload") or {}
    there = Path(str(payload.get("model_path")), "config.json").is_file()  # put in place as a whole
    return None if there or not payload.get("make") else str(payload["make"])


def _many(count: object, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _rows(data: Mapping[str, Any]) -> str:
    blocks = data.get("blocks")
    if blocks is None:
        return f"{data.get('kept')} of {_many(data.get('rows'), 'row')}"
    packed = f"{_many(blocks, 'block')} of up to {data.get('block')} tokens"
    rows = data.get("rows")
    return packed if rows is None else f"{data.get('kept')} of {_many(rows, 'row')} packed into {packed}"


def _fact(kind: str, result: Mapping[str, Any], told: Sequence[str] = ()) -> str:
    """One line of what came out, from the job's result; of its warnings those that are not ``told`` already."""
    facts: list[str] = []
    if kind == "prepare" and "dataset" in result:
        data, steps = result["dataset"], result.get("steps") or {}
        unit = "block" if data.get("blocks") is not None else "row"
        facts.append(f"{_rows(data)}, {_many(data.get('tokens'), 'token')}")
        facts += (
            [f"{_many(steps['total'], 'step')} of {_many(steps.get('effective_batch'), unit)}"]
            if steps.get("total")
            else []
        )
        # once is enough
        facts += [
            str(warning) for warning in result.get("warnings", []) if not any(str(warning) in one for one in told)
        ]
    elif kind == "train" and "global_step" in result:
        loss = result.get("train_loss")
        facts.append(_many(result["global_step"], "step"))
        facts += [f"mean loss {loss:.4f}"] if isinstance(loss, float) else []
    elif kind == "merge" and "tensors" in result:
        whole = result.get("equal") is None  # a full fine-tune: nothing to merge
        facts.append(
            "a whole model already" if whole else f"{result['equal']} of {_many(result['tensors'], 'tensor')} proved"
        )
    elif kind == "infer" and "prompts" in result:
        passed = result.get("passed")
        facts.append(_many(result["prompts"], "question") + (f", {passed} passed" if passed is not None else ""))
    return "".join(f"; {safe(fact)}" for fact in facts)
