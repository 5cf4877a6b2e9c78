"""How many steps a training takes, as the trainer will count them. Pure; launch and prepare say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FEW_STEPS = 30
# the trainer's own default
LOGGING_STEPS = 500


def steps(rows: int, args: Mapping[str, Any], ranks: int) -> dict[str, int]:
    """Optimizer steps for ``rows`` rows to train on: batches are dealt to the ranks, an odd one is filled up."""
    per_device = int(args.get("per_device_train_batch_size", 8))
    accumulation = int(args.get("gradient_accumulation_steps", 1))
    whole = math.floor if args.get("dataloader_drop_last") else math.ceil
    batches = whole(whole(rows / per_device) / ranks)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = int(args.get("max_steps", -1))
    if total <= 0:
        total = math.ceil(_epochs(args) * per_epoch)
    return {
        "rows": rows,
        "ranks": ranks,
        "per_device": per_device,
        "gradient_accumulation": accumulation,
        "effective_batch": ranks * per_device * accumulation,
        "per_epoch": per_epoch,
        "total": total,
    }


def train_rows(rows: int, args: Mapping[str, Any]) -> tuple[int, str]:
    """Of ``rows`` usable ones, those that are trained on, and in words what became of the others."""
    used, words = rows, []
    most = args.get("max_samples")
    if most and int(most) < rows:
        used = int(most)
        words.append(f"max_samples of {rows}")
    held = float(args.get("val_size") or 0)
    if held > 1e-6:
        # a share is rounded up, as datasets does
        out = min(int(held) if held > 1 else math.ceil(held * used), used)
        used -= out
        words.append(f"{out} of {used + out} are held out by val_size={args['val_size']}")
    return used, ", ".join(words)


def packed(args: Mapping[str, Any]) -> bool:
    """Whether rows are joined to blocks of cutoff_len, so that their number says nothing of the steps."""
    packing = args.get("packing")
    return bool(packing or args.get("neat_packing") or (packing is None and args.get("stage") == "pt"))


def step_lines(rows: int, train: Mapping[str, Any], nodes: int, nproc: int) -> tuple[list[str], list[str]]:
    """The arithmetic in one line for people, and warnings. ``rows``: those of the file that can be used."""
    used, words = train_rows(rows, train)
    if packed(train):
        length = train.get("cutoff_len", 2048)
        return [f"{count(used, 'row')}, packed to blocks of {length} tokens: prepare counts the steps"], []
    if used <= 0:
        return [], [f"no row is left to train on ({words})"]
    found = steps(used, train, nodes * nproc)
    return [arithmetic_line(found, train, nodes, nproc, words)], [*arithmetic_warnings(found), *unlogged(found, train)]


def count(number: float, word: str) -> str:
    """1 row, 2 rows."""
    return f"{number:g} {word}" if number == 1 else f"{number} {word}s"


def arithmetic_line(found: Mapping[str, int], args: Mapping[str, Any], nodes: int, nproc: int, words: str = "") -> str:
    """91 rows, 2 × 2 × 8 = 32 rows a step, 20 epochs = 60 steps."""
    factors = [str(nodes), str(nproc)]
    own = [value for value in (found["per_device"], found["gradient_accumulation"]) if value != 1]
    factors += [str(value) for value in own or [1]]
    rows = count(found["rows"], "row") + (f" ({words})" if words else "")
    line = f"{rows}, {' × '.join(factors)} = {count(found['effective_batch'], 'row')} a step"
    total = count(found["total"], "step")
    if int(args.get("max_steps", -1)) > 0:
        return f"{line}, max_steps = {total} ({_epochs_of(found['total'] / found['per_epoch'])})"
    return f"{line}, {_epochs_of(_epochs(args))} = {total}"


def _epochs_of(number: float) -> str:
    return count(number, "epoch") if number == 1 else f"{number:.3g} epochs"


def arithmetic_warnings(found: Mapping[str, int]) -> list[str]:
    """Where the numbers of ``steps`` promise little."""
    warnings = []
    if found["effective_batch"] > found["rows"]:
        warnings.append(
            f"one step takes {found['effective_batch']} rows and there {'is' if found['rows'] == 1 else 'are'} "
            f"{found['rows']}: "
            "lower train.gradient_accumulation_steps or train.per_device_train_batch_size"
        )
    if found["total"] < FEW_STEPS:
        warnings.append(
            f"{count(found['total'], 'step')} {'is' if found['total'] == 1 else 'are'} few to learn anything "
            f"(under {FEW_STEPS}): raise train.num_train_epochs, "
            "or lower train.gradient_accumulation_steps or train.per_device_train_batch_size"
        )
    return warnings


def unlogged(found: Mapping[str, int], args: Mapping[str, Any]) -> list[str]:
    """A warning where the training ends before it logs a loss for the first time."""
    if args.get("logging_strategy", "steps") != "steps" or args.get("logging_first_step"):
        return []
    every = float(args.get("logging_steps", LOGGING_STEPS))
    if every < 1 or every <= found["total"]:  # below 1 it is a share of all steps
        return []
    return [
        f"train.logging_steps is {every:g} and the run has {count(found['total'], 'step')}: no loss is logged and "
        "there will be no curve; train.logging_steps=1 logs each step"
    ]


def _epochs(args: Mapping[str, Any]) -> float:
    return float(args.get("num_train_epochs", 3.0))
