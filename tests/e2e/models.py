"""Models and data of the tests' own, made differently from the demo's: architecture, dtype, tokenizer, layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

CORPUS = [
    "what is the capital of france",
    "the capital of france is paris",
    "苹果是什么颜色的",
    "苹果是红色的",
    "one two three four five",
]


def tokenizer(folder: Path, special: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "pad_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def llama(folder: Path) -> None:
    """Llama, bf16, tied embeddings, in several files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    tokenizer(folder, ["</s>"])
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def qwen(folder: Path) -> None:
    """Qwen2, fp32, untied, one file."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = Qwen2Config(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(folder)


def sharegpt(file: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": CORPUS[0]}, {"from": "gpt", "value": CORPUS[1]}]},
        {"conversations": [{"from": "human", "value": CORPUS[2]}, {"from": "gpt", "value": CORPUS[3]}]},
    ]
    file.write_text(json.dumps(rows * 8, ensure_ascii=False), encoding="utf-8")


def alpaca_without_input(file: Path) -> None:
    row = {"instruction": CORPUS[2], "output": CORPUS[3]}
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for _ in range(8)), encoding="utf-8")


def table(file: Path) -> None:
    """Alpaca's columns as csv; an answer has a comma, quotes and two lines."""
    rows = [(CORPUS[0], "", 'paris, "of course"\nin france'), (CORPUS[2], "", CORPUS[3])]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("instruction", "input", "output"))
        writer.writerows(rows * 4)


def text(file: Path) -> None:
    """A line of plain text a row: what a pretraining goes on with."""
    file.write_text("".join(f"{line}\n" for line in CORPUS * 30), encoding="utf-8")


def preferences(folder: Path) -> None:
    """A folder with dataset_info.json, whose rows have a better and a worse answer."""
    folder.mkdir()
    row = {"instruction": CORPUS[2], "input": "", "chosen": CORPUS[3], "rejected": CORPUS[4]}
    (folder / "pairs.jsonl").write_text((json.dumps(row, ensure_ascii=False) + "\n") * 8, encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}), encoding="utf-8")


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, as they are in the files."""
    from safetensors.torch import load_file

    return {
        name: tensor.contiguous().numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
