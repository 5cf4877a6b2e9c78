"""One rank of the training: LLaMA-Factory's own trainer, with callbacks that report, and that stop when asked.

What LLaMA-Factory computes is not touched: ``llamafactory-cli train train.yaml`` by hand gives the same losses.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .files import is_shared, open_files, read_json, refuse, versions, write_json

# what a stop on request ends with: neither done nor failed
STOPPED = 75
# for the decision of node 0's worker to be seen over a shared file system
DECIDED_SECONDS = 120.0


class Stopped(BaseException):
    """The training was asked to stop and has saved a checkpoint. No Exception: nobody's handler must swallow it."""


class Progress:
    """The progress file, written by rank 0 at most once in ``interval`` seconds, and at the first and last step."""

    def __init__(self, path: Path, interval: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.interval = interval
        self.clock = clock
        self.loss: float | None = None
        self.written = -1
        self._last = -float("inf")
        self._start: tuple[float, int] | None = None
        self._phase: str | None = None
        self.attempt = int(os.environ.get("PKUSLURM_ATTEMPT", "1"))

    def begin(self, step: int) -> None:
        """``step`` is where this process starts: 0, or where a checkpoint ended."""
        self._start = (self.clock(), step)

    def step(self, step: int, total: int) -> None:
        """After each step; ``step`` and ``total`` count optimizer steps."""
        now = self.clock()
        first = self._start is None or self.written < 0
        back, self._phase = self._phase is not None, None
        if first or back or step >= total or now - self._last >= self.interval:
            self._write(step, total, now)

    def enter(self, phase: str, step: int, total: int) -> None:
        """From here to the next step it evaluates or saves: however long that takes, it does not hang."""
        self._phase = phase
        self._write(step, total, self.clock())

    def end(self, step: int, total: int) -> None:
        """After the last step, with the loss that was logged for it; what follows takes its time."""
        self._phase = "ending"
        self._write(step, total, self.clock())

    def _write(self, step: int, total: int, now: float) -> None:
        eta = None
        if self._start is not None and step > self._start[1]:
            rate = (now - self._start[0]) / (step - self._start[1])
            eta = round(max(total - step, 0) * rate, 1)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        value = {"step": step, "total_steps": total, "loss": self.loss, "eta_seconds": eta}
        try:
            write_json(
                self.path, value | {"phase": self._phase, "attempt": self.attempt, "time": f"{stamp[:-2]}:{stamp[-2:]}"}
            )
        except OSError as error:
            # a full disk will stop the training by itself; a missing progress line must not
            print(f"progress not written: {error}", file=sys.stderr)
        self.written, self._last = step, now


class Vote:
    """Whether all ranks stop now: the largest of the ranks' wishes, asked at one step and read at the next.

    All ranks thereby stop at the same step although each sees the request at another moment, and no rank waits.
    ``start(wish)`` begins a vote and returns a function that ends it and gives the result.
    """

    def __init__(self, wished: Callable[[], bool], start: Callable[[bool], Callable[[], bool]]) -> None:
        self.wished = wished
        self.start = start
        self._pending: Callable[[], bool] | None = None

    def step(self) -> bool:
        """Called once a step by every rank; True on all ranks at the same step."""
        decided = self._pending() if self._pending else False
        self._pending = None if decided else self.start(self.wished())
        return decided

    def close(self) -> None:
        """Take the last vote's answer, so that no rank leaves another one waiting."""
        if self._pending:
            self._pending()
        self._pending = None


def alone(wish: bool) -> Callable[[], bool]:
    """The vote of a single rank."""
    return lambda: wish


def together(group: Any) -> Callable[[bool], Callable[[], bool]]:
    """The vote of all ranks, over ``group``, a gloo process group: on CPU, whatever the trainer computes on."""
    import torch
    import torch.distributed as dist

    def start(wish: bool) -> Callable[[], bool]:
        value = torch.tensor([int(wish)], dtype=torch.int32)
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group, async_op=True)

        def finish() -> bool:
            work.wait()
            return bool(value.item())

        return finish

    return start


def main(job: dict[str, Any]) -> None:
    """Train, as one of the ranks that torchrun started. Raises SystemExit(75) after a stop on request; every other
    end but success leaves a failure file and exit code 1."""
    rank = int(os.environ.get("RANK", "0"))
    payload = job["payload"]
    if not Path(payload["yaml"]).is_file():
        refuse(f"train {payload['yaml']}: there is no such file; start the run again")
    try:
        _train(payload, rank, Path(job["expect"]["dir"]))
    except Stopped:
        _leave_together()
        raise SystemExit(STOPPED) from None
    except Exception as error:
        _fail(job, rank, error)


