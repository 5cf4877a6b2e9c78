"""The merge by streaming beside LLaMA-Factory's export, and beside copying the base.

A small model and one of a gigabyte, both made here of random numbers; each way in a process of its own with its
bytecode written, in turns; medians. The tensors of both results are compared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.common import REPO, section, table, written

ENTRY = REPO / "pkuslurm" / "payload" / "__main__.py"
TIMES = 3
RANK = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = (EXPORT, STREAM, COPY) = ("llamafactory-cli export", "streaming", "cp and sync")


@dataclass(frozen=True)
class Size:
    hidden: int
    inner: int
    layers: int
    vocabulary: int
    shards: int


SIZES = {"small": Size(576, 1536, 30, 4096, 3), "large": Size(2048, 5632, 10, 32000, 3)}


@dataclass(frozen=True)
class Cost:
    seconds: float
    megabytes: float


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for name in LINEAR[:4]:
            found[f"{at}self_attn.{name}.weight"] = (size.hidden, size.hidden)
        for name in LINEAR[4:]:
            shape = (size.inner, size.hidden)
            found[f"{at}mlp.{name}.weight"] = shape if name != "down_proj" else shape[::-1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = (size.hidden,)
    return found | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def write(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str, random: np.random.Generator) -> None:
    """A safetensors file of random numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    width, at = {"BF16": 2, "F32": 4}[dtype], 0
    for name, shape in tensors.items():
        end = at + int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            numbers = random.standard_normal(shape, dtype=np.float32)
            numbers *= np.float32(0.02)
            stream.write((numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else numbers)


def make(folder: Path, size: Size, tokenizer: Path) -> None:
    """``base`` and ``adapter`` in ``folder``."""
    random = np.random.default_rng(0)
    base, adapter = folder / "base", folder / "adapter"
    for place in (base, adapter):
        place.mkdir(parents=True)
    for file in tokenizer.glob("*"):
        if "token" in file.name or file.name.startswith(("chat_template", "vocab", "merges")):
            shutil.copyfile(file, base / file.name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = shapes(size)
    names = [f"model-{number + 1:05d}-of-{size.shards:05d}.safetensors" for number in range(size.shards)]
    parts = [dict(list(tensors.items())[number :: size.shards]) for number in range(size.shards)]
    for name, part in zip(names, parts, strict=True):
        write(base / name, part, "BF16", random)
    places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    lora = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEAR:
            lora[f"base_model.model.{module}.lora_A.weight"] = (RANK, shape[1])
            lora[f"base_model.model.{module}.lora_B.weight"] = (shape[0], RANK)
    write(adapter / "adapter_model.safetensors", lora, "F32", random)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": list(LINEAR),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def settings_of(folder: Path, out: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "base"),
        "adapter_name_or_path": str(folder / "adapter"),
        "template": "chatml",
        "finetuning_type": "lora",
        "export_dir": str(out),
        "export_size": 5,
        "export_device": "cpu",
    }


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """What each way is started with; ``out`` is made anew."""
    yaml = folder / "merge.yaml"
    yaml.write_text(json.dumps(settings_of(folder, out)), encoding="utf-8")
    payload = {
        "yaml": str(yaml),
        "adapter": str(folder / "adapter"),
        "merged": str(out),
        "base": str(folder / "base"),
        "result": str(folder / "merge.json"),
    }
    job = folder / "job.json"
    job.write_text(json.dumps({"kind": "merge", "run_dir": str(folder), "payload": payload}), encoding="utf-8")
    export = [str(Path(sys.executable).with_name("llamafactory-cli")), "export", str(yaml)]
    copy = ["sh", "-c", 'cp -rL "$0" "$1" && sync "$1"/*', str(folder / "base"), str(out)]
    return dict(zip(WAYS, (export, [sys.executable, str(ENTRY), "merge", str(job)], copy), strict=True))


def timed(command: Sequence[str], log: Path) -> Cost:
    """Wall time, and the most memory that one of its processes had."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}: {log.read_text(errors='replace')[-2000:]}")
    return Cost(seconds, used.ru_maxrss / 1024)


@dataclass(frozen=True)
class Measured:
    """``costs`` of each way; ``cold``: the same where no file of the base was in memory; ``same``: how many of
    ``tensors`` are to the bit those of the export."""

    size: int
    costs: dict[str, list[Cost]]
    cold: dict[str, list[Cost]]
    same: int
    tensors: int


def measured(folder: Path, times: int = TIMES) -> Measured:
    outs = {way: folder / way.split()[0] for way in WAYS}
    base = list((folder / "base").glob("*"))

    def once(way: str) -> Cost:
        shutil.rmtree(outs[way], ignore_errors=True)
        return timed(commands(folder, outs[way])[way], folder / "log")

    for way in WAYS:  # for the disk's cache and for bytecode
        once(way)
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    cold: dict[str, list[Cost]] = {way: [] for way in (STREAM, COPY)}
    for _ in range(times):
        for way in WAYS:
            costs[way].append(once(way))
        for way, found in cold.items():
            forget(base)
            found.append(once(way))
    if json.loads((folder / "merge.json").read_text(encoding="utf-8"))["way"] != "stream":
        raise RuntimeError("it was not streamed: " + (folder / "log").read_text(encoding="utf-8"))
    same, tensors = aside(equal, outs[EXPORT], outs[STREAM])
    return Measured(sum(file.stat().st_size for file in base), costs, cold, same, tensors)


def forget(files: Sequence[Path]) -> None:
    """Have the kernel keep nothing of them in memory."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def aside(work: Callable[..., Any], *given: Any) -> Any:
    """Done in a process of its own: the peak of a child counts from what its parent held when it was started."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def equal(one: Path, other: Path) -> tuple[int, int]:
    """Tensors with the same bytes, of all of ``one``."""
    from pkuslurm.payload.spans import layout

    def tensors(place: Path) -> dict[str, tuple[Path, int, int]]:
        return {
            span.name: (file, span.start, span.end - span.start)
            for file in place.glob("*.safetensors")
            for span in layout(file).spans
        }

    left, right = tensors(one), tensors(other)
    same = sum(name in right and _bytes(*left[name]) == _bytes(*right[name]) for name in left)
    return same, len(left | right)


def _bytes(file: Path, start: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)


HEAD = """\
{written} {versions}.
`llamafactory-cli export` and the merge job's own program, which streams and proves every number, each a whole process
with its bytecode written; beside them `cp -r` of the base with a sync of its files (streaming syncs too). LoRA of rank
{rank} on all linear layers, bf16, random numbers; median of {times}, in turns, `OMP_NUM_THREADS={threads}`. *From the
disk*: no file of the base was in memory, as where another node has trained.

"""


def rows(found: Measured) -> list[list[str]]:
    """The table's, of one base."""
    whole = _median(found.costs[EXPORT], "seconds"), _median(found.costs[EXPORT], "megabytes")
    made = []
    for costs, whence in ((found.costs, ""), (found.cold, ", from the disk")):
        for way, some in costs.items():
            seconds, megabytes = _median(some, "seconds"), _median(some, "megabytes")
            made.append(
                [
                    f"{found.size / 1e6:,.0f} MB" if not made else "",
                    f"`{way}`{whence}",
                    f"{seconds:.2f}",
                    f"{seconds / whole[0]:.3f}" if not whence else "",
                    f"{seconds / _median(costs[COPY], 'seconds'):.2f}",
                    f"{megabytes:,.0f}",
                    f"{megabytes / whole[1]:.3f}" if not whence else "",
                    f"{found.same} of {found.tensors}" if way == STREAM and not whence else "",
                ]
            )
    return made


def _median(costs: Sequence[Cost], name: str) -> float:
    return statistics.median(getattr(cost, name) for cost in costs)


def main() -> None:
    from pkuslurm.payload import tiny_model
    from pkuslurm.payload.files import versions

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name) / "tiny"
        aside(tiny_model.ensure, tokenizer)
        for label in sys.argv[1:] or SIZES:
            folder = Path(name) / label
            aside(make, folder, SIZES[label], tokenizer)
            lines += rows(measured(folder))
            shutil.rmtree(folder)
    told = ", ".join(f"{package} {version}" for package, version in versions().items() if package != "python")
    head = HEAD.format(
        written=written("tests/bench/merge.py"),
        versions=told,
        rank=RANK,
        times=TIMES,
        threads=os.environ["OMP_NUM_THREADS"],
    )
    names = ("base", "", "seconds", "× export", "× copy", "peak memory (MB)", "× export", "equal tensors")
    section("Merges", head + table(names, lines, left=2))


if __name__ == "__main__":
    main()
