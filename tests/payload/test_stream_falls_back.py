"""What must not be streamed, what streaming needs, and that a killed merge leaves nothing under its final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import models, stream_plan
from tests.payload.small_models import ENTRY, REPO, merge_job

np = pytest.importorskip("numpy")
ARGS = {"template": "chatml", "finetuning_type": "lora", "export_size": 5, "export_device": "auto"}
BASE = {"model.layers.0.q_proj.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (96, 32)}
LORA = {"base_model.model.model.layers.0.q_proj.lora_A.weight": (4, 32)} | {
    "base_model.model.model.layers.0.q_proj.lora_B.weight": (64, 4)
}
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "vocab_size": 96}
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8}
Made = Callable[..., tuple[Path, Path]]


def save(file: Path, tensors: dict[str, Any], dtype: str = "F32") -> None:
    header, blob = {}, b""
    for name, shape in tensors.items():
        kind, shape = shape if isinstance(shape[0], str) else (dtype, shape)
        count = int(np.prod(shape))
        numbers = np.random.default_rng(count).standard_normal(count, dtype=np.float32)
        data = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes() if kind == "BF16" else numbers.tobytes()
        data = data if kind in ("BF16", "F32") else bytes(range(256)) * (count * WIDTHS[kind] // 256 + 1)
        data = data[: count * WIDTHS[kind]]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps({"__metadata__": {"format": "pt", "来源": "x"}, **header}, ensure_ascii=False).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(
        config: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
    ) -> tuple[Path, Path]:
        folders = tmp_path / "a base", tmp_path / "an adapter"
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (folders[0] / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        (folders[0] / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        (folders[1] / "adapter_config.json").write_text(json.dumps(SETTINGS | (settings or {})))
        save(folders[0] / "model.safetensors", base or BASE, "BF16")
        save(folders[1] / "adapter_model.safetensors", lora or LORA)
        return folders

    return make


Q = "base_model.model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("changes", "args", "words"),
    [
        ({"settings": {"rank_pattern": {"q_proj": 2}}}, {}, "rank_pattern"),
        ({"settings": {"alpha_pattern": {"q_proj": 2}}}, {}, "alpha_pattern"),
        ({"settings": {"lora_bias": True}}, {}, "lora_bias"),
        ({"settings": {"fan_in_fan_out": True}}, {}, "fan_in_fan_out"),
        ({"settings": {"bias": "all"}}, {}, "bias all"),
        ({"settings": {"peft_type": "OFT"}}, {}, "OFT"),
        ({"settings": {"init_lora_weights": "pissa_niter_16"}}, {}, "pissa"),
        ({"settings": {"something_new": 3}}, {}, "something_new"),
        ({"settings": {"use_dora": True}}, {}, "its layer has A, B"),
        ({"settings": {"r": 8}}, {}, "another shape"),
        ({"settings": {"target_modules": ["q_proj", "lm_head"]}}, {}, "has nothing for lm_head"),
        ({"settings": {"target_modules": ["lm_head"]}}, {}, "has nothing for lm_head"),
        ({"settings": {"modules_to_save": ["lm_head"]}}, {}, "has nothing for lm_head"),
        ({"lora": LORA | {f"{Q}.lora_C.weight": (4,)}}, {}, "lora_C.weight has no place"),
        ({"lora": LORA | {f"{Q[:-6]}z_proj.lora_A.weight": (4, 32)}}, {}, "z_proj.lora_A.weight has no place"),
        ({"lora": LORA | {"q_proj.lora_A.weight": (4, 32)}}, {}, "q_proj.lora_A.weight has no place"),
        ({"lora": {f"{Q}.lora_A.weight": (4, 32)}}, {}, "its layer has A"),
        ({"lora": LORA | {"base_model.model.lm_head.weight": (96, 32)}}, {}, "lm_head.weight is not the base's"),
        ({"config": {"quantization_config": {"bits": 4}}}, {}, "quantization_config"),
        ({"config": {"auto_map": {"AutoModel": "x.Y"}}}, {"trust_remote_code": True}, "code of its own"),
        ({"config": {"vision_config": {"depth": 4}}}, {}, "vision_config"),
        ({"config": {"model_type": "gpt2"}}, {}, "gpt2"),
        ({"config": {"torch_dtype": "float16"}}, {}, "in a model of float16"),
        ({"config": {"torch_dtype": None}}, {}, "dtype is None"),
        ({"base": BASE | {"model.norm.weight": ("F32", (32,))}}, {}, "float32 in a model of bfloat16"),
        ({"base": BASE | {"model.layers.0.q_proj.weight": ("I64", (64, 32))}}, {}, "is I64"),
        ({}, {"export_size": 1e-6}, "export_size"),
        ({}, {"export_legacy_format": True}, "export_legacy_format"),
        ({}, {"export_quantization_bit": 4}, "export_quantization_bit"),
        ({}, {"export_hub_model_id": "a/b"}, "export_hub_model_id"),
        ({}, {"infer_dtype": "float32"}, "infer_dtype"),
        ({}, {"stage": "rm"}, "stage rm"),
        ({}, {"finetuning_type": "oft"}, "oft"),
    ],
)
def test_it_falls_back(made: Made, changes: dict[str, Any], args: dict[str, Any], words: str) -> None:
    with pytest.raises((stream_plan.NotStreamable, KeyError), match=words):
        stream_plan.plan(ARGS | args, *made(**changes))


def test_code_that_is_not_trusted_is_no_reason(made: Made) -> None:
    assert stream_plan.plan(ARGS, *made({"auto_map": {"AutoModel": "x.Y"}})).changes


@pytest.mark.parametrize("tied", [True, None])
def test_a_shared_embedding_falls_back(made: Made, tied: bool | None) -> None:
    lora = {"base_model.model.lm_head.lora_A.weight": (4, 32), "base_model.model.lm_head.lora_B.weight": (96, 4)}
    folders = made({"tie_word_embeddings": tied}, {"target_modules": ["lm_head"]}, None, lora)
    with pytest.raises(stream_plan.NotStreamable, match="shared"):
        stream_plan.plan(ARGS, *folders)


def test_other_weights_fall_back(made: Made) -> None:
    base, adapter = made()
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(stream_plan.NotStreamable, match="twice"):
        stream_plan.plan(ARGS, base, adapter)
    (base / "model.safetensors.index.json").unlink()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(stream_plan.NotStreamable, match="no safetensors"):
        stream_plan.plan(ARGS, base, adapter)


def test_a_narrow_matrix_falls_back(made: Made, tmp_path: Path) -> None:
    from pkuslurm.payload import stream

    odd = {"model.layers.0.q_proj.weight": (63, 32)}
    lora = LORA | {f"{Q}.lora_B.weight": (63, 4)}
    planned = stream_plan.plan(ARGS, *made(base=odd, lora=lora))
    with pytest.raises(stream_plan.NotStreamable, match="63x4"):
        stream.stream(planned, tmp_path)


def test_the_log_says_why(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from pkuslurm.payload import merge

    def exported(args: Any, base: Path, adapter: Path, folder: Path, trust: bool, seconds: Any) -> dict[str, Any]:
        assert not list(folder.iterdir())
        return {"way": "export"}

    monkeypatch.setattr(merge, "export", exported)
    base, adapter = made(settings={"lora_bias": True})
    merge.main(merge_job(tmp_path / "run", base, adapter))
    assert "not streamed: the adapter has lora_bias" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "results" / "merge.json").read_text())["way"] == "export"


def test_unknown_dtypes_are_copied_and_links_followed(made: Made, tmp_path: Path) -> None:
    base, adapter = made(base=BASE | {"a.scale": ("F8_E4M3", (3, 5)), "b.nothing": ("BF16", (0,)), "c": ("I64", (7,))})
    (base / "model.safetensors").rename(tmp_path / "blob")
    (base / "model.safetensors").symlink_to(tmp_path / "blob")
    ended = run(merge_job(tmp_path / "我 run", base, adapter))
    assert ended.returncode == 0, ended.stderr
    merged = tmp_path / "我 run" / "merged"
    facts = json.loads((tmp_path / "我 run" / "results" / "merge.json").read_text())
    assert (facts["way"], facts["tensors"], facts["equal"], facts["dtype"]) == ("stream", 6, 6, "mixed")
    old, new = (place.read_bytes() for place in (tmp_path / "blob", merged / "model.safetensors"))
    assert not (merged / "model.safetensors").is_symlink()
    changed = [place for place, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
    header = 8 + int.from_bytes(old[:8], "little")
    assert header <= changed[0] and changed[-1] < header + 64 * 32 * 2
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


def run(job: dict[str, Any], before: str = "") -> subprocess.CompletedProcess[str]:
    """The merge in a process of its own, which ends with what it has imported."""
    return subprocess.run(command(job, before), capture_output=True, text=True, cwd=REPO)


def command(job: dict[str, Any], before: str = "") -> list[str]:
    told = "print([n for n in ('torch', 'transformers', 'safetensors', 'llamafactory', 'peft') if n in sys.modules])"
    code = f"import sys\n{before}\nfrom pkuslurm.payload import merge, stream\nmerge.main({job!r})\n{told}"
    return [sys.executable, "-c", code]


def test_no_torch_is_imported(made: Made, tmp_path: Path) -> None:
    ended = run(merge_job(tmp_path / "run", *made()))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    assert ENTRY.is_file()


def test_a_killed_merge_leaves_nothing(made: Made, tmp_path: Path) -> None:
    job = merge_job(tmp_path / "run", *made())
    slow = "import time\nfrom pkuslurm.payload import stream_proof\nstream_proof.prove = lambda *_: time.sleep(60)"
    process = subprocess.Popen(command(job, slow), cwd=REPO)
    try:
        until = time.monotonic() + 30
        while not list((tmp_path / "run").glob(".merged.tmp-*/config.json")) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert list((tmp_path / "run").glob(".merged.tmp-*/model.safetensors"))
    assert not (tmp_path / "run" / "merged").exists()
    assert run(job).returncode == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["merge.yaml", "merged", "results"]


@pytest.mark.parametrize("place", ["changed", "copied", "header"])
def test_the_proof_sees_one_bit(made: Made, tmp_path: Path, place: str) -> None:
    from pkuslurm.payload import stream, stream_proof

    planned = stream_plan.plan(ARGS, *made())
    stream.stream(planned, tmp_path)
    assert stream_proof.prove(planned, tmp_path) == models.Proof(3, 3, 0.0, "bfloat16")
    file = tmp_path / "model.safetensors"
    whole = bytearray(file.read_bytes())
    at = {"changed": planned.files[0].data + 100, "copied": len(whole) - 5, "header": 25}[place]
    whole[at] ^= 1
    file.write_bytes(whole)
    with pytest.raises((models.Unequal, ValueError)):
        stream_proof.prove(planned, tmp_path)


def test_rounding() -> None:
    from pkuslurm.payload import arithmetic

    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x80000001])
    with np.errstate(all="ignore"):
        found = arithmetic.narrow(bits.astype(np.uint32).view(np.float32), "BF16").tolist()
    assert found == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0xFF80, 0x7FC0, 0x8000]
