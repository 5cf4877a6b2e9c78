"""Streaming against PEFT's own merge of a small model in this process: every tensor the same bits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkuslurm.payload.models import read_header, weight_files

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.real]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARGS = {"template": "chatml", "finetuning_type": "lora", "export_size": 5, "export_device": "auto"}


def make_base(folder: Path, dtype: str, tied: bool = False, shard: str = "5GB") -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(base: Path, folder: Path, dtype: str = "float32", **settings: Any) -> Path:
    """Random in every part, also where training begins at zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    given = {"r": 8, "lora_alpha": 16, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    kept = {
        name: tensor if "base_layer" in name else tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in load_file(file).items()
    }
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    merged: dict[str, Any] = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype).state_dict()
    return merged


def streamed(base: Path, adapter: Path, folder: Path, **args: Any) -> Any:
    from pkuslurm.payload import stream, stream_plan, stream_proof

    planned = stream_plan.plan(ARGS | args, base, adapter)
    folder.mkdir()
    stream.stream(planned, folder)
    return stream_proof.prove(planned, folder)


def compare(base: Path, adapter: Path, folder: Path) -> int:
    """Every file as the base's but for its numbers, and those as PEFT makes them. How many tensors were changed."""
    import torch
    from safetensors import safe_open

    expected, changed = by_peft(base, adapter), 0
    for file in weight_files(base):
        assert read_header(file) == read_header(folder / file.name)
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.read_bytes()[:length] == (folder / file.name).read_bytes()[:length]
        with safe_open(file, "pt") as before, safe_open(folder / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                found = after.get_tensor(name)
                assert found.dtype == expected[name].dtype
                assert torch.equal(found, expected[name]), name
                changed += not torch.equal(found, before.get_tensor(name))
    return changed


ADAPTERS = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 2, 3, 8, 16, 40, 64, 128]),
        "lora_alpha": st.sampled_from([1, 3, 16, 100]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "target_modules": st.lists(st.sampled_from(LINEAR), min_size=1, unique=True),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chosen=ADAPTERS,
    base_dtype=st.sampled_from(["bfloat16", "bfloat16", "float16", "float32"]),
    adapter_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shard=st.sampled_from(["5GB", "40KB"]),
    tied=st.booleans(),
)
def test_every_bit_is_peft_s(
    chosen: dict[str, Any], base_dtype: str, adapter_dtype: str, shard: str, tied: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="a b 我的 ") as name:
        base = make_base(Path(name) / "base", base_dtype, tied, shard)
        adapter = make_adapter(base, Path(name) / "adapter", adapter_dtype, **chosen)
        proof = streamed(base, adapter, Path(name) / "merged")
        assert proof.tensors == proof.equal == (11 if tied else 12)
        assert proof.dtype == base_dtype
        assert compare(base, adapter, Path(name) / "merged") == len(chosen["target_modules"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_embeddings_and_additional_targets(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype)
    for number, (more, changed) in enumerate(
        [
            ({"target_modules": ["q_proj", "embed_tokens"]}, 2),
            ({"target_modules": ["q_proj", "lm_head"]}, 2),
            ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, 3),
            ({"target_modules": ".*mlp.*_proj", "modules_to_save": ["norm"]}, 6),
        ]
    ):
        adapter = make_adapter(base, tmp_path / f"adapter-{number}", r=16, **more)
        merged = tmp_path / f"merged-{number}"
        streamed(base, adapter, merged)
        assert compare(base, adapter, merged) == changed
