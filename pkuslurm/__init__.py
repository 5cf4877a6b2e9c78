"""pkuslurm: from a base model and a small dataset to a fine-tuned model that answers, in one command."""

import os
import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036  # in words that any Python 3 reads: an image may bring an old one
    _HERE = "{}.{}".format(*sys.version_info[:2])
    sys.stderr.write(
        f"pkuslurm: 这里的 Python 是 {_HERE}，需要 3.11 以上；this Python is {_HERE}, 3.11 or newer is needed: take "
        f"another image, or start pkuslurm with another Python and name this one: cluster.python={sys.executable}\n"
    )
    sys.exit(2)

_BUNDLED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bundled")  # noqa: PTH120  # without pathlib


def _bundle() -> None:
    """What `make bundle` laid beside us. What the image has wins, but for hydra, omegaconf and antlr4, which only fit
    each other: they are all the image's, or all ours. A training never sees them: it starts without this package."""
    from importlib.util import find_spec

    sys.path.append(os.path.join(_BUNDLED, "last"))
    sys.path.insert(len(sys.path) if find_spec("hydra") else 0, os.path.join(_BUNDLED, "hydra"))


if os.path.isdir(_BUNDLED):
    _bundle()
