"""The counters of applied steps are torch's own `step` tensors, wherever they came from."""

import copy
import io
import math

import pytest
import torch
from cases import (
    TABLE,
    backends,
    copies,
    device_of,
    make_fused,
    make_params,
    make_stock,
    native_backends,
    set_grads,
)

BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())
COUNTING = [entry for entry in TABLE.values() if entry.has_step]
COUNTED = pytest.mark.parametrize("entry", COUNTING, ids=[entry.name for entry in COUNTING])
ADAM, ADAGRAD, SGD = TABLE["Adam"], TABLE["Adagrad"], TABLE["SGD"]


def started(entry, backend, shapes=((3,), (2, 2)), **options):
    """An optimizer after one step, and its parameters."""
    params = make_params(shapes, device=device_of(backend))
    optimizer = make_fused(entry, params, backend, **options)
    return step(optimizer, params, 1), params


def step(optimizer, params, seed):
    """One step; returns the optimizer."""
    set_grads(params, seed)
    optimizer.step()
    return optimizer


def counts(optimizer):
    """The counters as numbers, in the order of the parameters."""
    return [float(entries["step"]) for entries in optimizer.state.values()]


@COUNTED
@BACKENDS
def test_one_parameters_state_is_saved_without_the_others(entry, backend):
    """A hundred parameters do not make the file of one larger."""
    sizes = []
    for count in (1, 100):
        optimizer, params = started(entry, backend, [(1,)] * count)
        for saved in (optimizer.state[params[0]], optimizer.state_dict()["state"][0]):
            file = io.BytesIO()
            torch.save(saved, file)
            sizes.append(file.tell())
    assert sizes[:2] == sizes[2:]


@COUNTED
@BACKENDS
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_type_is_that_of_torch(entry, backend, default):
    """Under another default type torch counts in float64."""
    torch.set_default_dtype(default)
    try:
        optimizer, params = started(entry, backend)
        others = copies(params)
        stock = step(make_stock(entry, others), others, 1)
        assert optimizer.state[params[0]]["step"].dtype == default
        assert stock.state[others[0]]["step"].dtype == default
    finally:
        torch.set_default_dtype(torch.float32)


@COUNTED
@BACKENDS
def test_float64_counter_counts_on_beyond_float32(entry, backend):
    """A checkpoint's float64 counter keeps its type and every unit of its value."""
    optimizer, params = started(entry, backend)
    checkpoint = optimizer.state_dict()
    for entries in checkpoint["state"].values():
        entries["step"] = torch.tensor(2.0**24 + 1, dtype=torch.float64)
    optimizer.load_state_dict(checkpoint)
    step(optimizer, params, 2)
    step(optimizer, params, 3)
    assert counts(optimizer) == [2.0**24 + 3] * 2
    saved = optimizer.state_dict()["state"][0]["step"]
    assert saved.dtype == torch.float64
    assert saved == 2.0**24 + 3


@COUNTED
@NATIVE
@pytest.mark.parametrize(
    "value",
    [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float16)],
    ids=["int", "float", "int tensor", "1-D", "float16"],
)
def test_counter_of_another_kind_goes_on(entry, backend, value):
    """Old checkpoints and other libraries keep numbers, integers or one-element tensors."""
    optimizer, params = started(entry, backend)
    for param in params:
        optimizer.state[param]["step"] = value
    step(optimizer, params, 2)
    assert counts(optimizer) == [8.0, 8.0]


@COUNTED
@BACKENDS
def test_own_tensor_goes_on_counting(entry, backend):
    """What the user put into the state is advanced, not a copy of it."""
    optimizer, params = started(entry, backend)
    own = [torch.full((), 5.0, device=device_of(backend)) for _ in params]
    for param, counter in zip(params, own, strict=True):
        optimizer.state[param]["step"] = counter
    step(optimizer, params, 2)
    for param, counter in zip(params, own, strict=True):
        assert optimizer.state[param]["step"] is counter
        assert counter == 6.0


