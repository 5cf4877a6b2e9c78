"""Imported before everything else of ours: Ctrl-C while a command is still being loaded ends it without a traceback."""

import atexit
import gc
import signal
import sys

# Hydra makes a hundred thousand objects that stay: a third of launch went into looking for garbage among them
gc.set_threshold(100_000)
atexit.register(gc.freeze)  # and once more as much, at the end, where all of them go anyway
_SPEC = getattr(sys.modules.get("__main__"), "__spec__", None)
_OURS = _SPEC is not None and _SPEC.name.startswith("pkuslurm")
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ready() -> None:
    """From now on Ctrl-C is ours to handle."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
