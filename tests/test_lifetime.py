"""Nothing lives that stock torch would have freed, and nothing is freed later: a property.

The same story is told to torch's optimizer and to ours, with the garbage collector off, and after
every chapter the memory that is still alive must be the same.
"""

from __future__ import annotations

import collections
import copy
import gc
import weakref

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    Run,
    backends,
    device_of,
    make_params,
    native_backends,
    richest,
    run_fused,
    run_stock,
    set_grads,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fusedopt.backends import extension

OURS = pytest.mark.parametrize("entry", **ENTRIES)
SHAPES = ((5, 3), (7,), (4,))


def kinds() -> list[str]:
    """Every backend; Triton also without the extension."""
    found = list(backends())
    if "triton" in found and extension.unavailable() is None:
        found.append("triton, without the extension")
    return found


@pytest.fixture
def backend(request, monkeypatch):
    """The name of a backend, prepared."""
    name, _, without = request.param.partition(", ")
    if without:
        monkeypatch.setattr(extension, "unavailable", lambda: "this test does without")
    return name


KINDS = pytest.mark.parametrize("backend", kinds(), indirect=True)


class Census:
    """Counts who is alive of all tensors that an optimizer ever had to do with."""

    def __init__(self) -> None:
        self._memory: dict[str, StorageWeakRef] = {}
        self._objects: dict[str, weakref.ref[Tensor]] = {}

    def register(self, name: str, tensor: Tensor, *, as_object: bool = True) -> None:
        """Notes a tensor: its memory and, unless something refuses weak references, itself."""
        name = f"{len(self._memory)} {name}"
        self._memory[name] = StorageWeakRef(tensor.untyped_storage())
        if as_object:
            self._objects[name] = weakref.ref(tensor)

    def alive(self) -> list[str]:
        """Names of whom nobody has freed."""
        memory = [name for name, reference in self._memory.items() if not reference.expired()]
        return memory + [f"object {n}" for n, ref in self._objects.items() if ref() is not None]


class Story:
    """One optimizer's life, with a census of everything that it meets."""

    def __init__(self, run: Run) -> None:
        self.params, self.optimizer = run.params, run.optimizer
        self.group = self.optimizer.param_groups[0]
        self.census = Census()
        self.steps = 0

    def step(self, *, as_object: bool = True) -> None:
        """A step with fresh gradients; parameters, gradients and states are noted."""
        self.steps += 1
        set_grads(self.params, self.steps)
        self.optimizer.step()
        for param in self.params:
            self.census.register("param", param, as_object=as_object)
            self.census.register("grad", param.grad)
            for name, value in self.optimizer.state.get(param, {}).items():
                # Torch's SGD without momentum may leave None.
                if isinstance(value, Tensor):
                    self.census.register(name, value)

    def new_param(self, shape=(6,)) -> torch.nn.Parameter:
        """Another parameter on the same device."""
        return make_params([shape], device=str(self.params[0].device), seed=30 + self.steps)[0]


def set_to_none(story: Story) -> None:
    """Gradients go; a step without any follows."""
    story.step()
    story.optimizer.zero_grad()
    yield
    story.optimizer.step()
    yield
    story.step()


def prune(story: Story) -> None:
    """A parameter leaves its group, with its state."""
    story.step()
    param = story.params.pop(1)
    del story.group["params"][1]
    story.optimizer.state.pop(param, None)
    del param
    yield
    story.step()
    yield
    story.group["params"] = story.params = story.params[:1]
    story.optimizer.state = collections.defaultdict(
        dict, {p: s for p, s in story.optimizer.state.items() if p is story.params[0]}
    )
    yield
    story.step()


def grow(story: Story) -> None:
    """A group comes, and goes before and after a step."""
    for steps in (1, 0):
        more = [story.new_param(), story.new_param()]
        story.optimizer.add_param_group({"params": more})
        story.params += more
        story.step()
        for _ in range(steps):
            story.step()
        for param in more:
            story.optimizer.state.pop(param, None)
        del story.optimizer.param_groups[1:], story.params[len(SHAPES) :], more, param
        yield
        story.step()
        yield


def exchange(story: Story) -> None:
    """As in densification: another parameter in the place, with the state of the old one."""
    for _ in range(3):
        story.step()
        old = story.params[0]
        state = story.optimizer.state.pop(old, None)
        new = torch.nn.Parameter(old.detach().clone())
        story.params[0] = story.group["params"][0] = new
        if state is not None:
            story.optimizer.state[new] = state
        del old, new, state
        yield
    story.step()


def offload(story: Story) -> None:
    """State moves elsewhere between two phases, one tensor after the other, and comes back."""
    story.step()
    for _ in range(2):
        for entries in story.optimizer.state.values():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    entries[name] = value.clone()
                del value
            yield
    story.step()


