"""Asking 64 prompts one at a time and as ``infer`` asks them: `make bench` writes it into docs/benchmarks.md.

A random Qwen2 of 23 million numbers, made here; ``payload.infer`` itself, in float32 on two threads, three times each
in turns. Loads and the start of Python are not in the times. The texts are compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.bench.common import in_turns, median, section, table, versions, written  # noqa: E402

PROMPTS, NEW_TOKENS, THREADS, TIMES = 64, 24, 2, 3
BATCHES = (1, 8, 16, 64)
OURS = 16  # conf/config.yaml
BAR = 4.0


def make(folder: Path) -> None:
    """A Qwen2 whose numbers are random, with a tokenizer that knows bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.payload import small_models

    torch.manual_seed(1)
    tokenizer = small_models.make_tokenizer(folder, small_models.SYSTEM["qwen2"])
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def asker(folder: Path, batch: int) -> Any:
    from pkuslurm.payload.infer import Asker

    words = "Tell me about the university, its lake and its tower; 未名湖、博雅塔 and what else there is."
    payload = {
        "device": "cpu",
        "prompts": [
            {"prompt": f"{number}: {words[: 4 + number * 5 % 80]}", "system": None} for number in range(PROMPTS)
        ],
        "batch_size": batch,
        "max_new_tokens": NEW_TOKENS,
        "template": "qwen",
    }
    return Asker(payload, folder, None)


def measure() -> tuple[dict[int, float], dict[int, int]]:
    """Seconds (median), and how many texts are those of one at a time, for each size of a batch."""
    import torch

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make(folder)
        askers = {batch: asker(folder, batch) for batch in BATCHES}
        model = askers[1].load(folder)
        askers[OURS].ask(model, "warm")
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # a line a batch
        found = in_turns(
            {str(batch): (lambda one=one: one.ask(model, "model").texts) for batch, one in askers.items()}, TIMES, False
        )
        sys.stderr = sys.__stderr__
    alone = found["1"][0][1]
    same = {batch: min(sum(map(str.__eq__, alone, texts)) for _, texts in found[str(batch)]) for batch in BATCHES}
    return {batch: median(found[str(batch)]) for batch in BATCHES}, same


HEAD = """\
{written} {versions}. {prompts} prompts of a random Qwen2 (23 million numbers, float32), {tokens} tokens each, greedy,
{threads} threads; median of {times}, in turns; without the load. Texts: how many are those of one at a time.
`infer` asks {ours} at a time (`infer.batch_size`), shortest first; the bar is {bar:.0f} times.

"""


def text() -> str:
    seconds, same = measure()
    head = HEAD.format(
        written=written("tests/bench/asking.py"), versions=versions("torch", "transformers"), prompts=PROMPTS,
        tokens=NEW_TOKENS, threads=THREADS, times=TIMES, ours=OURS, bar=BAR,
    )  # fmt: skip
    rows = [
        (
            "one at a time" if batch == 1 else f"{batch} at a time",
            f"{seconds[batch]:.1f}",
            f"{PROMPTS * NEW_TOKENS / seconds[batch]:,.0f}",
            f"{seconds[1] / seconds[batch]:.1f}",
            f"{same[batch]} of {PROMPTS}",
        )
        for batch in BATCHES
    ]
    return head + table(("", "seconds", "tokens/s at most", "times as fast", "same texts"), rows)


if __name__ == "__main__":
    section("Asking", text())
