"""What tells the plan that a dict was changed: version numbers or watchers, as this Python has."""

import gc
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import threading
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "versions": sys.version_info < (3, 14),
    "watchers": sys.version_info >= (3, 12),
}
#: Takes every watcher of the process.
TAKE_ALL = """
import ctypes
callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)(lambda *event: 0)
try:
    while True:
        ctypes.pythonapi.PyDict_AddWatcher(callback)
except RuntimeError:
    pass
"""


@pytest.fixture(scope="module", params=[name for name, there in WAYS.items() if there])
def library(request, tmp_path_factory):
    """The path of a module with guards that notice in one way."""
    include = sysconfig.get_path("include")
    if shutil.which("g++") is None or not Path(include, "Python.h").exists():
        pytest.skip("g++ and Python's headers are needed")
    path = tmp_path_factory.mktemp("guards") / request.param / "guards.so"
    path.parent.mkdir()
    sources = [Path(__file__).parent / "dict_guard_module.cpp", ROOT / "csrc/python/dict_guard.cpp"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    if request.param == "watchers":
        flags.append("-DFUSEDOPT_DICT_WATCHERS")
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(path)], check=True)
    return path


@pytest.fixture
def guards(library):
    """The module; its guards are let go afterwards."""
    spec = importlib.util.spec_from_file_location("guards", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.clear()


def holds(guards, number, watched):
    """Whether a guard finds the dict unchanged."""
    return guards.unchanged(number, id(watched))


CHANGES = {
    "set": lambda d: d.update(a=object()),
    "replace": lambda d: d.__setitem__("lr", 0.5),
    "delete": lambda d: d.__delitem__("lr"),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("lr"),
    "setdefault": lambda d: d.setdefault("new", 1),
    "popitem": lambda d: d.popitem(),
    "or": lambda d: d.__ior__({"b": 2}),
    "exception": lambda d: d.pop("lr", None) or 1 / 0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(guards, change):
    """By every guard of the dict, of whatever age; arming again forgets, for new guards only."""
    watched = {"lr": 0.1, "params": []}
    other = dict(watched)
    old, young, elsewhere = guards.arm(watched), guards.arm(watched), guards.arm(other)
    assert holds(guards, old, watched) and holds(guards, young, watched)
    try:
        CHANGES[change](watched)
    except ZeroDivisionError:
        pass
    assert not holds(guards, old, watched) and not holds(guards, young, watched)
    assert holds(guards, elsewhere, other)
    again = guards.arm(watched)
    assert holds(guards, again, watched) and not holds(guards, old, watched)
    watched["more"] = 1
    assert not holds(guards, again, watched)


def test_reading_changes_nothing(guards):
    """Neither do lookups, copies, views, failed writes and writes to what the dict contains."""
    watched = {"lr": 0.1, "inner": {}}
    number = guards.arm(watched)
    assert watched["lr"] and watched.get("x") is None and list(watched.items()) and watched.copy()
    watched["inner"]["a"] = 1
    watched.pop("missing", None)
    with pytest.raises(TypeError):
        watched[[]] = 1
    assert holds(guards, number, watched)


def test_a_dict_at_the_address_of_a_dead_one(guards):
    """Is another dict: only a guard armed for it finds it unchanged."""
    seen = 0
    for _ in range(100):
        watched = {"lr": 0.1}
        number, address = guards.arm(watched), id(watched)
        del watched
        successors = [{"lr": 0.1} for _ in range(10)]
        for successor in successors:
            if id(successor) == address:
                seen += 1
                assert not guards.unchanged(number, address)
                assert holds(guards, guards.arm(successor), successor)
                assert not guards.unchanged(number, address)
    assert seen > 0


def test_a_dead_dict_is_not_touched(library, guards):
    """With watchers, a guard may be asked about a dict that died, and be let go after it."""
    if library.parent.name != "watchers":
        pytest.skip("version numbers stand in the dict")
    watched = {"lr": 0.1}
    watched["self"] = watched
    number, address = guards.arm(watched), id(watched)
    del watched
    gc.collect()
    assert not guards.unchanged(number, address)


def test_guards_come_and_go(guards):
    """A dict that lost its guards is an ordinary one, and can get new ones."""
    watched = {"lr": 0.1}
    for i in range(3):
        for _ in range(1000):
            number = guards.arm(watched)
        assert holds(guards, number, watched)
        guards.clear()
        if i == 1:
            watched["lr"] = i
    number = guards.arm(watched)
    watched["lr"] = 3
    assert not holds(guards, number, watched)


def test_attributes_of_an_object(library, guards):
    """Their dict is written past any watcher while the object keeps the values itself."""
    group = types.SimpleNamespace(lr=0.1)

    class Group:
        def __init__(self):
            self.lr = 0.1

    for group in (Group(), types.SimpleNamespace(lr=0.1)):
        watched = vars(group)
        number = guards.arm(watched)
        if library.parent.name == "watchers":
            group.lr = 0.5
            assert not holds(guards, number, watched)


def test_changes_by_other_threads(guards):
    """A change is noticed whoever made it."""
    watched = [{"i": i} for i in range(50)]
    numbers = [guards.arm(one) for one in watched]
    threads = [threading.Thread(target=one.update, args=({"i": -1},)) for one in watched[::2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [holds(guards, number, one) for number, one in zip(numbers, watched, strict=True)]
    assert found == [i % 2 == 1 for i in range(50)]


@pytest.mark.parametrize("left", [True, False], ids=["a watcher", "no watcher left"])
def test_in_a_process_of_its_own(library, left):
    """Without a watcher nothing counts as unchanged; dicts that outlive everything do no harm."""
    code = f"""
import sys
sys.path.insert(0, {str(library.parent)!r})
{"" if left else TAKE_ALL}
import guards
watched = {{"lr": 0.1}}
watched["self"] = watched
number = guards.arm(watched)
print(guards.unchanged(number, id(watched)))
watched["lr"] = 0.2
print(guards.unchanged(number, id(watched)))
sys.watched, sys.keep = watched, [guards.arm({{}}) for _ in range(100)]
guards.arm(sys.modules)
guards.arm(vars(sys))
"""
    if not left and sys.version_info < (3, 12):
        pytest.skip("this Python has no watchers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbered = library.parent.name == "versions"
    assert done.stdout.split() == [str(left or numbered), "False"]
    assert done.stderr == ""
