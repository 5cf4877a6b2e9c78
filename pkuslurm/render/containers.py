"""What a job's container is told: the image, and every path that the job touches. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkuslurm.config.schema import Config
from pkuslurm.containers import IF_THERE, RUNTIMES, WORKERS, Container, around, outermost, wrap
from pkuslurm.paths import absolute
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.resources import cluster_for

# the image's own python, where cluster.python names none
PYTHON = "python3"


def container_of(
    config: Config, kind: str, inputs: Inputs, env: Mapping[str, str], package: Path
) -> dict[str, Any] | None:
    """The job file's container; ``package``: where pkuslurm's payloads are. The report is written outside, by us."""
    if config.container.runtime == "none" or kind == "report":
        return None
    accelerator = cluster_for(config, kind).accelerator
    return {
        "runtime": config.container.runtime,
        "image": image_of(config),
        "accelerator": accelerator,
        "mounts": outermost([*places(config, inputs), str(package)]),
        "if_there": list(IF_THERE[accelerator]),
        "home": env.get("HOME") or str(Path(absolute(config.cache_root)) / "home"),
    }


def as_shown(job: Mapping[str, Any]) -> list[str]:
    """The job file's command as its nodes will start it, with what only they know named or not yet looked for."""
    described = job["container"]
    if described is None:
        return list(job["command"])
    lists = {name: tuple(described[name]) for name in ("mounts", "if_there")}
    container = Container(**described | lists, cwd=job["run_dir"])
    names = sorted({*job["env"], *job["env_names"], *WORKERS} - {"HOME"})
    return wrap(container, job["command"], names, [*described["mounts"], *described["if_there"]])


def image_of(config: Config) -> str:
    """A path from the root; a name in a registry, or of a container that enroot has, as it is given."""
    image = str(config.container.image)
    return image if is_name(config.container.runtime, image) else absolute(image)


def is_name(runtime: str, image: str) -> bool:
    """Whether ``image`` is no path; files tell by how they begin and end, names by their tag."""
    if image.startswith(("/", "./", "../", "~")) or image.endswith((".sif", ".sqsh", ".sqfs", ".squashfs", ".img")):
        return False
    return RUNTIMES[runtime].registry or ":" in image


def places(config: Config, inputs: Inputs) -> list[str]:
    """All that the jobs of the run read and write, in the order in which a person would name them."""
    found = [absolute(config.run_root), absolute(config.cache_root)]
    found += [path for path in (inputs.model_path, inputs.base, inputs.adapter) if path and path.startswith("/")]
    files = [inputs.dataset_file, *(source.file for source in inputs.more)]
    found += [around(file) for file in files if file.startswith("/")]  # pictures lie beside it
    found += filter(None, [inputs.media_dir, *(inputs.start or "").split(",")])
    found += [path for value in inputs.paths.values() for path in value.split(",") if path.startswith("/")]
    if (given := config.merge.get("export_dir")) is not None:
        found.append(around(absolute(str(given))))
    deepspeed = config.train.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed and not deepspeed.startswith("{"):
        found.append(absolute(deepspeed))
    return found
