"""The first job: the tiny model if it is wanted, the data checked, and tokenized once for all ranks and runs."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import tiny_model
from .files import hash_file, hash_tree, install, refuse, sweep, versions, write_json
from .rows import BadData, Checked, check

# of the model's arguments, those that shape a tokenizer or a processor
_TOKENIZER_KEYS = (
    "model_name_or_path",
    "trust_remote_code",
    "use_fast_tokenizer",
    "split_special_tokens",
    "add_tokens",
    "add_special_tokens",
    "new_special_tokens_config",
    "use_audio_in_video",
    "crop_to_patches",
)
_PROCESSOR_PREFIXES = ("image_", "video_", "audio_")
_TRAINING_KEYS = ("stage", "seed", "do_train", "do_eval", "do_predict", "predict_with_generate")
# data keys without influence on the rows (or, tokenized_path and streaming, ours to decide)
_IDLE_KEYS = {
    "dataset_dir",
    "tokenized_path",
    "overwrite_cache",
    "preprocessing_num_workers",
    "data_shared_file_system",
    "streaming",
    "buffer_size",
}
# what a tokenizer is made of; weights are not
_TOKENIZER_FILES = (
    "*tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "config.json",
    "*.py",
)


def main(job: dict[str, Any]) -> None:
    """Fill data_dir, write results/prepare.json. Raises SystemExit(2), in words, where the data cannot be used."""
    payload = job["payload"]
    args: dict[str, Any] = payload["train_args"]
    seconds: dict[str, float] = {}
    model, seconds["model"] = _timed(lambda: _model(payload))
    try:
        checked, seconds["check"] = _timed(lambda: _check(payload, args))
    except BadData as error:
        refuse(f"dataset.path={error}")
    for warning in checked.warnings:
        print(f"pkuslurm: warning: {warning}", file=sys.stderr, flush=True)
    keys = data_keys()
    key = cache_key(args, keys)
    folder = Path(payload["cache_root"]) / "tokenized" / key
    cached = _facts(folder) is not None
    if not cached:
        _, seconds["tokenize"] = _timed(lambda: _tokenize_into(folder, args, keys, checked))
    facts = _facts(folder)
    if facts is None:
        raise RuntimeError(f"{folder}: the tokenized data disappeared while it was being used")
    _, seconds["link"] = _timed(lambda: publish(folder / "data", Path(payload["data_dir"])))
    steps = step_arithmetic(facts["train_rows"], args, payload["ranks"])
    warnings = checked.warnings + _warnings(facts, steps, args)
    result = {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": versions(),
        "model": model | {"seconds": round(seconds["model"], 2)},
        "dataset": {
            "file": payload["dataset_file"],
            "formatting": checked.formatting,
            "rows": checked.rows if checked.rows is not None else facts["rows"],
            "kept": facts["kept"],
            "dropped": sum(checked.dropped.values()),
            "reasons": dict(checked.dropped),
            "train_rows": facts["train_rows"],
            "eval_rows": facts["eval_rows"],
            "tokens": facts["tokens"],
            "cut": facts["cut"],
            "cached": cached,
            "key": key,
        },
        "steps": steps,
        "warnings": warnings,
    }
    write_json(payload["result"], result)


def _timed(work: Any) -> tuple[Any, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


def _model(payload: dict[str, Any]) -> dict[str, Any]:
    path = Path(payload["model_path"])
    made = False
    if payload["make"] == "tiny":
        made = tiny_model.ensure(path)
    elif payload["make"]:
        refuse(f"model.make={payload['make']}: only tiny can be made")
    if not (path / "config.json").is_file():
        refuse(f"model.path={path}: there is no model (no config.json); give a folder that holds one")
    return {"path": str(path), "made": made}


def _entries(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """dataset_info.json's entries of the datasets that ``args`` name. Refuses where it lacks one."""
    info = Path(args["dataset_dir"]) / "dataset_info.json"
    names: list[str] = []
    for key in ("dataset", "eval_dataset"):
        value = args.get(key) or []
        names += [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    try:
        known = json.loads(info.read_text(encoding="utf-8"))
        return {name: known[name] for name in names}
    except (OSError, ValueError) as error:
        refuse(f"dataset: {info} cannot be read ({error})")
    except KeyError as error:
        refuse(f"dataset={error.args[0]}: {info} does not describe it; it has {', '.join(known)}")


def _check(payload: dict[str, Any], args: dict[str, Any]) -> Checked:
    first = next(iter(_entries(args).values()), {})
    formatting = payload["formatting"]
    if formatting == "auto" and "formatting" in first:
        formatting = first["formatting"]
    return check(payload["dataset_file"], formatting, first, args.get("stage", "sft"), args.get("max_samples"))


def data_keys() -> frozenset[str]:
    """The names of the installed LLaMA-Factory's data arguments, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("llamafactory")
    if spec is None or not spec.submodule_search_locations:
        refuse(
            f"cluster.python={sys.executable}: it has no LLaMA-Factory; name one that has (pip install llamafactory)"
        )
    source = Path(next(iter(spec.submodule_search_locations))) / "hparams" / "data_args.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "DataArguments"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def shaping_args(args: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Of a train.yaml's arguments, those that shape the rows; ``keys`` are LLaMA-Factory's data arguments."""
    return {
        name: value
        for name, value in args.items()
        if (name in keys and name not in _IDLE_KEYS)
        or name in _TOKENIZER_KEYS
        or name in _TRAINING_KEYS
        or name.startswith(_PROCESSOR_PREFIXES)
    }


def cache_key(args: dict[str, Any], keys: frozenset[str]) -> str:
    """A name for all that shapes the rows: settings, the data's and the tokenizer's contents, versions.

    LLaMA-Factory itself takes whatever lies in tokenized_path, also what was made with another template.
    """
    shaping = shaping_args(args, keys)
    # by contents, not by place: a copied model or file gives the same rows
    shaping.pop("model_name_or_path", None)
    sources = {}
    for name, entry in _entries(args).items():
        content = None
        if "file_name" in entry:
            path = Path(args["dataset_dir"]) / entry["file_name"]
            try:
                content = hash_tree(path) if path.is_dir() else hash_file(path)
            except OSError as error:
                refuse(f"dataset={name}: {path} cannot be read ({error.strerror})")
        rest = {key: value for key, value in entry.items() if key != "file_name"}
        sources[name] = [content, Path(entry.get("file_name", "")).suffix, rest]
    model = Path(args["model_name_or_path"])
    files = sorted({file for pattern in _TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()})
    known = versions()
    whole = {
        "form": 1,
        "args": shaping,
        "data": sources,
        "tokenizer": {file.name: hash_file(file) for file in files},
        "versions": {name: known.get(name) for name in ("llamafactory", "transformers", "tokenizers", "datasets")},
    }
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _facts(folder: Path) -> dict[str, Any] | None:
    """What is known of a cached folder; None where it is not whole (facts.json is written last)."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        whole = all((folder / "data" / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def _tokenize_into(folder: Path, args: dict[str, Any], keys: frozenset[str], checked: Checked) -> None:
    """Make the cached ``folder``; two at once are safe, the first to rename wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new = work / "new"
        new.mkdir()
        facts = tokenize(args, keys, new / "data", work)
        facts["files"] = {
            file.relative_to(new / "data").as_posix(): file.stat().st_size
            for file in (new / "data").rglob("*")
            if file.is_file()
        }
        facts["rows"] = facts["kept"] if checked.rows is None else checked.rows
        write_json(new / "facts.json", facts)
        install(new, folder, lambda: _facts(folder) is not None)
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
        module = get_dataset(template, model_args, data_args, training_args, stage=finetuning_args.stage, **tokenizer)
    except DatasetGenerationError as error:
        refuse(f"dataset: it cannot be made a table ({error.__cause__ or error}); do all rows have the same form?")
    except RuntimeError as error:
        if "Cannot find" in str(error):
            refuse("dataset: no row is left that can be trained on; see the log for what LLaMA-Factory dropped")
        raise
    finally:
        os.chdir(before)
    return _count(module, args)


def _count(module: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    train = module.get("train_dataset")
    held_out = module.get("eval_dataset")
    parts = list(held_out.values()) if isinstance(held_out, dict) else [held_out] if held_out is not None else []
    lengths = [] if train is None else _lengths(train)
    packed = bool(args.get("packing") or args.get("neat_packing") or args.get("stage") == "pt")
    limit = args.get("cutoff_len", 2048)
    eval_rows = sum(len(part) for part in parts)
    return {
        "train_rows": len(lengths),
        "eval_rows": eval_rows,
        "kept": len(lengths) + (0 if args.get("eval_dataset") else eval_rows),
        "tokens": sum(lengths),
        # a packed row is always full, which says nothing of what went into it
        "cut": None if packed else sum(length >= limit for length in lengths),
    }


def _lengths(dataset: Any) -> list[int]:
    """Tokens of each row; of a pair of answers, the longer one."""
    names = [name for name in ("input_ids", "chosen_input_ids", "rejected_input_ids") if name in dataset.column_names]
    table = dataset.with_format(None)
    return [
        max(len(batch[name][row]) for name in names)
        for batch in table.select_columns(names).iter(batch_size=1000)
        for row in range(len(batch[names[0]]))
    ]


def publish(source: Path, target: Path) -> None:
    """``target`` becomes a copy of the tree ``source``, by hard links where both lie on one file system.

    Built beside it and renamed. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        new = work / "new"
        shutil.copytree(source, new, copy_function=_link)
        if target.exists():
            target.rename(work / "old")
        new.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def step_arithmetic(rows: int, args: dict[str, Any], ranks: int) -> dict[str, int]:
    """Optimizer steps as the trainer will count them: batches are dealt to the ranks, an odd one is filled up."""
    per_device = int(args.get("per_device_train_batch_size", 8))
    accumulation = int(args.get("gradient_accumulation_steps", 1))
    whole = math.floor if args.get("dataloader_drop_last") else math.ceil
    batches = whole(whole(rows / per_device) / ranks)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = int(args.get("max_steps", -1))
    if total <= 0:
        total = math.ceil(float(args.get("num_train_epochs", 3.0)) * per_epoch)
    return {
        "rows": rows,
        "ranks": ranks,
        "per_device": per_device,
        "gradient_accumulation": accumulation,
        "effective_batch": ranks * per_device * accumulation,
        "per_epoch": per_epoch,
        "total": total,
    }


def _warnings(facts: dict[str, Any], steps: dict[str, int], args: dict[str, Any]) -> list[str]:
    found = []
    if facts["cut"]:
        limit = args.get("cutoff_len", 2048)
        found.append(f"{facts['cut']} of {facts['train_rows']} rows reach cutoff_len={limit} and are cut there")
    if steps["effective_batch"] > steps["rows"]:
        found.append(
            f"one step takes {steps['effective_batch']} rows and there are {steps['rows']}: "
            "lower train.gradient_accumulation_steps or train.per_device_train_batch_size"
        )
    return found
