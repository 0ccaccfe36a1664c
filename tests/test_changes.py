"""Whatever changes between two steps is noticed: gradients, groups, state, memory."""

from __future__ import annotations

import collections
import copy

import numpy as np
import pytest
import torch
from cases import (
    COUNTING,
    ENTRIES,
    TABLE,
    Entry,
    Run,
    assert_close,
    backends,
    device_of,
    make_params,
    native_backends,
    random,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), (4, 6), ())


def both(entry, backend, change, steps_before=2, steps_after=2, shapes=SHAPES, **options):
    """Trains torch's and ours, calls `change(run)` in between, and compares."""
    options = {**richest(entry), **options}
    start = make_params(shapes, device=device_of(backend))
    runs = run_stock(entry, start, **options), run_fused(entry, start, backend, **options)
    for run in runs:
        run.steps(steps_before)
        change(run)
        run.steps(steps_after, first=10)
    assert_close(runs[1].tensors(), runs[0].tensors())
    return runs


@OURS
@BACKENDS
@pytest.mark.parametrize("missing", [(0,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_missing_and_late_gradients(entry, backend, missing):
    """Each parameter counts its own steps, from its own first gradient."""
    start = make_params(SHAPES, device=device_of(backend))
    runs = (
        run_stock(entry, start, **richest(entry)),
        run_fused(entry, start, backend, **richest(entry)),
    )
    for run in runs:
        for seed, absent in ((1, missing), (2, ()), (3, missing), (4, (2,)), (5, ())):
            set_grads(run.params, seed)
            for i in absent:
                run.params[i].grad = None
            run.optimizer.step()
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
def test_no_gradient_at_all(entry, backend):
    """A step without any gradient changes nothing, before the first real step and after."""
    start = make_params(SHAPES, device=device_of(backend))
    run = run_fused(entry, start, backend, **richest(entry))
    run.optimizer.step()
    run.steps(1)
    before = {name: value.clone() for name, value in run.tensors().items()}
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert_close(run.tensors(), before)
    assert_close(
        run.steps(1, 2).tensors(), run_stock(entry, start, **richest(entry)).steps(2).tensors()
    )


def entry_of(run: Run) -> Entry:
    """Returns the entry of a run's optimizer, ours or torch's."""
    return TABLE[type(run.optimizer).__name__]


def add_group(run: Run) -> None:
    """Adds a group with hyperparameters of its own."""
    more = make_params(((6,), (2, 2)), device=str(run.params[0].device), seed=50)
    run.params += more
    run.optimizer.add_param_group(
        {"params": more, "lr": 0.3, **entry_of(run).known(weight_decay=0.2)}
    )


def append_parameter(run: Run) -> None:
    """Appends to the list of a group, past add_param_group."""
    more = make_params(((6,),), device=str(run.params[0].device), seed=50)
    run.params += more
    run.optimizer.param_groups[0]["params"].append(more[0])


def remove_parameter(run: Run) -> None:
    """Removes from the list of a group."""
    del run.optimizer.param_groups[0]["params"][1]


def refill(run: Run) -> None:
    """Takes every parameter away, steps without any, and puts some back."""
    params = run.optimizer.param_groups[0]["params"]
    params.clear()
    run.optimizer.step()
    params += run.params[1:]


def exchange_parameter(run: Run) -> None:
    """Puts another parameter of another shape in a parameter's place, with fresh state."""
    other = make_params(((3, 8),), device=str(run.params[0].device), seed=50)[0]
    state = run.optimizer.state.pop(run.params[2])
    starts = {name: entry_of(run).starts.get(name, 0.0) for name in state}
    starts |= {k: run.optimizer.defaults[v] for k, v in starts.items() if isinstance(v, str)}
    run.optimizer.state[other] = {
        name: value.new_full(other.shape if value.dim() else (), starts[name])
        for name, value in state.items()
    }
    run.optimizer.param_groups[0]["params"][2] = run.params[2] = other


def new_list(run: Run) -> None:
    """Assigns another list of parameters, in another order."""
    run.params.reverse()
    run.optimizer.param_groups[0]["params"] = list(run.params)


def new_group(run: Run) -> None:
    """Replaces the group's dict by one with torch's keys only."""
    group = run.optimizer.param_groups[0]
    ours = ("max_grad_value", "max_grad_norm_per_param")
    run.optimizer.param_groups[0] = {k: v for k, v in group.items() if k not in ours}
    run.optimizer.param_groups[0]["lr"] = 0.2


def split_groups(run: Run) -> None:
    """Assigns another list of groups."""
    group = run.optimizer.param_groups[0]
    run.optimizer.param_groups = [
        {**group, "params": run.params[:1], "lr": 0.2},
        {**group, "params": run.params[1:]},
    ]


def other_numbers(run: Run) -> None:
    """Writes hyperparameters, one of them a flag."""
    group = run.optimizer.param_groups[0]
    group.update(lr=0.25, maximize=True, **entry_of(run).known(weight_decay=0.05))


def replace_state(run: Run) -> None:
    """Exchanges state tensors for others with other values."""
    for entries in run.optimizer.state.values():
        for name, value in entries.items():
            entries[name] = value.clone() / 2


def write_state(run: Run) -> None:
    """Writes into state tensors in place."""
    for entries in run.optimizer.state.values():
        for value in entries.values():
            value.div_(2)


def move_state(run: Run) -> None:
    """Gives state tensors other memory under the same Python object."""
    for entries in run.optimizer.state.values():
        for value in entries.values():
            value.data = value.data.clone() / 2


def move_steps(run: Run) -> None:
    """Gives the counters alone other memory and values, as a careless load might."""
    for entries in run.optimizer.state.values():
        if "step" in entries:
            entries["step"].data = entries["step"].data.clone() + 3


def replace_steps(run: Run) -> None:
    """Exchanges the counters alone."""
    for entries in run.optimizer.state.values():
        if "step" in entries:
            entries["step"] = torch.tensor(50.0)


def replace_entries(run: Run) -> None:
    """Exchanges the dict of one parameter's state."""
    for param in run.params[:2]:
        entries = run.optimizer.state[param]
        run.optimizer.state[param] = {name: value.clone() * 2 for name, value in entries.items()}


def replace_state_dict(run: Run) -> None:
    """Exchanges optimizer.state itself."""
    old = run.optimizer.state
    run.optimizer.state = collections.defaultdict(dict, {k: dict(v) for k, v in old.items()})


def move_data(run: Run) -> None:
    """Gives parameters other memory and other values."""
    for param in run.params:
        param.data = param.data.clone() + 1


def transpose_data(run: Run) -> None:
    """Changes only the strides of a parameter; the gradients that follow have them too."""
    run.params[2].data = run.params[2].data.t().contiguous().t()


def set_data(run: Run) -> None:
    """Exchanges a parameter's storage by set_, as FSDP does."""
    with torch.no_grad():
        run.params[0].set_(run.params[0].detach().clone() * 3)


CHANGES = [
    add_group,
    append_parameter,
    remove_parameter,
    refill,
    exchange_parameter,
    new_list,
    new_group,
    split_groups,
    other_numbers,
    replace_state,
    write_state,
    move_state,
    move_steps,
    replace_steps,
    replace_entries,
    replace_state_dict,
    move_data,
    transpose_data,
    set_data,
]


@OURS
@BACKENDS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_between_steps(entry, backend, change):
    """Ours goes on from it as torch's does."""
    both(entry, backend, change)


@OURS
@BACKENDS
def test_lent_memory_is_not_written(entry, backend):
    """``torch._lazy_clone`` shares memory until one side writes: that side moves elsewhere."""
    lent = []

    def lend(run: Run) -> None:
        for param in run.params:
            for tensor in (param.detach(), *run.optimizer.state.get(param, {}).values()):
                lent.append((torch._lazy_clone(tensor), tensor.clone()))

    both(entry, backend, lend)
    for borrowed, value in lent:
        assert torch.equal(borrowed, value)


@pytest.mark.parametrize("entry", **COUNTING)
@BACKENDS
def test_swapped_state(entry, backend):
    """``torch.utils.swap_tensors`` exchanges what an object holds; the step goes on from that."""
    put_away = []

    def swap(run: Run) -> None:
        for entries in run.optimizer.state.values():
            for value in entries.values():
                other = value * 2
                put_away.append((other, value.clone()))
                torch.utils.swap_tensors(value, other)

    both(entry, backend, swap)
    for other, value in put_away:
        assert torch.equal(other, value)


@OURS
@BACKENDS
def test_dropped_state(entry, backend):
    """It is created again, and training starts over for that parameter, as torch does it."""

    def drop(run: Run) -> None:
        del run.optimizer.state[run.params[0]]
        run.optimizer.state[run.params[1]] = {}

    for change in (drop, lambda run: run.optimizer.state.clear()):
        both(entry, backend, change)


@BACKENDS
@pytest.mark.parametrize("numbers", [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)], ids=str)
def test_momentum_switched_on_and_off(backend, numbers):
    """SGD's buffer starts with the first gradient that finds momentum switched on."""

    def switch(run: Run) -> None:
        run.optimizer.param_groups[0]["momentum"] = numbers[1]

    both(TABLE["SGD"], backend, switch, momentum=numbers[0], dampening=0.5)


@OURS
@BACKENDS
def test_same_address_other_meaning(entry, backend):
    """A pointer that was seen before fools nobody: other strides, type and size at one address."""
    device = device_of(backend)
    memory = random((24,), 4, device=device)
    start = make_params([(4, 6)], device=device)
    runs = (
        run_stock(entry, start, **richest(entry)),
        run_fused(entry, start, backend, **richest(entry)),
    )
    for run in runs:
        place = memory.clone()
        for grad in (place.view(4, 6), place.view(6, 4).t(), place.view(4, 6)):
            run.params[0].grad = grad
            run.optimizer.step()
        # The same address, and fewer elements.
        base = run.params[0].data
        run.params[0].grad = None
        run.params[0].data = base.view(-1)[:10]
        run.optimizer.state.clear()
        for _ in range(2):
            run.params[0].grad = place[:10]
            run.optimizer.step()
    assert_close(runs[1].tensors(), runs[0].tensors())


@BACKENDS
@pytest.mark.parametrize("kind", [list, np.array, lambda betas: torch.tensor(betas).double()])
def test_betas_in_a_sequence_changed_in_place(backend, kind):
    """Some frameworks keep them in one, and a scheduler of momentum may write into it."""
    entry = TABLE["AdamW"]
    start = make_params(SHAPES, device=device_of(backend))
    runs = run_stock(entry, start), run_fused(entry, start, backend)
    for run in runs:
        group = run.optimizer.param_groups[0]
        group["betas"] = kind(group["betas"])
        run.steps(2)
        group["betas"][0] = 0.5
        run.steps(2, first=10)
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
def test_group_settings_are_read_every_step(entry, backend):
    """Our own keys too: a limit that is set, changed or taken away."""
    start = make_params([(50,)], device=device_of(backend))
    run = run_fused(entry, start, backend, lr=1.0).steps(1)
    group = run.optimizer.param_groups[0]
    for limit in (1e-3, None, 10.0):
        group["max_grad_value"] = limit
        expected = run_fused(entry, run.params, backend, lr=1.0)
        expected.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        expected.optimizer.param_groups[0]["max_grad_value"] = None
        for each in (run, expected):
            set_grads(each.params, 5)
        if limit is not None:
            expected.params[0].grad.clamp_(-limit, limit)
        run.optimizer.step()
        expected.optimizer.step()
        assert_close(run.tensors(), expected.tensors())


@pytest.mark.parametrize("entry", **ENTRIES)
@pytest.mark.parametrize("backend", native_backends())
def test_a_state_of_another_shape_is_refused(entry, backend):
    """Also one that has as many elements in the same place, and came there by itself."""
    start = make_params([(4, 6)], device=device_of(backend))
    run = run_fused(entry, start, backend, **richest(entry)).steps(1)
    name = entry.states[0]
    state = run.optimizer.state[run.params[0]]
    state[name].data = state[name].data.view(6, 4)
    before = run.params[0].detach().clone()
    with pytest.raises(ValueError, match=rf"state '{name}' of parameter 0 of param group 0"):
        run.steps(1)
    assert torch.equal(run.params[0].detach(), before)