@COUNTED
@NATIVE
def test_one_tensor_for_all_parameters_counts_steps(entry, backend):
    """As after loading a counter that another library keeps for a whole group."""
    optimizer, params = started(entry, backend)
    shared = torch.full((), 5.0, device=device_of(backend))
    for param in params:
        optimizer.state[param]["step"] = shared
    step(optimizer, params, 2)
    assert counts(optimizer) == [6.0, 6.0]


@COUNTED
@BACKENDS
def test_counter_in_other_memory_or_of_another_type_is_noticed(entry, backend):
    """Memory that moves under the same tensor, as into a queue or by ``.data``."""
    optimizer, params = started(entry, backend)
    first, second = (optimizer.state[param]["step"] for param in params)
    first.data = torch.full_like(first, 10.0)
    second.data = second.data.double()
    step(optimizer, params, 2)
    assert counts(optimizer) == [11.0, 2.0]
    if device_of(backend) == "cpu":
        optimizer.state[params[0]]["step"].share_memory_()
        step(optimizer, params, 3)
        assert counts(optimizer) == [12.0, 3.0]


@COUNTED
@BACKENDS
def test_missing_counter_is_refused(entry, backend):
    """Torch raises KeyError; nothing has changed, and with its counter the step works."""
    optimizer, params = started(entry, backend)
    counter = optimizer.state[params[1]].pop("step")
    before = [param.detach().clone() for param in params]
    set_grads(params, 2)
    with pytest.raises(KeyError, match="step"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    # A parameter without gradient needs none.
    params[1].grad = None
    optimizer.step()
    optimizer.state[params[1]]["step"] = counter
    step(optimizer, params, 3)
    assert counts(optimizer) == [3.0, 2.0]


@pytest.mark.parametrize("entry", [ADAM, ADAGRAD], ids=["Adam", "Adagrad"])
@BACKENDS
@pytest.mark.parametrize("value", [0.5, 2.75, 1000.25, 1e20, math.inf])
def test_any_value_means_what_it_means_to_torch(entry, backend, value):
    """Fractions and endless counts, as averaged or damaged checkpoints have them."""
    options = {"lr": 0.1}
    optimizer, params = started(entry, backend, **options)
    others = copies(params)
    stock = make_stock(entry, others, **options)
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, stock):
        for entries in each.state.values():
            entries["step"].fill_(value)
    step(optimizer, params, 2)
    step(stock, others, 2)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7, equal_nan=True)


@BACKENDS
def test_momentum_put_into_an_empty_state_is_kept(backend):
    """Looking at a defaultdict leaves an empty entry; what comes into it later counts."""
    momentum = {"momentum": 0.9, "lr": 0.1}
    params = make_params([(3,), (3,)], device=device_of(backend))
    others = copies(params)
    optimizer = make_fused(SGD, params, backend, **momentum)
    stock = make_stock(SGD, others, **momentum)
    for each, own in ((optimizer, params), (stock, others)):
        set_grads(own, 1)
        own[1].grad = None
        assert each.state[own[1]] == {}
        each.step()
        each.state[own[1]]["momentum_buffer"] = torch.full_like(own[1], 2.0).detach()
        step(each, own, 2)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other)


@NATIVE
def test_buffer_in_place_of_one_that_no_step_set_counts_as_set(backend):
    """After a skipped first step, somebody else's buffer is momentum and not empty memory."""
    (param,) = params = make_params([(3,)], device=device_of(backend))
    optimizer = make_fused(SGD, params, backend, lr=1.0, momentum=0.5, skip_nonfinite=True)
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    # Freed first, so that the new one may get the same place in memory.
    del optimizer.state[param]["momentum_buffer"]
    optimizer.state[param]["momentum_buffer"] = torch.full_like(param, 2.0).detach()
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(before - param.detach(), torch.full_like(before, 2.0))
    assert optimizer.state_dict()["state"][0]["momentum_buffer"].tolist() == [2.0] * 3
