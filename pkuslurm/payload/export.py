"""The merge by LLaMA-Factory's own export, and its proof: the same merge by PEFT alone, in memory, tensor by tensor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .files import refuse
from .merge_files import proved, put_config, put_tokenizer
from .models import (
    Proof,
    Unequal,
    free_memory,
    has_accelerator,
    load_model,
    load_whole,
    model_dtype,
    prove,
    prove_loaded,
    read_header,
)


def export(
    args: dict[str, Any], base: Path, adapter: Path, folder: Path, trust: bool, seconds: dict[str, float]
) -> dict[str, Any]:
    """Fill ``folder``; what results/merge.json says of it. Exits 2 for a tied embedding. Raises Unequal."""
    refuse_tied(base, adapter)
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
    load(folder, trust)
    free_memory()
    seconds["load"] = time.monotonic() - mark
    return {
        **proved(proof, base),
        "chat_template": chat_template,
        "config": config,
        "export_device": args["export_device"],
        "way": "export",
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


def load(folder: Path, trust: bool) -> Any:
    """What a user will do with the folder. Raises Unequal if the model comes out incomplete."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    return load_whole(folder, trust)


def refuse_tied(base: Path, adapter: Path) -> None:
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
