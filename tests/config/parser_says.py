"""Ask the real LLaMA-Factory what it says to rows of train keys. Run by a python that has one; JSON in and out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def main() -> None:
    # a rank of torchrun, as a run's always are
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error", "LLAMAFACTORY_VERBOSITY": "ERROR"}
    from accelerate.state import PartialState
    from llamafactory.hparams import get_train_args

    def says(train: dict[str, Any]) -> str | None:
        with tempfile.TemporaryDirectory() as output:
            needed = {"model_name_or_path": "/m", "dataset": "d", "template": "qwen", "output_dir": output}
            own = {"do_train": True, "use_cpu": True, "report_to": "none"}
            variables = dict(os.environ)
            try:
                get_train_args({**needed, **own, **train})
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            finally:  # transformers keeps settings in the environment
                os.environ.clear()
                os.environ.update(variables)
                PartialState._reset_state()
        return None

    answers = [says(train) for train in json.load(sys.stdin)]
    print("ANSWERS " + json.dumps(answers))


if __name__ == "__main__":
    main()