def clear(story: Story) -> None:
    """State is dropped: in place, as a whole, entry by entry."""
    story.step()
    for entries in story.optimizer.state.values():
        entries.clear()
    yield
    story.optimizer.state = collections.defaultdict(dict)
    yield


def load(story: Story) -> None:
    """A checkpoint takes the place of all state and groups."""
    story.step()
    checkpoint = copy.deepcopy(story.optimizer.state_dict())
    story.step()
    story.optimizer.load_state_dict(checkpoint)
    del checkpoint
    story.group = story.optimizer.param_groups[0]
    yield
    story.step()
    yield
    story.optimizer.load_state_dict(story.optimizer.state_dict())
    story.group = story.optimizer.param_groups[0]
    yield


def copy_deeply(story: Story) -> None:
    """A copy has its own life."""
    story.step()
    twin = Story(Run(*copy.deepcopy((story.params, story.optimizer))))
    twin.census = story.census
    twin.step()
    yield
    del twin
    yield
    story.step()


def move_data(story: Story) -> None:
    """Parameters and states get other memory under the same objects."""
    story.step()
    for param in story.params:
        param.data = param.data.clone()
        for value in story.optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()
    yield
    story.step()


def swap(story: Story) -> None:
    """``torch.utils.swap_tensors``, as ``module.to()`` does it where that is switched on."""
    story.step(as_object=False)
    story.optimizer.zero_grad()
    for param in story.params:
        other = torch.nn.Parameter(param.detach().clone() + 1)
        torch.utils.swap_tensors(param, other)
        del other
        yield
    story.step(as_object=False)
    yield


def delete(story: Story) -> None:
    """The optimizer goes, the parameters stay; with a hook that holds it, the collector's work."""
    story.step()
    story.optimizer.zero_grad()
    story.optimizer = story.group = None
    yield


STORIES = [
    set_to_none,
    prune,
    grow,
    exchange,
    offload,
    clear,
    load,
    copy_deeply,
    move_data,
    swap,
    delete,
]


@pytest.fixture(scope="module")
def warmed_up():
    """The first optimizer of a process imports modules, and frames of that stay for a while."""
    for name in backends():
        for entry in TABLE.values():
            run_stock(entry, make_params(SHAPES[:1])).steps(1)
            run_fused(entry, make_params(SHAPES[:1], device=device_of(name)), name).steps(1)
    gc.collect()


@pytest.fixture
def no_collector(warmed_up):
    """Switches the garbage collector off: what a reference count frees must not wait for it."""
    gc.disable()
    yield
    gc.enable()


@OURS
@KINDS
@pytest.mark.parametrize("tell", STORIES, ids=lambda story: story.__name__)
@pytest.mark.usefixtures("no_collector")
def test_lives_as_long_as_with_torch(entry, backend, tell):
    """After every chapter of every story."""
    start = make_params(SHAPES, device=device_of(backend))
    stock = Story(run_stock(entry, start, **richest(entry)))
    ours = Story(run_fused(entry, start, backend, **richest(entry)))
    chapters = zip(tell(stock), tell(ours), strict=True)
    for chapter, _ in enumerate(chapters):
        alive, wanted = ours.census.alive(), stock.census.alive()
        if device_of(backend) == "cuda":
            # A counter that was loaded goes as soon as the step has moved it to the device.
            counted = {"step", *entry.scalars}
            wanted = [name for name in wanted if name in alive or name.split()[-1] not in counted]
        assert alive == wanted, f"after chapter {chapter + 1}"


@pytest.mark.parametrize("backend", native_backends())
@pytest.mark.parametrize("entry", **ENTRIES)
def test_a_cycle_through_a_hook_is_collected(entry, backend):
    """A hook that holds the optimizer, as schedulers and loggers register them."""
    run = run_fused(entry, make_params(SHAPES, device=device_of(backend)), backend)
    optimizer = run.optimizer
    run.params[0].register_hook(lambda grad, optimizer=optimizer: grad)
    optimizer.register_step_post_hook(lambda *args, optimizer=optimizer: None)
    run.steps(2)
    census = Census()
    for name, tensor in run.tensors().items():
        if not name.startswith("step"):  # a converted copy
            census.register(name, tensor)
    del run, optimizer, tensor
    gc.collect()
    assert census.alive() == []


@pytest.mark.parametrize("backend", native_backends())
def test_modules_convert_by_swapping(backend):
    """Loading and ``double()`` under ``set_swap_module_params_on_conversion``."""
    device = device_of(backend)
    module = torch.nn.Linear(2, 2, device=device)
    optimizer = TABLE["SGD"].fused(module.parameters(), lr=0.1, momentum=0.9, backend=backend)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64):
            module.to(dtype)
            module(torch.ones(1, 2, dtype=dtype, device=device)).sum().backward()
            optimizer.state.clear()
            optimizer.step()
            optimizer.zero_grad()
            module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.weight.dtype == torch.float64
