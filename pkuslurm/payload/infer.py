"""The answers: each prompt asked greedily of the base, of the base with its adapter and of the merged folder.

Two loads in all: the base (alone first, then with the adapter over it), freed, then the merged folder. What is asked
goes through the template that the training used, and one batch holds the same prompts for each model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .answers import Answers, answer_lines, check_patterns, compare, count_passed, write_lines
from .files import refuse, versions, write_json
from .models import (
    GIB,
    available_memory,
    check_adapter,
    check_base,
    count_parameters,
    free_memory,
    load_model,
    model_dtype,
    quiet,
)
from .token_ids import compare_ids

# First-token logits are kept for so many prompts: one row is half a megabyte for a large vocabulary.
MOST_LOGITS = 256
# the prompts whose token ids are kept: what serves the model later is held against them
MOST_IDS = 16


def main(job: dict[str, Any]) -> None:
    """Write answers.jsonl and results/infer.json. Exits 2 on what the user can mend; wrong answers are no error."""
    payload = job["payload"]
    started = time.monotonic()
    prompts: list[dict[str, Any]] = payload["prompts"]
    check_patterns(prompts)
    tuned = check_base("tuned", payload["tuned"])
    base = check_base("base", payload["base"]) if payload.get("base") else None
    over = check_adapter("tuned_adapter", payload["tuned_adapter"]) if payload.get("tuned_adapter") else None
    # an adapter says nothing without its base
    adapter = check_adapter("adapter", payload["adapter"]) if payload.get("adapter") and base else None
    quiet()
    seconds: dict[str, float] = {}
    asker = Asker(payload, tuned, base)
    seconds["import"] = time.monotonic() - started
    of_base = of_adapter = None
    if base and prompts:
        of_base, of_adapter = _ask_base(asker, base, adapter, seconds)
        free_memory()
    of_tuned = _ask_tuned(asker, tuned, over, seconds) if prompts else Answers([])
    lines = answer_lines(prompts, of_base.texts if of_base else None, of_tuned.texts)
    write_lines(Path(payload["answers"]), lines)
    facts = {
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "versions": versions(),
        "prompts": len(prompts),
        "passed": count_passed(lines),
        "dtype": asker.dtype,
        "device": payload["device"],
        "ids": asker.ids[:MOST_IDS],
    }
    write_json(
        payload["result"],
        facts
        | compare(prompts, of_adapter, of_tuned)
        | compare_ids(prompts, asker.ids, asker.saved_ids(), asker.tokenizer.decode),
    )


def _ask_base(
    asker: Asker, base: Path, adapter: Path | None, seconds: dict[str, float]
) -> tuple[Answers, Answers | None]:
    """The base's answers, and those with its ``adapter`` over it, if there is one."""
    mark = time.monotonic()
    model = asker.load(base)
    seconds["load_base"], mark = time.monotonic() - mark, time.monotonic()
    # before the adapter is put over it: some kinds of adapter change the base when they are loaded
    of_base = asker.ask(model, "base")
    seconds["base"], mark = time.monotonic() - mark, time.monotonic()
    if adapter is None:
        return of_base, None
    of_adapter = asker.ask(_with_adapter(model, adapter), "adapter")
    seconds["adapter"] = time.monotonic() - mark
    return of_base, of_adapter


def _ask_tuned(asker: Asker, tuned: Path, over: Path | None, seconds: dict[str, float]) -> Answers:
    """``over``: an adapter over the tuned model, where that is not merged."""
    mark = time.monotonic()
    model = asker.load(tuned)
    if over is not None:
        model = _with_adapter(model, over)
    seconds["load_tuned"], mark = time.monotonic() - mark, time.monotonic()
    of_tuned = asker.ask(model, "tuned")
    seconds["tuned"] = time.monotonic() - mark
    return of_tuned


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).eval()


