"""Which of a training's checkpoints can be trusted. The others are moved aside, never deleted.

LLaMA-Factory goes on from the highest number without looking inside: a torn file ends the training, and a checkpoint
without its optimizer silently starts the learning rate anew.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.rundir import read_json
from pkuslurm.worker import completion

_NAME = re.compile(r"checkpoint-(\d+)")
# what only a training needs that goes on; the rest of a last checkpoint is what its training was to leave
_TRAINERS_OWN = re.compile(r"optimizer|scheduler|scaler|rng_state|global_step|pytorch_model_fsdp|latest$|zero_to_fp32")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    max_steps: int


def newest(adapter: Path, weights: str, ranks: int, aside: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below ``adapter`` that a training of ``ranks`` ranks can go on from, and what is wrong with
    the newer ones, which are moved into ``aside``. ``weights``: as in the job file's expect. Raises OSError."""
    problems: list[str] = []
    for step, folder in sorted(found(adapter), reverse=True):
        try:
            return check(folder, step, weights, ranks), problems
        except completion.Incomplete as error:
            kept = _move(folder, aside)
            problems.append(f"{folder.name} cannot be gone on from ({error}); it lies in {kept}")
    return None, problems


def found(adapter: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that are called so."""
    if not adapter.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in adapter.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for match, path in named if match]


def last_step(adapter: Path) -> int:
    """The newest one's, sound or not; 0 without any."""
    return max((step for step, _ in found(adapter)), default=0)


def check(folder: Path, step: int, weights: str, ranks: int) -> Checkpoint:
    """Raises completion.Incomplete with what is missing or torn."""
    state: dict[str, Any] | None = read_json(folder / "trainer_state.json")
    if state is None:
        raise completion.Incomplete("trainer_state.json is not there or torn")
    if state.get("global_step") != step:
        raise completion.Incomplete(f"trainer_state.json is of step {state.get('global_step')}")
    if (folder / "latest").is_file():
        _deepspeed(folder, ranks)  # ZeRO-3 keeps the weights in its shards, and its own scheduler, too
    else:
        if weights == "model" and not (folder / "pytorch_model_fsdp_0").is_dir():
            completion.model_weights(folder)
        elif weights != "model":
            completion.spans(folder / weights)
        _zip(folder / "scheduler.pt")
        _optimizer(folder)
    # transformers numbers them only where there are several
    for name in ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]:
        _zip(folder / name)
    most = state.get("max_steps")
    return Checkpoint(folder, step, most if isinstance(most, int) else 0)


def _optimizer(folder: Path) -> None:
    if (folder / "optimizer_0" / ".metadata").is_file():  # FSDP's, in pieces
        return
    file = folder / "optimizer.bin"
    if not file.exists():
        file = folder / "optimizer.pt"
    if not file.exists():
        raise completion.Incomplete("no optimizer.pt (train.save_only_model?): its learning rate would restart")
    _zip(file)


def _deepspeed(folder: Path, ranks: int) -> None:
    shards = folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    optimizers = sorted(shards.glob("*_optim_states.pt"))
    if len(optimizers) not in (1, ranks):
        raise completion.Incomplete(f"{shards.name}: {len(optimizers)} optimizer shards, {ranks} ranks")
    for file in shards.glob("*.pt"):
        _zip(file)


def _zip(file: Path) -> None:
    """What torch.save writes is a zip archive, whose directory stands at its end: a torn one has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            archive.infolist()
    except FileNotFoundError:
        raise completion.Incomplete(f"no {file.name}") from None
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise completion.Incomplete(f"{file.name} is torn ({error})") from None


def _move(folder: Path, aside: Path) -> Path:
    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    target, number = aside / folder.name, 1
    while target.exists():
        number += 1
        target = aside / f"{folder.name}.{number}"
    folder.rename(target)
    return target


def finish(checkpoint: Checkpoint, source: Path, adapter: Path) -> None:
    """Fill ``adapter`` with what ``source`` holds and the last step's state: that was missing when it was cut off.

    Going on from it instead would train a step too many where an epoch had not ended. Raises OSError.
    """
    state = "trainer_state.json"
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not _TRAINERS_OWN.match(path.name)]
    # last of all what tells that the training has ended
    for path in [*(path for path in files if path.name != state), checkpoint.path / state]:
        temporary = adapter / f".{path.name}.part"
        shutil.copyfile(path, temporary)
        temporary.replace(adapter / path.name)
