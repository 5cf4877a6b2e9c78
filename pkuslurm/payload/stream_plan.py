"""What a merge by streaming will change, and whether it can be as LLaMA-Factory's export would do it. Reads headers and
settings only.

What is not known to be exact is left to the export: an unknown setting, a tensor of the adapter that has no place, a
kind of layer that was never compared.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .spans import FLOATS, Layout, Span, layout

PREFIX = "base_model.model."
# what follows a module's name in the adapter's file → which part of its change it is
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_A.weight": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_embedding_B.weight": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_LORA = {frozenset("AB"): "lora", frozenset(("A", "B", "magnitude")): "dora"}
_KINDS = _LORA | {frozenset(("embedding_A", "embedding_B")): "embedding"}
# of adapter_config.json: these say nothing of the weights, or are looked at below; all others must be empty
_KNOWN = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
        "bias",
    }
)
# of merge.yaml: these change nothing in the files, or are looked at below
_KEYS = frozenset(
    {
        "model_name_or_path",
        "adapter_name_or_path",
        "template",
        "finetuning_type",
        "export_dir",
        "export_size",
        "export_device",
        "export_legacy_format",
        "infer_dtype",
        "trust_remote_code",
        "stage",
        "enable_thinking",
    }
)
DEFAULT_SIZE = 5
_PIECE = 1 << 22
# their layers keep the weight the other way round, or share it in ways of their own
_OTHER_WAY = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl"))


class NotStreamable(Exception):
    """Why the export must do it, in a few words."""


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base: ``kind`` is lora, dora, embedding or whole (another tensor is put
    there); ``parts`` are spans of the adapter's file."""

    kind: str
    parts: Mapping[str, Span]


@dataclass(frozen=True)
class Plan:
    """The base's files, the adapter's file and what it changes in them: name → change."""

    files: tuple[Layout, ...]
    adapter: Layout
    changes: Mapping[str, Change]
    scale: float
    dtype: str

    @property
    def tensors(self) -> int:
        return sum(len(file.spans) for file in self.files)


def plan(args: Mapping[str, Any], base: Path, adapter: Path) -> Plan:
    """Raises NotStreamable, OSError, ValueError: then the export must do it."""
    config = _object(base / "config.json")
    settings = _object(adapter / "adapter_config.json")
    dtype = _dtype(config)
    _check_keys(args, dtype)
    _check_model(config, args.get("trust_remote_code") is True)
    _check_settings(settings)
    files = _files(base)
    _check_files(files, args.get("export_size", DEFAULT_SIZE), dtype)
    places = {span.name: span for file in files for span in file.spans}
    source = layout(adapter / "adapter_model.safetensors")
    copies = _copies(source, files, settings)
    changes = _changes([span for span in source.spans if span.name not in copies], places, settings)
    _check_complete(changes, places, settings)
    _check_shared(changes, places, config)
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return Plan(tuple(files), source, changes, scale, FLOATS[dtype])


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise NotStreamable(f"{path.name} holds no keys and values")
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    named = config.get("dtype") or config.get("torch_dtype")
    for code in ("BF16", "F16", "F32"):
        if named in (FLOATS[code], f"torch.{FLOATS[code]}"):
            return code
    raise NotStreamable(f"the base's dtype is {named}")


def _check_keys(args: Mapping[str, Any], dtype: str) -> None:
    for key in sorted(args.keys() - _KEYS):
        if args[key] not in (None, False):
            raise NotStreamable(f"merge.{key} is for LLaMA-Factory's export")
    if args.get("finetuning_type", "lora") != "lora":
        raise NotStreamable(f"finetuning_type is {args['finetuning_type']}")
    if args.get("stage", "sft") not in ("pt", "sft", "dpo", "kto"):
        raise NotStreamable(f"stage {args['stage']} has more than the model's own weights")
    if args.get("export_legacy_format"):
        raise NotStreamable("export_legacy_format is asked for")
    if args.get("infer_dtype", "auto") not in ("auto", FLOATS[dtype]):
        raise NotStreamable(f"infer_dtype {args['infer_dtype']} is not the base's")


