"""The rows as tokens, made by LLaMA-Factory: counted, and the first one shown as it will be trained."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from .files import refuse
from .shaping import shaping_args
from .steps import packed

# where a row's tokens are; a row of preferences has two answers
_IDS = ("input_ids", "chosen_input_ids", "rejected_input_ids")
# as LLaMA-Factory's own workflows name the rows' form to its loader
_STAGES = {"dpo": "rm"}
_SHOWN = 300


def tokenize(args: dict[str, Any], keys: frozenset[str], target: Path, scratch: Path) -> dict[str, Any]:
    """Let LLaMA-Factory tokenize into ``target``; returns counts. ``scratch`` takes its caches."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    # Its cache of intermediate tables is worth nothing afterwards. Relative, because its lock file has the whole path
    # in its *name*, and a name may have 255 bytes: some 70 Chinese characters.
    before = Path.cwd()
    os.chdir(scratch)
    datasets.config.HF_DATASETS_CACHE = "datasets"
    settings = shaping_args(args, keys)
    settings |= {name: args[name] for name in ("dataset_dir", "preprocessing_num_workers") if name in args}
    # never the whole train.yaml: what it says of devices, precision or DeepSpeed may be refused on this node
    settings |= {"tokenized_path": str(target), "output_dir": str(scratch / "output")}
    settings |= {"use_cpu": True, "report_to": "none", "do_train": True}
    try:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(settings)
        tokenizer = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
        stage = _STAGES.get(finetuning_args.stage, finetuning_args.stage)
        module = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer)
    except DatasetGenerationError as error:
        refuse(f"dataset: it cannot be made a table ({error.__cause__ or error}); do all rows have the same form?")
    except RuntimeError as error:
        if "Cannot find sufficient" in str(error):
            length = args.get("cutoff_len", 2048)
            refuse(
                f"train.cutoff_len={length}: all the text together is shorter than one block of so many tokens; "
                "lower it, or write train.packing=false"
            )
        if "Cannot find" in str(error):
            refuse("dataset: no row is left that can be trained on; see the log for what LLaMA-Factory dropped")
        raise
    finally:
        os.chdir(before)
    return _count(module, args) | {"first": _first(module.get("train_dataset"), tokenizer["tokenizer"])}


def _count(module: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    train = module.get("train_dataset")
    held_out = module.get("eval_dataset")
    parts = list(held_out.values()) if isinstance(held_out, dict) else [held_out] if held_out is not None else []
    lengths, largest = ([], -1) if train is None else _lengths(train)
    limit = args.get("cutoff_len", 2048)
    eval_rows = sum(len(part) for part in parts)
    return {
        "train_rows": len(lengths),
        "eval_rows": eval_rows,
        "kept": len(lengths) + (0 if args.get("eval_dataset") else eval_rows),
        "tokens": sum(lengths),
        "largest_id": largest,
        # a packed row is always full, which says nothing of what went into it
        "cut": None if packed(args) else sum(length >= limit for length in lengths),
    }


def _lengths(dataset: Any) -> tuple[list[int], int]:
    """Tokens of each row (of a pair of answers, the longer one), and the largest number of a token."""
    names = [name for name in _IDS if name in dataset.column_names]
    table = dataset.with_format(None)
    lengths, largest = [], -1
    for batch in table.select_columns(names).iter(batch_size=1000):
        lengths += [max(map(len, row)) for row in zip(*(batch[name] for name in names), strict=True)]
        largest = max([largest, *(max(row) for name in names for row in batch[name] if row)])
    return lengths, largest


def _first(dataset: Any, tokenizer: Any) -> list[str]:
    """The first row as it will be trained, a line for each answer: ⟦in brackets⟧ what is read but not learned."""
    lines = []
    row = {} if dataset is None or not len(dataset) else dataset.with_format(None)[0]
    for name in _IDS:
        if name in row:
            word = name.removesuffix("input_ids").rstrip("_")
            ids = row[name]
            labels = row.get(name.replace("input_ids", "labels"), ids)
            labels = labels if len(labels) == len(ids) else ids  # ppo's answers stand apart
            text = _marked(ids, labels, tokenizer).replace("\n", "\\n")
            lines.append(f"first row as trained{f' ({word})' if word else ''}: {text}")
    return lines


def _marked(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    parts = []
    for masked, group in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] == -100):
        text = str(tokenizer.decode([one for one, _ in group], skip_special_tokens=False))
        text = text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}"
        parts.append(f"⟦{text}⟧" if masked else text)
    return "".join(parts)
