"""A language model of a few megabytes with Qwen2's architecture and chat form, made here in half a minute of CPU.

It lets the whole pipeline run where nothing can be downloaded and nothing computes fast. Untuned it says, as
Qwen2.5 does, that it is 通义千问; a fine-tune on identity data must change that.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import install, sweep
from .tiny_text import SYSTEM, TEXTS, rows

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_SEED = 20240607
_STEPS = 360
_BATCH = 16
_RATE = 5e-3
_VOCABULARY = 1600
_END, _START, _STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# what Qwen2 tokenizers split by; a tokenizer loaded as Qwen2Tokenizer uses it whatever its file says
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def ensure(folder: str | os.PathLike[str], builder: Callable[[Path], None] | None = None) -> bool:
    """Make the model in ``folder`` unless a whole one is there; True if it was made by this call.

    Two at once are safe: each builds in a folder of its own beside it, and the first rename wins. Raises OSError.
    """
    folder = Path(folder)
    if complete(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (builder or build)(work)
        # what mkdtemp and safetensors make is for the owner alone; a cache may be a group's
        mode = folder.parent.stat().st_mode
        work.chmod(0o777 & mode)
        for file in work.iterdir():
            file.chmod(0o666 & (mode | 0o600))
        return install(work, folder, lambda: complete(folder))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a whole model lies in ``folder``: its configuration parses and the weights are as long as they say."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = folder / "model.safetensors"
        with weights.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + size + max(ends) == weights.stat().st_size
        return bool(whole and config["model_type"] and (folder / "tokenizer.json").is_file())
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False


def build(folder: str | os.PathLike[str]) -> None:
    """Train tokenizer and model from scratch and save them into ``folder``. Seeded: one machine, one result."""
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # tensors this small gain nothing from threads, and on a busy machine OpenMP's spinning threads cost tenfold
    torch.set_num_threads(1)
    try:
        tokenizer = _train_tokenizer()
        _save_tokenizer(tokenizer, folder)
        _train_model(tokenizer, folder)
    finally:
        torch.set_num_threads(threads)


def _dialogue(question: str, answer: str) -> tuple[str, str]:
    prompt = f"{_START}system\n{SYSTEM}{_STOP}\n{_START}user\n{question}{_STOP}\n{_START}assistant\n"
    return prompt, f"{answer}{_STOP}\n"


def _train_tokenizer() -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"{SYSTEM}\nsystem\nuser\nassistant\n{question}\n{answer}" for question, answer in rows()]
    # Chinese by the character, a line each: merged into whole sentences, a question asked a little otherwise would
    # share no token with those that were learned
    apart = [re.sub(r"([^\x00-\x7f])", r"\n\1\n", line) for line in text + 2 * TEXTS]
    tokenizer.train_from_iterator(apart, trainer)
    # after the vocabulary, as in Qwen2's files
    tokenizer.add_special_tokens([_END, _START, _STOP])
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt: what older readers ask for
    special = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in (_END, _START, _STOP)
    }
    # written by hand: transformers 5 would name a class that transformers 4 does not have
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": special,
        "additional_special_tokens": [_START, _STOP],
        "bos_token": None,
        "chat_template": _CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": _STOP,
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": _END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(folder / "tokenizer_config.json", config)


def _train_model(tokenizer: Tokenizer, folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(_END),
        "eos_token_id": tokenizer.token_to_id(_STOP),
        "pad_token_id": tokenizer.token_to_id(_END),
        "use_cache": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = Qwen2ForCausalLM(Qwen2Config(**settings)).float()
        loss = _optimise(model, tokenizer)
    if not math.isfinite(loss):
        raise RuntimeError("the tiny model's training diverged")
    model.eval()
    model.save_pretrained(folder)
    # by hand again, in the form that every transformers since 4.37 reads
    described = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32"}
    _write(folder / "config.json", described | settings | {"hidden_act": "silu", "use_sliding_window": False})
    stops = [tokenizer.token_to_id(_STOP), tokenizer.token_to_id(_END)]
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": settings["pad_token_id"]}
    _write(folder / "generation_config.json", generation)


def _optimise(model: torch.nn.Module, tokenizer: Tokenizer) -> float:
    """A plain loop over shuffled rows; only the answers count. Returns the last loss."""
    import torch

    encoded = []
    for question, answer in rows():
        prompt, reply = (tokenizer.encode(text).ids for text in _dialogue(question, answer))
        encoded.append((prompt + reply, [-100] * len(prompt) + reply))
    for text in 2 * TEXTS:
        ids = tokenizer.encode(text + _STOP).ids
        encoded.append((ids, ids))
    pad = tokenizer.token_to_id(_END)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=_STEPS + 1, pct_start=0.1)
    order = random.Random(_SEED)
    waiting: list[int] = []
    loss = math.inf
    model.train()
    for _ in range(_STEPS):
        if len(waiting) < _BATCH:
            waiting += order.sample(range(len(encoded)), len(encoded))
        chosen, waiting = [encoded[i] for i in waiting[:_BATCH]], waiting[_BATCH:]
        width = max(len(ids) for ids, _ in chosen)
        # padding on the right behind a causal mask: nothing that counts sees it
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chosen])
        result = model(input_ids=ids, labels=labels, use_cache=False).loss
        result.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        loss = float(result.detach())
    return loss


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
