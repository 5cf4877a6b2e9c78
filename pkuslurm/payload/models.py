"""What merge and infer share: reading a model folder's files, loading it, its size against the memory, and the proof
that a folder holds exactly the tensors it should. Heavy imports are inside the functions that need them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import refuse

GIB = 1 << 30
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class Unequal(Exception):
    """The folder does not hold what it should; the text names the tensor. ``names``: already its names differ."""

    def __init__(self, message: str, names: bool = False) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Proof:
    """``tensors`` of the files were compared, all ``equal``; ``dtype`` of the files, ``mixed`` if several."""

    tensors: int
    equal: int
    max_abs_diff: float
    dtype: str


def check_base(field: str, path: str) -> Path:
    """The model folder ``path``, or a refusal in words (exit code 2)."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        refuse(f"{field} {path}: no config.json is there; name a folder that holds a model")
    return folder


def check_adapter(field: str, path: str) -> Path:
    """The adapter folder ``path``, or a refusal in words (exit code 2)."""
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        refuse(f"{field} {path}: no adapter_config.json is there; train first, or name the folder that holds it")
    if not (folder / "adapter_model.safetensors").is_file():
        if list(folder.glob("*.bin")):
            refuse(f"{field} {path}: its weights are .bin, which is code when read; save it as safetensors")
        refuse(f"{field} {path}: no adapter_model.safetensors is there; train again")
    if "," in path:
        refuse(f"{field} {path}: LLaMA-Factory reads a comma as two adapters; move the run to a path without one")
    return folder


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name → {dtype, shape, data_offsets}. Raises OSError, ValueError."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > 100_000_000:
            raise ValueError(f"{file}: no safetensors file")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read: those of the index, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [file for file in [folder / "model.safetensors"] if file.is_file()]


def model_dtype(folder: Path) -> str:
    """The dtype that ``dtype="auto"`` gives, as torch calls it: the config's, else that of the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        named = part.get("dtype") or part.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    for file in weight_files(folder):
        for tensor in read_header(file).values():
            if tensor["dtype"] in _DTYPES:
                return _DTYPES[tensor["dtype"]]
    return "float32"


def count_parameters(folder: Path) -> int:
    """How many numbers the folder's weights hold."""
    total = 0
    for file in weight_files(folder):
        for tensor in read_header(file).values():
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    # other formats are not opened: two bytes a number is the usual case
    return total or sum(file.stat().st_size for file in folder.glob("*.bin")) // 2


