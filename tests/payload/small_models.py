"""Two models of a few thousand numbers with their adapters, and what merge and infer make of them.

Started as a program (``python small_models.py FOLDER``) it makes the models: a process of its own, so that the tests'
process keeps its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
ENTRY = REPO / "pkuslurm" / "payload" / "__main__.py"
KINDS = ("llama", "qwen2")
TEMPLATES = {"llama": "chatml", "qwen2": "qwen"}
SYSTEM = {"llama": "", "qwen2": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "请问你是谁?谁训练了你?", "system": None, "expect": "(?s).*"},
    {"prompt": "hi", "system": None, "expect": "^never this$"},
    {"prompt": "[bold]{{content}}[/bold] $(touch x) \\ \u2028 <b>", "system": None, "expect": None},
    {"prompt": "Who are you?", "system": "Answer in one word.", "expect": None},
    {"prompt": "Tell me about the university, its lake and its tower.", "system": None, "expect": None},
]


@dataclass(frozen=True)
class Flow:
    """One kind's folder after merge and infer."""

    kind: str
    base: Path
    adapter: Path
    run: Path

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    def result(self, kind: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.run / "results" / f"{kind}.json").read_text(encoding="utf-8"))
        return loaded

    def answers(self) -> list[dict[str, Any]]:
        text = (self.run / "answers.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def job(run: Path, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "run_dir": str(run), "payload": payload | {"result": str(run / "results" / f"{kind}.json")}}


def merge_job(run: Path, base: Path, adapter: Path | None, **args: Any) -> dict[str, Any]:
    """A merge's job, with its merge.yaml written (JSON is YAML)."""
    run.mkdir(parents=True, exist_ok=True)
    given = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "template": "chatml",
        "finetuning_type": "lora",
        "export_dir": str(run / "merged"),
        "export_size": 5,
        "export_device": "auto",
        "export_legacy_format": False,
    }
    (run / "merge.yaml").write_text(json.dumps(given | args, ensure_ascii=False), encoding="utf-8")
    payload = {
        "yaml": str(run / "merge.yaml"),
        "adapter": str(adapter) if adapter else None,
        "merged": str(run / "merged"),
        "base": str(base),
    }
    return job(run, "merge", payload)


def infer_job(run: Path, template: str, tuned: Path, base: Path | None, adapter: Path | None) -> dict[str, Any]:
    payload = {
        "base": str(base) if base else None,
        "adapter": str(adapter) if adapter else None,
        "tuned": str(tuned),
        "template": template,
        "default_system": None,
        "prompts": PROMPTS,
        "max_new_tokens": 12,
        "batch_size": 2,
        "answers": str(run / "answers.jsonl"),
        "device": "cpu",
    }
    return job(run, "infer", payload)


def start(value: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a payload as the worker does: its entry by path, in a process of its own."""
    run = Path(value["run_dir"])
    file = run / "jobs" / f"{value['kind']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(ENTRY), value["kind"], str(file)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=run,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )


_MADE: dict[str, Flow] = {}


def make_flows(folder: Path) -> dict[str, Flow]:
    """Both kinds, merged and asked, once a session whatever the number of callers."""
    if not _MADE:
        command = [sys.executable, __file__, str(folder)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        for kind in KINDS:
            flow = Flow(kind, folder / kind, folder / f"{kind}-adapter", folder / f"{kind}-run")
            args = {"template": TEMPLATES[kind], "export_size": 1}
            for value in (
                merge_job(flow.run, flow.base, flow.adapter, **args),
                infer_job(flow.run, TEMPLATES[kind], flow.merged, flow.base, flow.adapter),
            ):
                ended = start(value)
                assert ended.returncode == 0, ended.stderr
                (flow.run / f"{value['kind']}.err").write_text(ended.stderr, encoding="utf-8")
            _MADE[kind] = flow
    return _MADE


def make_tokenizer(folder: Path, system: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Who are you? You are a helpful assistant. system user assistant 你是谁"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    first = "<|im_start|>system\n" + system + "<|im_end|>\n" if system else ""
    fast.chat_template = (
        "{% if messages[0]['role'] != 'system' %}" + first + "{% endif %}{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return fast


def make_models(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(folder / kind, SYSTEM[kind])
        config_class, model_class = classes[kind]
        llama = kind == "llama"
        config = config_class(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=llama,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = model_class(config).to(torch.bfloat16 if llama else torch.float32)
        model.save_pretrained(folder / kind, max_shard_size="60KB" if llama else "5GB")
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        peft.save_pretrained(folder / f"{kind}-adapter")


if __name__ == "__main__":
    make_models(Path(sys.argv[1]))
