"""The merge: into a folder beside ``merged``, a proof of every tensor, then a rename.

Streamed where that is known to give the same bits (``stream_plan``), else by LLaMA-Factory's own export. ``merged`` is
never half there: until the rename it is what it was before. Where it lies outside of the run, the run gets a ``link``
to it. A full fine-tune has nothing to merge; its folder is linked.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .export import export, load
from .files import no_room, open_files, refuse, versions, write_json
from .merge_files import (
    MODEL_FILES,
    clean,
    has_template,
    link,
    proved,
    put_config,
    put_tokenizer,
    swap,
    tokenizer_files,
)
from .models import Unequal, check_adapter, check_base, free_memory, model_dtype, quiet, weight_files

# Keys that make the export something that the proof cannot follow.
_REFUSED = {
    "export_quantization_bit": "quantize the merged folder afterwards",
    "quantization_bit": "merge into the whole base",
    "export_hub_model_id": "upload the merged folder afterwards, when it is proved",
    "resize_vocab": "the merged folder keeps the base's vocabulary",
    "add_tokens": "the merged folder keeps the base's vocabulary",
    "add_special_tokens": "the merged folder keeps the base's vocabulary",
    "new_special_tokens_config": "the merged folder keeps the base's vocabulary",
    "use_unsloth": "leave it out of the merge",
}


def main(job: dict[str, Any]) -> None:
    """Make ``merged`` and results/merge.json. Exits 2 on what the user can mend, 1 if the proof fails."""
    payload = job["payload"]
    started = time.monotonic()
    args = _read_yaml(payload["yaml"])
    base = check_base("model_name_or_path", payload["base"])
    lora = args.get("finetuning_type", "lora") in ("lora", "oft")
    adapter = payload.get("adapter") or args.get("adapter_name_or_path")
    if lora:
        if not adapter:
            refuse(f"adapter_name_or_path in {payload['yaml']}: there is none; name the folder of the trained adapter")
        check_adapter("adapter_name_or_path", adapter)
        _refuse_keys(args)
    quiet()
    merged = Path(payload["merged"])
    link = Path(payload["link"]) if payload.get("link") else None
    if link is not None:
        _check_free(merged, link)
    clean(merged)
    temporary = Path(tempfile.mkdtemp(dir=merged.parent, prefix=f".{merged.name}.tmp-"))
    seconds: dict[str, float] = {"start": time.monotonic() - started}
    try:
        # mkdtemp makes 0700: follow the folder above, which may be shared with a group
        os.chmod(temporary, merged.parent.stat().st_mode & 0o777)
        trust = bool(args.get("trust_remote_code"))
        if lora:
            facts = _merge(args, base, Path(str(adapter)), temporary, trust, seconds)
        else:
            source = Path(adapter or args.get("model_name_or_path") or base)
            facts = _copy(source, base, temporary, trust, seconds)
        facts["bytes"] = open_files(temporary)
        if link is None:
            swap(temporary, merged)
        else:
            _check_free(merged, link)  # hours may have passed
            _swap_linked(temporary, merged, link)
    except Unequal as error:
        print(f"pkuslurm: merged: {error}; nothing was put in place", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rounded = {key: round(value, 2) for key, value in seconds.items()}
    write_json(payload["result"], {"seconds": rounded, "versions": versions()} | facts)


def _check_free(merged: Path, link: Path) -> None:
    """A folder that is not the run's own is written to once: what lies there is ours only where the run's link is."""
    if not _links(link, merged) and merged.exists() and any(merged.iterdir()):
        refuse(f"merge.export_dir={merged}: it is not empty, and nothing is overwritten; name a new folder")


def _links(link: Path, merged: Path) -> bool:
    return link.is_symlink() and link.readlink() == merged


def _swap_linked(temporary: Path, merged: Path, link: Path) -> None:
    """The link comes first: killed after the swap without it, what lies there would be taken for somebody else's."""
    before = link.readlink() if link.is_symlink() else None
    _link(link, merged)
    try:
        swap(temporary, merged)
    except BaseException:
        _link(link, before)
        raise