def available_memory(device: str) -> int:
    """Bytes that this process can still take on ``device``: cpu, or an accelerator's name in torch."""
    if device != "cpu":
        import torch

        return int(getattr(torch, device.partition(":")[0]).mem_get_info()[0])
    found = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    # a job's share of the node: Slurm sets it in the cgroup, and meminfo shows the whole machine
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                found += _cgroup(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                found += _cgroup(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return max(0, min(found)) if found else 4 * GIB


def _cgroup(root: Path, path: str, limit: str, used: str) -> Iterator[int]:
    folder = root / path.lstrip("/")
    for part in (folder, *folder.parents):
        with suppress(OSError, ValueError):
            free = int((part / limit).read_text()) - int((part / used).read_text())
            with suppress(OSError):
                # the page cache is given back when memory is asked for
                for line in (part / "memory.stat").read_text().splitlines():
                    if line.startswith(("inactive_file ", "total_inactive_file ")):
                        free += int(line.split()[1])
                        break
            yield free
        if part == root:
            return


def load_model(folder: Path, dtype: str, trust_remote_code: bool = False, **more: Any) -> Any:
    """The model in ``folder`` by plain transformers, for inference; ``dtype`` as torch calls it, or ``auto``.

    The class is the one that LLaMA-Factory takes. With ``output_loading_info`` a pair, as in transformers."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    image_text = transformers.AutoModelForImageTextToText
    known = type(config) in image_text._model_mapping.keys()  # noqa: SIM118  (a lazy mapping, not a dict)
    kind = image_text if known else transformers.AutoModelForCausalLM
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    more["dtype" if version >= (4, 56) else "torch_dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **more)


def free_memory() -> None:
    """Give back what dropped models held: call it after the last reference is gone."""
    import torch

    gc.collect()
    for name in ("cuda", "npu"):
        device = getattr(torch, name, None)
        if device is not None and device.is_available():
            device.empty_cache()


def has_accelerator() -> bool:
    """Whether torch sees a GPU or an NPU."""
    import torch

    return any(
        getattr(torch, name, None) is not None and getattr(torch, name).is_available() for name in ("cuda", "npu")
    )


def prove(expected: Mapping[str, Any], folder: Path) -> Proof:
    """Compare each tensor in the files of ``folder`` with ``expected`` (name → tensor), rounded to the file's dtype.

    Names that share memory are one tensor: one of them must be there, and each that is there must be equal.
    Raises Unequal."""
    from safetensors import safe_open

    files = weight_files(folder)
    if not files or any(not file.is_file() for file in files):
        raise Unequal(f"{folder}: weights are missing", names=True)
    seen: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):
            if name in seen:
                raise Unequal(f"tensor {name} is in two files, {seen[name].name} and {file.name}", names=True)
            seen[name] = file
    _same_names(expected, seen, folder)
    dtypes, wrong, greatest, first = set(), 0, 0.0, ""
    for file in files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (not a dict)
                found = stream.get_tensor(name)
                dtypes.add(str(found.dtype).removeprefix("torch."))
                difference = _difference(expected[name], found)
                if difference is not None:
                    wrong += 1
                    first = first or f"{name} ({difference[1]})"
                    greatest = max(greatest, difference[0])
    if wrong:
        raise Unequal(f"tensor {first} is not the expected one; {wrong} of {len(seen)} tensors differ")
    dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
    return Proof(tensors=len(seen), equal=len(seen), max_abs_diff=greatest, dtype=dtype)


def _same_names(expected: Mapping[str, Any], seen: Mapping[str, Path], folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        actual = {name: file.name for name, file in seen.items()}
        for name in sorted(listed.keys() ^ actual.keys()) or sorted(n for n in actual if listed[n] != actual[n]):
            raise Unequal(f"tensor {name}: the index and the files do not agree", names=True)
    for name in sorted(seen.keys() - expected.keys()):
        raise Unequal(f"tensor {name} of the file is left over: the model has none of that name", names=True)
    for group in _tied(expected):
        if not any(name in seen for name in group):
            raise Unequal(f"tensor {group[0]} is missing from the files", names=True)


def _tied(tensors: Mapping[str, Any]) -> list[list[str]]:
    """The names, those that are views of one and the same memory together."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() and tensor.device.type != "meta"
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if shared else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _difference(wanted: Any, found: Any) -> tuple[float, str] | None:
    import torch

    if tuple(wanted.shape) != tuple(found.shape):
        return float("inf"), f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    wanted = wanted.detach().to(found.dtype).cpu()
    if torch.equal(wanted, found):
        return None
    if not bool(torch.isfinite(found).all()):
        return float("inf"), "it has numbers that are not finite"
    difference = float((wanted.double() - found.double()).abs().max())
    return difference, f"off by up to {difference:.3g}"


def prove_loaded(expected: Mapping[str, Any], folder: Path, trust_remote_code: bool = False) -> Proof:
    """As ``prove``, but through transformers' loading: for models whose tensors have other names in the files than in
    memory (transformers 5 joins the experts of some). Takes the memory of a second model. Raises Unequal."""
    model = load_whole(folder, trust_remote_code)
    loaded = model.state_dict()
    for name in sorted(loaded.keys() ^ expected.keys()):
        raise Unequal(f"tensor {name} is in only one of the model and its files", names=True)
    dtypes, wrong = set(), []
    for name, found in loaded.items():
        dtypes.add(str(found.dtype).removeprefix("torch."))
        difference = _difference(expected[name], found)
        if difference is not None:
            wrong.append(f"{name} ({difference[1]})")
    if wrong:
        raise Unequal(f"tensor {wrong[0]} is not the expected one; {len(wrong)} of {len(loaded)} tensors differ")
    dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
    return Proof(tensors=len(loaded), equal=len(loaded), max_abs_diff=0.0, dtype=dtype)


def load_whole(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model in ``folder``, with no tensor made up, left over or of another shape. Raises Unequal."""
    model, info = load_model(folder, "auto", trust_remote_code, output_loading_info=True)
    for kind, what in (
        ("missing_keys", "missing from the files"),
        ("unexpected_keys", "left over in the files"),
        ("mismatched_keys", "of another shape in the files"),
    ):
        for name in sorted(info.get(kind) or (), key=str):
            raise Unequal(f"tensor {name if isinstance(name, str) else name[0]} is {what}", names=True)
    return model


def quiet() -> None:
    """Progress bars are for terminals; a log gets lines."""
    import sys

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
