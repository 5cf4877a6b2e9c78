"""The merge: LLaMA-Factory's own export into a folder beside ``merged``, a proof of every tensor, then a rename.

``merged`` is never half there: until the rename it is what it was before. A full fine-tune has nothing to merge; its
folder is linked.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import open_files, refuse, versions, write_json
from .models import (
    Proof,
    Unequal,
    check_adapter,
    check_base,
    free_memory,
    has_accelerator,
    load_model,
    load_whole,
    model_dtype,
    prove,
    prove_loaded,
    quiet,
    read_header,
    weight_files,
)

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
        swap(temporary, merged)
    except Unequal as error:
        print(f"pkuslurm: merged: {error}; nothing was put in place", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rounded = {key: round(value, 2) for key, value in seconds.items()}
    write_json(payload["result"], {"seconds": rounded, "versions": versions()} | facts)


def _merge(
    args: dict[str, Any], base: Path, adapter: Path, folder: Path, trust: bool, seconds: dict[str, float]
) -> dict[str, Any]:
    _refuse_tied(base, adapter)
    mark = time.monotonic()
    import transformers
    from llamafactory.train.tuner import export_model

    seconds["import"], mark = time.monotonic() - mark, time.monotonic()
    args = export_args(args, base, adapter, folder, has_accelerator())
    export_model(args)
    # LLaMA-Factory has made transformers print every config that it reads
    transformers.logging.set_verbosity_warning()
    free_memory()
    seconds["export"], mark = time.monotonic() - mark, time.monotonic()
    chat_template = put_tokenizer(base, folder)
    config = put_config(base, folder, trust)
    proof = _prove(base, adapter, folder, args["export_device"], trust)
    free_memory()
    seconds["proof"], mark = time.monotonic() - mark, time.monotonic()
    _load(folder, trust)
    free_memory()
    seconds["load"] = time.monotonic() - mark
    return {
        "mode": "merge",
        "tensors": proof.tensors,
        "equal": proof.equal,
        "max_abs_diff": proof.max_abs_diff,
        "dtype": proof.dtype,
        "tokenizer_files": [file.name for file in tokenizer_files(base)],
        "chat_template": chat_template,
        "config": config,
        "export_device": args["export_device"],
    }


def export_args(args: dict[str, Any], base: Path, adapter: Path, folder: Path, accelerator: bool) -> dict[str, Any]:
    """LLaMA-Factory's arguments for an export of ``base`` and ``adapter`` into ``folder``."""
    given = args | {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "export_dir": str(folder)}
    # the proof reads safetensors, and nobody should have to read pickles
    given["export_legacy_format"] = False
    if not accelerator:
        # "auto" would place by free memory, with nothing to place on
        given["export_device"] = "cpu"
    given.setdefault("export_device", "cpu")
    if given["export_device"] == "cpu" and given.get("infer_dtype", "auto") == "auto":
        # left alone, LLaMA-Factory makes an fp32 model bf16 where it sees an accelerator, even for an export on CPU
        dtype = model_dtype(base)
        given["infer_dtype"] = dtype if dtype in ("float16", "bfloat16", "float32") else "auto"
    return given


def _prove(base: Path, adapter: Path, folder: Path, device: str, trust: bool) -> Proof:
    """The merge once more, by PEFT alone, against the files: same dtype, same device, so no rounding can differ."""
    from peft import PeftModel

    model = load_model(base, "auto", trust, device_map="cpu" if device == "cpu" else "auto")
    model = PeftModel.from_pretrained(model, adapter)
    _all_used(model, adapter)
    model = model.merge_and_unload()
    expected = model.state_dict()
    if any(tensor.device.type == "meta" for tensor in expected.values()):
        refuse(f"export_device {device}: the model does not fit the accelerator; set export_device: cpu")
    try:
        return prove(expected, folder)
    except Unequal as error:
        if not error.names:
            raise
        reason = str(error)
    try:
        return prove_loaded(expected, folder, trust)
    except Unequal as error:
        raise Unequal(reason if error.names else str(error)) from None


def _all_used(model: Any, adapter: Path) -> None:
    """Every tensor of the adapter's file is in the model and no other is: PEFT only warns. Raises Unequal."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    known = model.state_dict()
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as stream:
        names = set(stream.keys())
        for name in sorted(names):
            inside = loaded.get(name, known.get(name))
            if inside is None:
                raise Unequal(f"adapter tensor {name} is not used: the base has no place for it")
            if not torch.equal(inside.cpu(), stream.get_tensor(name).to(inside.dtype)):
                raise Unequal(f"adapter tensor {name} is not what the model has loaded")
    for name in sorted(loaded.keys() - names):
        raise Unequal(f"adapter tensor {name} is missing from {adapter}")


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
    tensors = len(_load(folder, trust).state_dict())
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


def _load(folder: Path, trust: bool) -> Any:
    """What a user will do with the folder. Raises Unequal if the model comes out incomplete."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    return load_whole(folder, trust)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that make its tokenizer, its chat template and its generation settings."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def put_tokenizer(base: Path, folder: Path) -> str | None:
    """Replace the tokenizer in ``folder`` by the base's. Returns whose chat template is there: ``base``; ``template``
    if the base has none and LLaMA-Factory wrote that of the training's template; or None."""
    config = base / "tokenizer_config.json"
    inside = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    has_own = bool(inside) or any(base.glob("chat_template*"))
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


def _refuse_tied(base: Path, adapter: Path) -> None:
    """One tensor in memory cannot be two different ones in the file: a merge would change the other end as well."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    if tied is None:
        # the file need not say it: then the model's class does
        from transformers import AutoConfig

        loaded = AutoConfig.from_pretrained(base, trust_remote_code=False) if "auto_map" not in config else None
        tied = getattr(loaded, "tie_word_embeddings", False)
    if not tied:
        return
    for name in read_header(adapter / "adapter_model.safetensors"):
        if {"lm_head", "embed_tokens", "wte"} & set(name.split(".")):
            refuse(
                f"adapter_name_or_path {adapter}: it changes {name}, which this base shares between its input and its"
                " output, and a merged folder cannot hold both; train without it in lora_target and additional_target"
            )