def _train(payload: dict[str, Any], rank: int, folder: Path) -> None:
    started = time.monotonic()
    if not sys.stderr.isatty():
        # bars are for terminals; the losses are still printed, a line each
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from llamafactory.train.tuner import run_exp

    # torch can read a checkpoint of "cpu" but not, on a CPU, what LLaMA-Factory's resume asks for, "cpu:0"
    torch.serialization.register_package(
        5, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    imported = time.monotonic()
    # LLaMA-Factory reads the YAML itself, as its own command does: no second reading that could differ
    sys.argv = ["llamafactory-cli", payload["yaml"], *_going_on(payload)]
    ended: dict[str, Any] = {}
    run_exp(callbacks=[_callback(payload, rank, ended)])
    if rank == 0:
        if is_shared(folder.stat().st_mode):
            open_files(folder)
        seconds = {"import": imported - started, "train": time.monotonic() - imported}
        write_json(
            payload["result"],
            {"seconds": {key: round(value, 2) for key, value in seconds.items()}, "versions": versions()}
            | {"ranks": int(os.environ.get("WORLD_SIZE", "1"))}
            | ended,
        )


def _going_on(payload: dict[str, Any]) -> list[str]:
    """The checkpoint that node 0's worker has chosen, as LLaMA-Factory's argument; none: from the first step."""
    if "start" not in payload:
        return []  # a job by hand: its YAML says what it wants
    attempt, deadline = int(os.environ["PKUSLURM_ATTEMPT"]), time.monotonic() + DECIDED_SECONDS
    while True:
        value = read_json(payload["start"])
        if value and value.get("attempt") == attempt and value.get("decided"):
            break
        if (value and value.get("attempt", 0) > attempt) or time.monotonic() > deadline:
            raise RuntimeError(f"{payload['start']}: it says nothing of attempt {attempt}")
        time.sleep(0.2)
    chosen = value.get("checkpoint")
    # as YAML: a path may hold ": " or "#"
    return [f"resume_from_checkpoint={json.dumps(chosen, ensure_ascii=False)}"] if chosen else []


def _callback(payload: dict[str, Any], rank: int, ended: dict[str, Any]) -> Any:
    """The trainer's callback: progress on rank 0, the vote on every rank; fills ``ended`` at a regular end."""
    import torch.distributed as dist
    from transformers import TrainerCallback

    progress = Progress(Path(payload["progress"]))
    stop_file = Path(payload["stop_file"])

    def announce(control: Any, state: Any) -> None:
        # the trainer's own callback, which is asked before this one, has decided what comes next
        if rank == 0 and (control.should_save or control.should_evaluate):
            phase = "evaluating" if control.should_evaluate else "saving"
            progress.enter(phase, state.global_step, state.max_steps)

    class Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        vote: Vote
        stopped = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            start: Callable[[bool], Callable[[], bool]] = alone
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                from datetime import timedelta

                wait = timedelta(seconds=args.ddp_timeout)
                start = together(dist.new_group(backend="gloo", timeout=wait))
            self.vote = Vote(stop_file.exists, start)
            progress.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 0:
                progress.step(state.global_step, state.max_steps)
            # after the last step there is nothing to stop
            if self.vote.step() and state.global_step < state.max_steps:
                self.stopped = True
                # without the optimizer a resumed training would start its schedule anew, silently
                args.save_only_model = False
                control.should_save = control.should_training_stop = True
            announce(control, state)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce(control, state)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and isinstance(logs.get("loss"), int | float):
                progress.loss = float(logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.vote.close()
            if rank == 0:
                progress.end(state.global_step, state.max_steps)
            if self.stopped:
                # LLaMA-Factory would go on and write a model that looks finished
                raise Stopped
            ended.update(global_step=state.global_step, max_steps=state.max_steps)
            losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
            ended["train_loss"] = losses[-1] if losses else None

    return Callback()


def _leave_together() -> None:
    """No rank goes before rank 0 has its checkpoint whole: the launcher would kill the others."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _fail(job: dict[str, Any], rank: int, error: Exception) -> NoReturn:
    text = traceback.format_exc()
    attempt = os.environ.get("PKUSLURM_ATTEMPT", str(job.get("first_attempt", 1)))
    value = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "log": text[-8000:],
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    }
    try:
        write_json(Path(job["payload"]["failures"]) / f"{job['kind']}-{attempt}-{rank}.json", value)
    except OSError as second:
        print(f"the failure file was not written: {second}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.write("".join(f"[rank{rank}]: {line}\n" for line in text.splitlines()))
    sys.stderr.flush()
    # not by sys.exit: a collective that others never join can block the libraries' clean-up for minutes
    os._exit(1)
