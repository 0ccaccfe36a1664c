"""Clips, skips and checkpoints together.

Settings survive, and training goes on in the middle in ours and in stock torch.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import pytest
import torch
from separate_passes import Trio, make_grads

CLIPS = {"max_grad_value": 0.6, "max_grad_norm_per_param": 0.8}
EXTRAS = {"max_grad_norm": 0.7, "skip_nonfinite": True}


def through_a_file(value):
    """Returns what torch.load makes of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def step(trio: Trio, seed: int) -> None:
    """Steps with a late gradient, and inf at every third seed."""
    poison = math.inf if seed % 3 == 0 else None
    trio.step(make_grads(trio.ours.params, seed, 4.0, [1] if seed < 2 else [], poison), 4.0)


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("at", range(5))
def test_resume_in_the_middle(entry, backend, at):
    """Ours into ours after any step has the bits of an uninterrupted run; torch's passes agree."""
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [CLIPS, {}], cases.richest(entry), **EXTRAS)
    straight = Trio(entry, backend, params, [CLIPS, {}], cases.richest(entry), **EXTRAS)
    for seed in range(6):
        step(straight, seed)
    for seed in range(6):
        if seed == at:
            saved = through_a_file(trio.ours.optimizer.state_dict())
            own = cases.copies(trio.ours.params)
            groups = [{"params": own[i::2]} for i in range(2)]
            fresh = cases.make_fused(entry, groups, backend, lr=77.0, **EXTRAS)
            fresh.load_state_dict(saved)
            trio.ours = cases.Run(own, fresh)
        step(trio, seed)
    trio.check()
    cases.assert_same_bits(trio.ours.tensors(), straight.ours.tensors())


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("at", (1, 3, 4))
def test_stock_checkpoint_into_ours_keeps_the_clips(entry, backend, at):
    """Of what a torch checkpoint does not know, groups and optimizer keep their own."""
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [CLIPS, {}], cases.richest(entry), **EXTRAS)
    for seed in range(at):
        step(trio, seed)
    saved = trio.stock.optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in CLIPS:
            group.pop(name, None)
    optimizer = trio.ours.optimizer
    optimizer.load_state_dict(through_a_file(saved))
    with torch.no_grad():
        for own, stock in zip(trio.ours.params, trio.stock.params, strict=True):
            own.copy_(stock)
    assert optimizer.max_grad_norm == EXTRAS["max_grad_norm"]
    assert optimizer.skip_nonfinite is True
    for name, value in CLIPS.items():
        assert [group.get(name) for group in optimizer.param_groups] == [value, None]
    for seed in range(at, 6):
        step(trio, seed)
    trio.check()


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("at", (1, 2, 4))
def test_our_checkpoint_into_stock(entry, backend, at):
    """Stock torch takes it as its own and goes on, also right after a skipped step."""
    params = cases.make_params(device=cases.device_of(backend))
    trio = Trio(entry, backend, params, [CLIPS, {}], cases.richest(entry), **EXTRAS)
    for seed in range(at):
        step(trio, seed)
    saved = through_a_file(trio.ours.optimizer.state_dict())
    trio.stock.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for own, stock in zip(trio.ours.params, trio.stock.params, strict=True):
            stock.copy_(own)
    for seed in range(at, 6):
        step(trio, seed)
    ours, stock = trio.ours.tensors(), trio.stock.tensors()
    cases.assert_close({name: ours[name] for name in stock}, stock, 8.0)


def test_a_checkpoint_with_our_keys_sets_them():
    """Group keys travel in checkpoints; settings of the whole optimizer never do."""
    params = cases.make_params(((3,),))
    entry = cases.TABLE["Adam"]
    saved = cases.make_fused(entry, params, "auto", **CLIPS, **EXTRAS).state_dict()
    assert not {"max_grad_norm", "skip_nonfinite", "backend"} & set(saved["param_groups"][0])
    loaded = cases.make_fused(entry, params, "auto", max_grad_value=9.0, max_grad_norm=3.0)
    loaded.load_state_dict(saved)
    assert {name: loaded.param_groups[0][name] for name in CLIPS} == CLIPS
    assert loaded.max_grad_norm == 3.0
    assert loaded.skip_nonfinite is False
    for group in saved["param_groups"]:
        group.update(max_grad_norm=5.0, skip_nonfinite=True, backend="torch")
    loaded.load_state_dict(saved)
    assert loaded.max_grad_norm == 3.0
    assert loaded.skip_nonfinite is False
    assert loaded.backend == "auto"


@pytest.mark.parametrize("backend", cases.backends())
@pytest.mark.parametrize("entry", **cases.ENTRIES)
@pytest.mark.parametrize("clone", (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))))
def test_copies_keep_settings_and_the_amp_flag(entry, backend, clone):
    """Deepcopies and pickles go on with the same bits, wherever skipped steps fall."""
    params = cases.make_params(device=cases.device_of(backend))
    options = {
        **CLIPS,
        **EXTRAS,
        **cases.richest(entry),
        "fused": None if backend == "torch" else True,
    }
    run = cases.run_fused(entry, params, backend, **options)
    for seed in range(5):
        optimizer = clone(run.optimizer)
        twin = cases.Run([p for g in optimizer.param_groups for p in g["params"]], optimizer)
        assert optimizer._step_supports_amp_scaling == (backend != "torch")
        assert {name: getattr(optimizer, name) for name in EXTRAS} == EXTRAS
        assert {name: optimizer.param_groups[0][name] for name in CLIPS} == CLIPS
        assert optimizer.backend == backend
        grads = make_grads(params, seed, poison=math.nan if seed in (0, 3) else None)
        for one in (run, twin):
            for param, grad in zip(one.params, grads, strict=True):
                param.grad = grad.clone()
            one.optimizer.step()
        cases.assert_same_bits(twin.tensors(), run.tensors())
        assert cases.same_bits(optimizer.last_grad_norm, run.optimizer.last_grad_norm)
        assert bool(optimizer.last_step_skipped) == (seed in (0, 3))
