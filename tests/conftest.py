"""Options that choose a part of the table of tests: `--backend NAME` and `--thin`."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import emulated_cuda
import pytest

# The installed package is what is tested. `python -m pytest` puts the checkout, where it is
# called from, before it; so does `python -c` in a process that a test starts without a folder.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if emulated_cuda.EMULATED:
    emulated_cuda.install()

    @pytest.fixture(autouse=True)
    def nothing_that_hardware_may_punish():
        """Fails a test in which the emulated runtime saw something wrong."""
        yield
        emulated_cuda.emulation.synchronize()
        assert emulated_cuda.emulation.take_violations() == []


#: Parameters with too many values for `--thin`, which takes any one of them: the variants of an
#: optimizer, the stories of the fuzzer.
MANY = ("options", "first")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("fusedopt")
    group.addoption(
        "--backend",
        action="append",
        help="run only what runs on this backend; give it several times for several backends",
    )
    group.addoption(
        "--thin",
        action="store_true",
        help="of the tests in a file only as many cases as it takes for every test, and each value"
        " of each parameter, to occur (of an optimizer's variants and the fuzzer's stories, one)",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the options say."""
    kept = items
    if backends := config.getoption("--backend"):
        kept = [item for item in kept if _params(item).get("backend") in backends]
    if config.getoption("--thin"):
        kept = _thinned(kept)
    if left_out := [item for item in items if item not in set(kept)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _thinned(items: list[pytest.Item]) -> list[pytest.Item]:
    by_file = defaultdict(list)
    for item in items:
        by_file[item.path].append(item)
    chosen = {item for cases in by_file.values() for item in _cover(cases)}
    return [item for item in items if item in chosen]


def _cover(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Cases of every test in which each value of each parameter occurs, as few as will do."""
    values = {
        case: {(name, id(value)) for name, value in _params(case).items() if name not in MANY}
        for case in cases
    }
    wanted = set().union(*values.values())
    chosen = []

    def choose(among: list[pytest.Item]) -> None:
        best = max(among, key=lambda case: len(values[case] & wanted))
        chosen.append(best)
        wanted.difference_update(values[best])

    by_test = defaultdict(list)
    for case in cases:
        by_test[case.nodeid.partition("[")[0]].append(case)
    for of_one_test in by_test.values():
        choose(of_one_test)
    while wanted:
        choose(cases)
    return chosen
