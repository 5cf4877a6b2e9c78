"""Which of a train.yaml's arguments shape the tokenized rows. LLaMA-Factory's source is read, not imported."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .files import refuse

# of the model's arguments, those that shape a tokenizer or a processor
_TOKENIZER_KEYS = (
    "model_name_or_path",
    "trust_remote_code",
    "use_fast_tokenizer",
    "split_special_tokens",
    "add_tokens",
    "add_special_tokens",
    "new_special_tokens_config",
    "use_audio_in_video",
    "crop_to_patches",
)
_PROCESSOR_PREFIXES = ("image_", "video_", "audio_")
_TRAINING_KEYS = ("stage", "seed", "do_train", "do_eval", "do_predict", "predict_with_generate")
# data keys without influence on the rows (or, tokenized_path and streaming, ours to decide)
_IDLE_KEYS = {
    "dataset_dir",
    "tokenized_path",
    "overwrite_cache",
    "preprocessing_num_workers",
    "data_shared_file_system",
    "streaming",
    "buffer_size",
}


def data_keys() -> frozenset[str]:
    """The names of the installed LLaMA-Factory's data arguments, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("llamafactory")
    if spec is None or not spec.submodule_search_locations:
        refuse(
            f"cluster.python={sys.executable}: it has no LLaMA-Factory; name one that has (pip install llamafactory)"
        )
    source = Path(next(iter(spec.submodule_search_locations))) / "hparams" / "data_args.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "DataArguments"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def shaping_args(args: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Of a train.yaml's arguments, those that shape the rows; ``keys`` are LLaMA-Factory's data arguments."""
    return {
        name: value
        for name, value in args.items()
        if (name in keys and name not in _IDLE_KEYS)
        or name in _TOKENIZER_KEYS
        or name in _TRAINING_KEYS
        or name.startswith(_PROCESSOR_PREFIXES)
    }