class Asker:
    """The prompts as token ids, and how every model is loaded and asked in the same way."""

    def __init__(self, payload: dict[str, Any], tuned: Path, base: Path | None) -> None:
        import torch
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments

        self.device: str = payload["device"]
        if self.device != "cpu":
            module = getattr(torch, self.device.partition(":")[0], None)
            if module is None or not module.is_available():
                refuse(f"device {self.device}: torch sees none here; ask for an accelerator, or set it to cpu")
        self.tuned = tuned
        self.trust = bool(payload.get("trust_remote_code"))
        self.prompts: list[dict[str, Any]] = payload["prompts"]
        self.default_system: str | None = payload.get("default_system")
        self.batch_size = max(1, int(payload["batch_size"]))
        self.max_new_tokens = int(payload["max_new_tokens"])
        self.dtype = choose_dtype([folder for folder in (base, tuned) if folder], tuned, self.device)
        self.tokenizer = self._tokenizer()
        more = {"enable_thinking": payload["enable_thinking"]} if "enable_thinking" in payload else {}
        arguments = DataArguments(template=payload["template"], default_system=self.default_system, **more)
        try:
            self.template = get_template_and_fix_tokenizer(self.tokenizer, arguments)
        except ValueError as error:
            refuse(f"template {payload['template']}: {error}; name one that LLaMA-Factory has")
        self.ids = [self._encode(prompt) for prompt in self.prompts]

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tuned, trust_remote_code=self.trust, split_special_tokens=False)

    def _encode(self, prompt: dict[str, Any]) -> list[int]:
        # as LLaMA-Factory's own chat does: a pair whose answer is still empty
        messages = [{"role": "user", "content": prompt["prompt"]}, {"role": "assistant", "content": ""}]
        ids, _ = self.template.encode_oneturn(self.tokenizer, messages, prompt.get("system"))
        return list(ids)

    def saved_ids(self) -> list[list[int] | None]:
        """The same prompts through the chat template that is saved with the tuned model, as any other program would
        ask; None where there is none, or it cannot take the messages."""
        # a fresh one: LLaMA-Factory has changed the other
        tokenizer = self._tokenizer()
        found: list[list[int] | None] = []
        for prompt in self.prompts:
            system = prompt.get("system") or self.default_system
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt["prompt"]})
            try:
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                found.append(list(ids))
            except Exception as error:  # whatever a model's template raises: it is information, not our failure
                if not found:
                    print(f"chat template: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
                found.append(None)
        return found

    def load(self, folder: Path) -> Any:
        """The model on the device, in the dtype that all have."""
        model = load_model(folder, self.dtype, self.trust).to(self.device).eval()
        rows = model.get_input_embeddings().weight.shape[0]
        for prompt, ids in zip(self.prompts, self.ids, strict=True):
            if max(ids, default=0) >= rows:
                refuse(
                    f"template: {prompt['prompt'][:40]!r} has token {max(ids)}, and {folder} knows {rows};"
                    " choose a template whose special tokens the model has"
                )
        return model

    def ask(self, model: Any, name: str) -> Answers:
        """All answers of one model; a line on stderr for each batch."""
        stops = self._stops(model)
        logits: dict[int, Any] = {}

        def batch(indices: Sequence[int]) -> list[str]:
            return self._batch(model, indices, stops, logits)

        def report(done: int) -> None:
            print(f"{name} {done}/{len(self.ids)}", file=sys.stderr, flush=True)

        texts = in_batches([len(ids) for ids in self.ids], self.batch_size, batch, report)
        return Answers(texts, logits)

    def _stops(self, model: Any) -> list[int]:
        """The template's stop tokens and the model's own."""
        own = getattr(model.generation_config, "eos_token_id", None)
        stops = set(self.template.get_stop_token_ids(self.tokenizer))
        stops.update(own if isinstance(own, list | tuple) else [own])
        return sorted(token for token in stops if token is not None)

    def _batch(self, model: Any, indices: Sequence[int], stops: list[int], logits: dict[int, Any]) -> list[str]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        rows = [self.ids[index] for index in indices]
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)

        def keep(input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] == width:
                for row, index in enumerate(indices):
                    if index < MOST_LOGITS:
                        logits[index] = scores[row].float().cpu()
            return scores

        # the model's own settings (sampling, penalties) would be mixed into what is passed to generate
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=stops, pad_token_id=pad
        )
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config = settings
        with torch.inference_mode():
            made = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([keep]),
            )
        return [self._text(row[width:].tolist(), stops) for row in made]

    def _text(self, ids: list[int], stops: Sequence[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip()


def in_batches(
    lengths: Sequence[int],
    size: int,
    batch: Callable[[Sequence[int]], list[str]],
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """``batch(indices)`` over all indices, ``size`` at a time, shortest first, so that little is padded; its results
    in the order of ``lengths``. ``report`` gets the number done after each."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    results = [""] * len(lengths)
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        for index, result in zip(indices, batch(indices), strict=True):
            results[index] = result
        report(start + len(indices))
    return results


def choose_dtype(folders: Sequence[Path], tuned: Path, device: str) -> str:
    """float32 if the largest of ``folders`` fits the memory so, else the dtype of ``tuned``.

    In bf16 an answer depends on the batch that its prompt is in; in float32 it does not."""
    need = max(count_parameters(folder) for folder in folders) * 4 * 1.3 + GIB
    return "float32" if need < available_memory(device) else model_dtype(tuned)