def _link(link: Path, target: Path | None) -> None:
    if link.is_symlink():
        link.unlink()
    if target is not None:
        link.symlink_to(target)


def _merge(
    args: dict[str, Any], base: Path, adapter: Path, folder: Path, trust: bool, seconds: dict[str, float]
) -> dict[str, Any]:
    from .shares import Failed
    from .stream_plan import NotStreamable

    try:
        return _stream(args, base, adapter, folder, trust, seconds)
    except (NotStreamable, Failed, Unequal, OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if no_room(error):
            raise  # nor would there be for the export
        why = " ".join(str(error).split()) or type(error).__name__
    print(f"pkuslurm: merge: by LLaMA-Factory's export, not streamed: {why}", file=sys.stderr, flush=True)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    seconds.pop("stream", None), seconds.pop("proof", None)
    return export(args, base, adapter, folder, trust, seconds) | {"not_streamed": why}


def _stream(
    args: dict[str, Any], base: Path, adapter: Path, folder: Path, trust: bool, seconds: dict[str, float]
) -> dict[str, Any]:
    """Base + adapter without torch. Raises NotStreamable and, if the proof fails, Unequal."""
    from .stream_plan import plan

    mark = time.monotonic()
    planned = plan(args, base, adapter)
    from . import stream, stream_proof

    stream.stream(planned, folder)
    for name in ("config.json", "model.safetensors.index.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if not has_template(base):
        stream_template(args, base, folder, trust)
    chat_template = put_tokenizer(base, folder)
    seconds["stream"], mark = time.monotonic() - mark, time.monotonic()
    proof = stream_proof.prove(planned, folder, lambda: stream.sync(planned, folder))
    seconds["proof"] = time.monotonic() - mark
    print(f"pkuslurm: merge: streamed, {proof.tensors} tensors, {len(planned.changes)} of them changed", flush=True)
    return {
        **proved(proof, base),
        "chat_template": chat_template,
        "config": "base",
        "export_device": "cpu",
        "way": "stream",
    }


def stream_template(args: dict[str, Any], base: Path, folder: Path, trust: bool) -> None:
    """The base has no chat template: put that of LLaMA-Factory's template there, as its export does."""
    from .stream_plan import NotStreamable

    try:
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust, split_special_tokens=False)
        get_template_and_fix_tokenizer(tokenizer, DataArguments(template=args["template"]))
    except Exception as error:  # whatever it is, the export may know better
        raise NotStreamable(f"the base has no chat template, and: {error}") from None
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
    elif tokenizer.chat_template:
        raise NotStreamable("the chat template is several")


def _copy(source: Path, base: Path, folder: Path, trust: bool, seconds: dict[str, float]) -> dict[str, Any]:
    """A full fine-tune is a model already: its weights are linked, and it must load."""
    check_base("model_name_or_path", str(source))
    weights = weight_files(source)
    if not weights or any(not file.is_file() for file in weights):
        refuse(f"model_name_or_path {source}: no whole safetensors weights are there; train again")
    mark = time.monotonic()
    for file in weights:
        link(file, folder / file.name)
    for pattern in (*MODEL_FILES, "model.safetensors.index.json"):
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    chat_template = put_tokenizer(base, folder)
    config = put_config(base, folder, trust)
    seconds["copy"], mark = time.monotonic() - mark, time.monotonic()
    tensors = len(load(folder, trust).state_dict())
    free_memory()
    seconds["load"] = time.monotonic() - mark
    return {
        "mode": "copy",
        "tensors": tensors,
        "equal": None,
        "max_abs_diff": None,
        "dtype": model_dtype(folder),
        "tokenizer_files": [file.name for file in tokenizer_files(base)],
        "chat_template": chat_template,
        "config": config,
    }


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        args = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        refuse(f"merge.yaml {path}: cannot be read: {error}; start the run again")
    if not isinstance(args, dict):
        refuse(f"merge.yaml {path}: wanted keys and values; start the run again")
    return args


def _refuse_keys(args: dict[str, Any]) -> None:
    for key, remedy in _REFUSED.items():
        if args.get(key):
            refuse(f"{key} {args[key]}: a merge with it cannot be proved; {remedy}")
