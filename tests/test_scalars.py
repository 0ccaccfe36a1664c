"""The scalars of a parameter besides its counter of steps, which kernels advance like it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import (
    SCALED,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    make_params,
    make_stock,
    native_backends,
    richest,
    run_fused,
    run_stock,
    same_bits,
    set_grads,
)

SHAPES = ((5,), (3, 2), ())

pytestmark = pytest.mark.parametrize("entry", **SCALED)
BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())


def both(entry, backend, dtype=torch.float32, **extras):
    """The same training with ours and with torch's class, after two steps."""
    start = make_params(SHAPES, dtype, device_of(backend))
    options = richest(entry) | entry.serial
    ours = run_fused(entry, start, backend, **options, **extras)
    return ours.steps(2), run_stock(entry, start, **options).steps(2)


def scalars_of(run, entry):
    """The live scalars of every parameter, by name."""
    return [
        {name: run.optimizer.state[param][name] for name in entry.scalars} for param in run.params
    ]


@NATIVE
def test_skipped_step_leaves_them(entry, backend):
    """With one bad gradient, to the last bit; the next step goes on from there."""
    ours, stock = both(entry, backend, skip_nonfinite=True)
    before = copy.deepcopy(scalars_of(ours, entry))
    set_grads(ours.params, 7)
    ours.params[1].grad[0, 0] = math.nan
    ours.optimizer.step()
    for own, kept in zip(scalars_of(ours, entry), before, strict=True):
        assert all(same_bits(own[name], kept[name]) for name in own)
    assert_close(ours.steps(2, 3).tensors(), stock.steps(2, 3).tensors())


@BACKENDS
def test_parameters_with_histories_of_their_own(entry, backend):
    """Without a gradient a parameter's scalars stay, beside others that go on."""
    ours, stock = both(entry, backend)
    for seed in range(3, 9):
        for run in (ours, stock):
            set_grads(run.params, seed)
            run.params[seed % 3].grad = None
            run.optimizer.step()
    assert_close(ours.tensors(), stock.tensors())


@BACKENDS
def test_edits_between_steps_count(entry, backend):
    """In place, as another tensor, under the same tensor; of a scalar and of the counter."""
    ours, stock = both(entry, backend)
    for run in (ours, stock):
        first, second, third = (run.optimizer.state[param] for param in run.params)
        for name in entry.scalars:
            first[name].mul_(0.5)
            second[name] = second[name].clone() * 0.25
            third[name].data = third[name].data.clone() * 0.75
        first["step"].fill_(20.0)
        run.steps(2, 3)
    assert_close(ours.tensors(), stock.tensors())


@NATIVE
def test_own_tensor_is_advanced(entry, backend):
    """What the user put into the state, and no copy of it."""
    ours, _ = both(entry, backend)
    entries = ours.optimizer.state[ours.params[0]]
    own = {name: entries[name].clone() for name in entry.scalars}
    entries.update(own)
    # What is advanced to the same value proves nothing.
    entries["step"].fill_(0.0)
    before = {name: value.item() for name, value in own.items()}
    ours.steps(1, 3)
    for name, value in own.items():
        assert entries[name] is value
    assert any(value.item() != before[name] for name, value in own.items())


@NATIVE
def test_one_tensor_for_two_parameters(entry, backend):
    """Each goes on with a copy."""
    ours, stock = both(entry, backend)
    first, second = (ours.optimizer.state[param] for param in ours.params[:2])
    for name in entry.scalars:
        second[name] = first[name]
    assert_close(ours.steps(2, 3).tensors(), stock.steps(2, 3).tensors())
    assert all(first[name] is not second[name] for name in entry.scalars)


@BACKENDS
def test_float64_is_kept_to_the_last_digits(entry, backend):
    """As torch makes them under that default type; powers differ by a few roundings."""
    torch.set_default_dtype(torch.float64)
    try:
        ours, stock = both(entry, backend, torch.float64)
        ours.steps(20, 3)
        stock.steps(20, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for own, theirs in zip(scalars_of(ours, entry), scalars_of(stock, entry), strict=True):
        for name, value in own.items():
            assert value.dtype == torch.float64
            # 22 products, each of a power that is right to 16 roundings.
            torch.testing.assert_close(
                value.cpu(), theirs[name].cpu(), rtol=22 * 16 * 2.0**-53, atol=0.0
            )


@BACKENDS
def test_checkpoint_with_numbers(entry, backend):
    """As old versions of torch wrote them."""
    ours, stock = both(entry, backend)
    checkpoint = ours.optimizer.state_dict()
    for entries in checkpoint["state"].values():
        entries.update({name: entries[name].item() for name in ("step", *entry.scalars)})
    ours.optimizer.load_state_dict(checkpoint)
    assert_close(ours.steps(2, 3).tensors(), stock.steps(2, 3).tensors())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_checkpoint_keeps_their_type(entry, backend, dtype):
    """Torch would round them to that of the parameters; training goes on as if nothing happened."""
    ours, _ = both(entry, backend, dtype)
    again = run_fused(entry, ours.params, backend, **richest(entry))
    again.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    assert_same_bits(again.steps(2, 3).tensors(), ours.steps(2, 3).tensors())


@BACKENDS
def test_checkpoint_has_them_where_torch_has(entry, backend):
    """In the host's memory or on the device, and in torch's own order and type."""
    ours, stock = both(entry, backend)
    packed = [run.optimizer.state_dict() for run in (ours, stock)]
    for own, theirs in zip(*(each["state"].values() for each in packed), strict=True):
        assert list(own) == list(theirs)
        for name in ("step", *entry.scalars):
            assert (own[name].device, own[name].dtype) == (theirs[name].device, theirs[name].dtype)
    other = make_stock(entry, ours.params)
    other.load_state_dict(packed[0])
    assert_close(
        {name: other.state[ours.params[0]][name].cpu() for name in entry.scalars},
        {name: value.cpu() for name, value in scalars_of(stock, entry)[0].items()},
    )


@BACKENDS
def test_missing_one_is_refused(entry, backend):
    """Torch raises KeyError; nothing has changed, and once it is back the step works."""
    ours, stock = both(entry, backend)
    name = entry.scalars[0]
    value = ours.optimizer.state[ours.params[1]].pop(name)
    before = [param.detach().clone() for param in ours.params]
    set_grads(ours.params, 3)
    with pytest.raises(KeyError, match=name):
        ours.optimizer.step()
    assert all(map(torch.equal, before, ours.params))
    ours.optimizer.state[ours.params[1]][name] = value
    assert_close(ours.steps(1, 3).tensors(), stock.steps(1, 3).tensors())


@pytest.mark.parametrize("backend", ["torch"])
def test_no_tensor_is_refused_by_the_plain_rule(entry, backend):
    """Before any parameter is updated."""
    ours, _ = both(entry, backend)
    name = entry.scalars[0]
    ours.optimizer.state[ours.params[1]][name] = 0.5
    before = [param.detach().clone() for param in ours.params]
    with pytest.raises(TypeError, match=f"{name}.* is 0.5; expected a 0-dim tensor"):
        ours.steps(1, 3)
    assert all(map(torch.equal, before, ours.params))
