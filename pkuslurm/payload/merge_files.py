"""What is in a merged folder beside its weights, and how the folder comes to its place."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .models import Proof, model_dtype

# What transformers 5 writes of a tokenizer does not load in 4.57, so these come from the base, byte for byte.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tokenization*.py",
    "chat_template*",
    "generation_config.json",
)
# The files of a model in a trainer's output folder, among checkpoints, optimizer states and curves.
MODEL_FILES = ("config.json", "*preprocessor_config.json", "processor_config.json", "*.py")
# What may differ between two config.json that describe the same model.
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


def proved(proof: Proof, base: Path) -> dict[str, Any]:
    """What results/merge.json says of a merge, whichever way it went."""
    return {"mode": "merge", **asdict(proof), "tokenizer_files": [file.name for file in tokenizer_files(base)]}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that make its tokenizer, its chat template and its generation settings."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def has_template(base: Path) -> bool:
    """Whether the tokenizer in ``base`` brings a chat template."""
    config = base / "tokenizer_config.json"
    inside = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return bool(inside) or any(base.glob("chat_template*"))


def put_tokenizer(base: Path, folder: Path) -> str | None:
    """Replace the tokenizer in ``folder`` by the base's. Returns whose chat template is there: ``base``; ``template``
    if the base has none and LLaMA-Factory wrote that of the training's template; or None."""
    has_own = has_template(base)
    kept = folder / "chat_template.jinja"
    for file in tokenizer_files(folder):
        if has_own or file != kept:
            file.unlink()
    # named templates beside the main one are a folder
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    for file in tokenizer_files(base):
        shutil.copyfile(file, folder / file.name)
    if (base / "additional_chat_templates").is_dir():
        shutil.copytree(base / "additional_chat_templates", folder / "additional_chat_templates")
    if has_own:
        return "base"
    return "template" if kept.is_file() else None


def put_config(base: Path, folder: Path, trust: bool) -> str:
    """Replace config.json in ``folder`` by the base's, if transformers reads both alike; ``folder``'s dtype stays.

    Transformers 5 writes rope_theta where 4.57 does not look: 4.57 would take its default and answer nonsense, without
    a word. Returns whose config is there, ``base`` or ``export``."""
    from transformers import AutoConfig

    one, other = (AutoConfig.from_pretrained(place, trust_remote_code=trust).to_dict() for place in (base, folder))
    for key in _CONFIG_NOISE:
        one.pop(key, None), other.pop(key, None)
    if one != other:
        return "export"
    dtype = model_dtype(folder)
    if model_dtype(base) == dtype:
        shutil.copyfile(base / "config.json", folder / "config.json")
        return "base"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return "base"


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def clean(merged: Path) -> None:
    """Remove what a killed merge left; a folder that it had only moved aside comes back."""
    merged.parent.mkdir(parents=True, exist_ok=True)
    for old in merged.parent.glob(f".{merged.name}.old-*"):
        if not merged.exists():
            old.rename(merged)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for left in merged.parent.glob(f".{merged.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def swap(temporary: Path, merged: Path) -> None:
    """Put ``temporary`` in the place of ``merged``. Raises OSError, and then ``merged`` is as before."""
    old = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
    existed = merged.exists()
    if existed:
        merged.rename(old)
    try:
        temporary.rename(merged)
    except BaseException:
        if existed:
            with suppress(OSError):
                old.rename(merged)
        raise
    if existed:
        shutil.rmtree(old, ignore_errors=True)