def _check_model(config: Mapping[str, Any], trusted: bool) -> None:
    # untrusted, that code is not loaded: it is a model that transformers knows, and the export would die of it
    if config.get("auto_map") and trusted:
        raise NotStreamable("the base brings code of its own")
    if config.get("model_type") in _OTHER_WAY or not config.get("model_type"):
        raise NotStreamable(f"models of type {config.get('model_type')} keep their weights in another way")
    for key, value in config.items():
        if key.endswith("_config") and value:
            raise NotStreamable(f"the base has a {key}")


def _check_settings(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise NotStreamable(f"the adapter is {settings.get('peft_type')}")
    for key in sorted(settings.keys() - _KNOWN):
        if settings[key]:
            raise NotStreamable(f"the adapter has {key}")
    if settings.get("bias", "none") != "none":
        raise NotStreamable(f"the adapter has bias {settings['bias']}")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise NotStreamable(f"the adapter began as {settings['init_lora_weights']}, which changes the base")
    if settings.get("use_dora") and platform.machine() not in ("x86_64", "AMD64"):
        raise NotStreamable("DoRA's norms are known on x86 only")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            raise NotStreamable(f"the adapter's {key} is {settings.get(key)}")


def _files(base: Path) -> list[Layout]:
    index, single = base / "model.safetensors.index.json", base / "model.safetensors"
    if index.is_file() == single.is_file():
        raise NotStreamable("the base has no safetensors weights" if not single.is_file() else "it has them twice")
    if single.is_file():
        return [layout(single)]
    listed = _object(index)["weight_map"]
    names = sorted(set(listed.values()))
    if any(Path(name).name != name for name in names):
        raise NotStreamable("the base's index names files elsewhere")
    files = [layout(base / name) for name in names]
    found = [(span.name, file.path.name) for file in files for span in file.spans]
    if len(dict(found)) != len(found) or dict(found) != listed:
        raise NotStreamable("the base's index and its files do not agree")
    return files


def _check_files(files: list[Layout], size: Any, dtype: str) -> None:
    largest = max(file.size for file in files)
    if size != DEFAULT_SIZE and largest > float(size) * 1e9:
        raise NotStreamable(f"export_size {size}: a file of the base has {largest / 1e9:.1f} GB")
    for file in files:
        for span in file.spans:
            # loading and saving would make them one
            if span.dtype in FLOATS and span.dtype != dtype:
                raise NotStreamable(f"{span.name} is {FLOATS[span.dtype]} in a model of {FLOATS[dtype]}")


def _copies(source: Layout, files: list[Layout], settings: Mapping[str, Any]) -> set[str]:
    """Tensors of the base that PEFT saved with the adapter, beside those for an embedding: they must still be equal."""
    found = set()
    places = {span.name: (file, span) for file in files for span in file.spans}
    for span in source.spans:
        name = span.name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name not in places or _is_saved(name, settings):
            continue
        file, place = places[name]
        if (span.dtype, span.shape) != (place.dtype, place.shape) or not _equal(source.path, span, file.path, place):
            raise NotStreamable(f"adapter tensor {span.name} is not the base's")
        found.add(span.name)
    return found


def _equal(one: Path, span: Span, other: Path, place: Span) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(span.start), right.seek(place.start)
        for start in range(span.start, span.end, _PIECE):
            size = min(_PIECE, span.end - start)
            if left.read(size) != right.read(size):
                return False
    return True


def _changes(spans: list[Span], places: Mapping[str, Span], settings: Mapping[str, Any]) -> dict[str, Change]:
    """Every tensor of the adapter has its place and the shape for it. Raises NotStreamable."""
    parts: dict[str, dict[str, Span]] = {}
    changes: dict[str, Change] = {}
    for span in spans:
        if span.dtype not in ("F32", "F16", "BF16"):
            raise NotStreamable(f"adapter tensor {span.name} is {span.dtype}")
        if not span.name.startswith(PREFIX):
            raise NotStreamable(f"adapter tensor {span.name} has no place in the base")
        name = span.name.removeprefix(PREFIX)
        suffix = next((end for end in sorted(_PARTS, key=len, reverse=True) if name.endswith("." + end)), None)
        if suffix is None:
            changes[_whole(name, span, places, settings)] = Change("whole", {"whole": span})
            continue
        found = parts.setdefault(name.removesuffix("." + suffix), {})
        if _PARTS[suffix] in found:
            raise NotStreamable(f"adapter tensor {span.name} is there twice")
        found[_PARTS[suffix]] = span
    for module, found in parts.items():
        name = f"{module}.weight"
        place = places.get(name)
        kind = _KINDS.get(frozenset(found))
        first = next(iter(found.values())).name
        if place is None or name in changes:
            raise NotStreamable(f"adapter tensor {first} has no place in the base")
        if place.dtype not in ("F32", "F16", "BF16"):
            raise NotStreamable(f"{name} is {place.dtype}")
        if kind is None or (kind == "dora") != bool(settings.get("use_dora")):
            raise NotStreamable(f"adapter tensor {first}: its layer has {', '.join(sorted(found))}")
        wanted = _shapes(kind, place.shape, int(settings["r"]))
        if wanted != {part: span.shape for part, span in found.items()}:
            raise NotStreamable(f"adapter tensor {first} has another shape than its layer and rank")
        changes[name] = Change(kind, found)
    return changes


def _shapes(kind: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    if len(shape) != 2:
        return {}
    rows, columns = shape
    if kind == "embedding":
        return {"embedding_A": (rank, rows), "embedding_B": (columns, rank)}
    return {"A": (rank, columns), "B": (rows, rank)} | ({"magnitude": (rows,)} if kind == "dora" else {})


def _whole(name: str, span: Span, places: Mapping[str, Span], settings: Mapping[str, Any]) -> str:
    """A tensor that takes the place of the base's: additional_target."""
    place = places.get(name)
    if place is None or place.shape != span.shape or place.dtype not in ("F32", "F16", "BF16"):
        raise NotStreamable(f"adapter tensor {span.name} has no place in the base")
    if not _is_saved(name, settings):
        raise NotStreamable(f"adapter tensor {span.name} is not of modules_to_save")
    return name


def _is_saved(name: str, settings: Mapping[str, Any]) -> bool:
    # as PEFT does: the end of a name is enough
    return name.rpartition(".")[0].endswith(tuple(settings.get("modules_to_save") or ()))


def _check_complete(changes: Mapping[str, Change], places: Mapping[str, Span], settings: Mapping[str, Any]) -> None:
    """Each layer that the adapter is for is in its file, and no other."""
    for whole in (False, True):
        meant = {name for name in places if _is_saved(name, settings)} if whole else set(_meant(places, settings))
        changed = {name for name, change in changes.items() if (change.kind == "whole") is whole}
        for name in sorted(meant ^ changed):
            raise NotStreamable(f"the adapter {'has nothing' if name in meant else 'was not'} for {name}")
    if not changes:
        raise NotStreamable("the adapter is empty")


def _meant(places: Mapping[str, Span], settings: Mapping[str, Any]) -> Iterator[str]:
    targets = settings.get("target_modules")
    for name in places:
        module, _, last = name.rpartition(".")
        if last != "weight" or not targets:
            continue
        if isinstance(targets, str):
            # as PEFT does
            if re.fullmatch(targets, module):
                yield name
        elif any(module == target or module.endswith(f".{target}") for target in targets):
            yield name


def _check_shared(changes: Mapping[str, Change], places: Mapping[str, Span], config: Mapping[str, Any]) -> None:
    """What is the input's and the output's at once cannot become two."""
    if config.get("tie_word_embeddings") is False:
        return
    for name, change in changes.items():
        if change.kind in ("embedding", "whole") or config.get("vocab_size") in (None, places[name].shape[0]):
            raise NotStreamable(f"{name} may be shared between the base's input and output")
