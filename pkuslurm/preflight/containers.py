"""The image and its runtime, looked for before anything is written. Reads; starts nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from pkuslurm.config.schema import Config
from pkuslurm.containers import RUNTIMES, refuse_splitting
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.inputs import Inputs
from pkuslurm.preflight.nearest import nearest_to
from pkuslurm.render.containers import image_of, is_name, places

# How an image is made where no registry can be reached: of what `docker save` wrote elsewhere, or of a folder.
_SAVED = "elsewhere `docker save -o image.tar NAME`, here"
HOW: Mapping[str, str] = {
    "apptainer": f"{_SAVED} `apptainer build image.sif docker-archive://image.tar`",
    "singularity": f"{_SAVED} `singularity build image.sif docker-archive://image.tar`",
    "charliecloud": "elsewhere `ch-convert -i docker NAME image.sqfs`, or `mksquashfs FOLDER image.sqfs`",
    "docker": f"{_SAVED} `docker load -i image.tar`",
    "podman": f"{_SAVED} `podman load -i image.tar`",
    "enroot": "elsewhere `enroot import -o image.sqsh dockerd://NAME`",
    "pyxis": "elsewhere `enroot import -o image.sqsh dockerd://NAME`",
}


def check_image(config: Config) -> None:
    """Raise PkuslurmError for an image that is not there, or that this runtime runs under no such name."""
    runtime, given = config.container.runtime, str(config.container.image)
    if runtime == "none":
        return
    image = image_of(config)
    if is_name(runtime, given):
        if not RUNTIMES[runtime].registry and "://" not in given:
            fetched = f"; write docker://{given} to have it fetched" if runtime != "charliecloud" else ""
            raise PkuslurmError(
                f"container.image={given}: this is a name in a registry, and {runtime} runs files{fetched}; "
                f"without a registry: {HOW[runtime]}"
            )
    elif not Path(image).exists():
        raise PkuslurmError(
            f"container.image={given}: there is no such file{nearest_to(Path(image))}; "
            f"without a registry: {HOW[runtime]} (docs/containers.md)"
        )


def check_runtime(config: Config, environ: Mapping[str, str]) -> str | None:
    """A note where the runtime is not on this machine but may be on the nodes. Raises PkuslurmError where it runs."""
    runtime = config.container.runtime
    program = RUNTIMES[runtime].program
    if not program or shutil.which(program, path=environ.get("PATH")):
        return None
    if config.cluster.executor != "slurm":
        raise PkuslurmError(f"container.runtime={runtime}: {program} is not installed here; install it, or another one")
    return f"container: {program} is not on this machine; the nodes must have it (cluster.setup may load it)"


def check_places(config: Config, inputs: Inputs) -> None:
    """Raise PkuslurmError for a path of the run that the runtime's options would make two of."""
    if config.container.runtime != "none":
        refuse_splitting(config.container.runtime, places(config, inputs))
