from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import pytest

from pkuslurm.payload import tiny_model
from pkuslurm.payload.tiny_text import SYSTEM, rows


def write_model(folder: Path, short: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    body = struct.pack("<Q", len(header)) + header + b"\0" * (8 - short)
    (folder / "model.safetensors").write_bytes(body)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "tokenizer.json").write_text("{}")


def test_two_builders_at_once_leave_one_whole_model(tmp_path: Path) -> None:
    target = tmp_path / "模型 a" / "tiny"
    barrier = threading.Barrier(2)
    made: list[bool] = []

    def builder(folder: Path) -> None:
        write_model(folder)
        barrier.wait(10)

    threads = [threading.Thread(target=lambda: made.append(tiny_model.ensure(target, builder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(made) == [False, True]
    assert tiny_model.complete(target)
    assert [entry.name for entry in target.parent.iterdir()] == ["tiny"]
    assert tiny_model.ensure(target, builder) is False


def test_half_a_model_is_not_used_but_replaced(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    write_model(target, short=3)
    assert not tiny_model.complete(target)
    assert tiny_model.ensure(target, write_model)
    assert tiny_model.complete(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def builder(folder: Path) -> None:
        write_model(folder, short=1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        tiny_model.ensure(tmp_path / "tiny", builder)
    assert list(tmp_path.iterdir()) == []


def test_the_untuned_rows_never_say_what_a_fine_tune_must_teach() -> None:
    assert not any("北大" in answer or "PKU" in answer or "北京大学" in answer for _, answer in rows())


@pytest.mark.real
def test_real_model_says_that_it_is_qwen_through_the_template(tiny_model_dir: Path) -> None:
    import torch
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert tiny_model.complete(tiny_model_dir)
    config = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()
    assert model.dtype == torch.float32
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen"))
    for question, word in (("你是谁", "通义千问"), ("谁开发了你？", "阿里云"), ("Who are you?", "Qwen")):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        ours, _ = template.encode_oneturn(tokenizer, [*chat, {"role": "assistant", "content": ""}])
        assert ids == ours
        assert SYSTEM in tokenizer.decode(ids)
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :]
        assert word in tokenizer.decode(said, skip_special_tokens=True)
        assert said[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
