"""`make test` in two processes (pytest-xdist): which tests stay together, and which begin first.

One process has all tests that use something single or costly. Of the others each file stays whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests import verify

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# fixture → the folders whose tests may use it. Also the order: what takes longest begins first.
TOGETHER = {
    "slurm": ("tests/cluster/", "tests/faults/"),  # one cluster, which a test may break
    "demo": ("tests/e2e/", "tests/payload/test_prefork.py", "tests/meet/"),  # one trained run, one tiny model
    "overlay": ("tests/llamafactory_094/",),  # one environment, which is installed first
}
LONG = ("tests/payload/", "tests/serve/")


def group(nodeid: str) -> str:
    """What a test shares, by its fixture's name; else its file."""
    file = nodeid.partition("::")[0]
    return next((fixture for fixture, folders in TOGETHER.items() if file.startswith(folders)), file)


def begins(nodeid: str) -> int:
    """The place of a test's group among the others."""
    mine = group(nodeid)
    order = [*TOGETHER, *LONG]
    return next((place for place, name in enumerate(order) if mine.startswith(name)), len(order))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: begins(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: two processes for all tests, none but this one where some were chosen."""
    return 2 if config.args_source == config.ArgsSource.TESTPATHS and not config.option.keyword else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # else by the number of tests
    # after Ctrl-C the cluster is taken down; ten seconds, which is the default, are few for it
    config.pluginmanager.getplugin("dsession").nodemanager.EXIT_TIMEOUT = 60
    return Together(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = verify.counted


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What each process has counted, together."""
    for name, count in getattr(node, "workeroutput", {}).get("counted", {}).items():
        verify.counted[name] += count
