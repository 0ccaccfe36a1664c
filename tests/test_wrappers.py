"""Trainers wrap optimizers; what is set on the wrapper, or handed to it, reaches the optimizer.

`Wrapper` does what Lightning's and Fabric's do: a class made on the spot that inherits
from the optimizer's and passes on what it does not find there.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    ADAGRAD_MAKES_STATE,
    ENTRIES,
    TABLE,
    Run,
    assert_same_bits,
    make_params,
    richest,
    run_fused,
    set_grads,
)

import fusedopt

OURS = pytest.mark.parametrize("entry", **ENTRIES)
SCALERS = pytest.mark.parametrize("kind", [fusedopt.GradScaler, torch.amp.GradScaler])
FUSED = pytest.mark.parametrize("fused", [None, True])
SHAPES = ((5, 3), (7,), ())


class Wrapper:
    """Wraps an optimizer; `copied` takes its attributes along at first, as older ones did."""

    def __init__(self, optimizer, copied: bool) -> None:
        if copied:
            own = {k: v for k, v in vars(optimizer).items() if k not in ("state_dict", "step")}
            self.__dict__.update(own)
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type(f"Wrapped{kind.__name__}", (self.__class__, kind), {})

    def step(self, closure=None):
        """Steps the optimizer itself, as the trainers' strategies do."""
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


WRAP = pytest.mark.parametrize("copied", [False, True], ids=["passing", "copying"])


def make_scaler(kind: type) -> torch.amp.GradScaler:
    """Returns a scaler whose scale exists."""
    scaler = kind("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    return scaler


@OURS
@WRAP
def test_settings_reach_through(entry, copied):
    """Read and set on the wrapper, both ways; what the last step left as well."""
    run = run_fused(entry, make_params(SHAPES), "auto")
    wrapper = Wrapper(run.optimizer, copied)
    assert isinstance(wrapper, entry.fused)
    wrapper.max_grad_norm = 0.5
    wrapper.skip_nonfinite = True
    assert (run.optimizer.max_grad_norm, run.optimizer.skip_nonfinite) == (0.5, True)
    set_grads(run.params, 1)
    wrapper.step()
    assert wrapper.last_grad_norm == run.optimizer.last_grad_norm > 0.5
    run.params[0].grad[0] = math.nan
    wrapper.step()
    assert wrapper.last_step_skipped
    wrapper.backend = "torch"
    run.optimizer.max_grad_norm = 2.0
    assert (run.optimizer.backend, wrapper.max_grad_norm) == ("torch", 2.0)
    wrapper.step()
    with pytest.raises(ValueError, match=r"max_grad_norm is -1"):
        wrapper.max_grad_norm = -1
    assert wrapper.state_dict()["state"].keys() == run.optimizer.state_dict()["state"].keys()
    assert "state" not in vars(wrapper) or copied


@OURS
@WRAP
@SCALERS
@FUSED
def test_a_scaler_steps_the_wrapped_optimizer(entry, copied, kind, fused):
    """Scale and skip act on it: the same bits as without the wrapper, an overflow included."""
    start = make_params(SHAPES)
    finished = []
    for wrapped in (False, True):
        run = run_fused(entry, start, "auto", fused=fused, **richest(entry))
        handed = Wrapper(run.optimizer, copied) if wrapped else run.optimizer
        scaler = make_scaler(kind)
        for seed in range(4):
            set_grads(run.params, seed, scale=scaler.get_scale())
            if seed == 2:
                run.params[1].grad[0] = math.inf
            scaler.step(handed)
            scaler.update()
            for name in ("grad_scale", "found_inf"):
                assert not hasattr(handed, name)
                assert not hasattr(run.optimizer, name)
        assert scaler.get_scale() == 512.0
        assert run.optimizer.skip_nonfinite is False
        finished.append(run.tensors())
    assert_same_bits(*finished)


@OURS
@WRAP
def test_what_a_scaler_hands_over_reaches_through(entry, copied):
    """Set and deleted as plain attributes are, None included."""
    run = run_fused(entry, make_params(SHAPES), "auto")
    wrapper = Wrapper(run.optimizer, copied)
    wrapper.grad_scale, wrapper.found_inf = None, torch.ones(())
    assert run.optimizer.grad_scale is None
    set_grads(run.params, 1)
    wrapper.step()
    assert run.optimizer.last_step_skipped
    del wrapper.grad_scale, run.optimizer.found_inf
    for name in ("grad_scale", "found_inf"):
        assert getattr(wrapper, name, "none") == "none"
        with pytest.raises(AttributeError, match=name):
            delattr(wrapper, name)


@OURS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_the_amp_flag_is_stocks(entry, options):
    """True with fused=True only: trainers refuse to clip, and count no skips, where it is."""
    params = make_params(SHAPES)
    for fused in (None, False, True):
        flag = entry.fused(params, fused=fused, **options)._step_supports_amp_scaling
        assert flag == (fused is True)
        # In torch 2.11 Adagrad lacks it, whose fused kernel takes a scale.
        lacks = entry.name == "Adagrad" and not ADAGRAD_MAKES_STATE
        if "fused" in entry.stock(params).defaults and not lacks:
            stock = entry.stock(params, fused=fused)
            assert flag == getattr(stock, "_step_supports_amp_scaling", False)
    assert not entry.fused(params, backend="torch", **options)._step_supports_amp_scaling


@OURS
@FUSED
def test_clipping_between_unscale_and_step(entry, fused):
    """The loop of a trainer that clips by itself; and of bfloat16, without any scaler."""
    start = make_params(SHAPES)
    finished = []
    for scaled in (False, True):
        run = run_fused(entry, start, "auto", fused=fused)
        scaler = make_scaler(torch.amp.GradScaler)
        for seed in range(3):
            set_grads(run.params, seed, scale=1024.0 if scaled else 1.0)
            if scaled:
                scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.params, 0.5)
            scaler.step(run.optimizer) if scaled else run.optimizer.step()
            scaler.update(1024.0)
        finished.append(run.tensors())
    assert_same_bits(*finished)


@OURS
def test_a_step_that_is_skipped_is_not_called(entry):
    """By torch's scaler, which is how Accelerate learns of it, limits or not."""
    run = run_fused(entry, make_params(SHAPES), "auto", max_grad_norm=1.0)
    scaler = make_scaler(torch.amp.GradScaler)
    calls = []
    step = run.optimizer.step
    run.optimizer.step = lambda *args: (calls.append(1), step(*args))
    for seed in range(3):
        set_grads(run.params, seed, scale=1024.0)
        if seed == 1:
            run.params[0].grad[0] = math.inf
        scaler.step(run.optimizer, None)
        scaler.update()
    assert len(calls) == 2


class Accumulating(fusedopt.SGD):
    """Steps every second time only."""

    calls = 0

    def step(self, closure=None):
        """Counts."""
        self.calls += 1
        return super().step(closure) if self.calls % 2 == 0 else None


@FUSED
@pytest.mark.parametrize("poison", [None, math.inf])
def test_a_step_that_does_not_call_ours(poison, fused):
    """fusedopt.GradScaler looks by itself then, and no older step's finding counts."""
    params = make_params(SHAPES)
    optimizer = Accumulating(params, lr=0.1, fused=fused, max_grad_norm=1.0)
    scaler = make_scaler(fusedopt.GradScaler)
    scales = []
    for seed, bad in enumerate((None, math.inf, None, None, poison)):
        set_grads(params, seed, scale=scaler.get_scale())
        if bad is not None:
            params[1].grad[3] = bad
        before = optimizer.last_step_skipped
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if seed == 2:
            assert bool(optimizer.last_step_skipped) == bool(before)
    assert scales == [1024.0, 512.0, 512.0, 512.0, 256.0 if poison else 512.0]
    for param in params:
        param.grad = torch.ones_like(param)

    def drop(optimizer, args, kwargs):
        optimizer.zero_grad()

    optimizer.register_step_pre_hook(drop)
    scaler.step(optimizer)
    scaler.update()


@SCALERS
def test_accumulated_gradients_count_once(kind):
    """A wrapper in a scheduler in a scaler: the innermost optimizer steps once."""
    run = Run([], None)
    run.params = make_params(SHAPES)
    run.optimizer = TABLE["Adam"].fused(run.params, fused=True)
    wrapper = Wrapper(run.optimizer, False)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    scaler = make_scaler(kind)
    set_grads(run.params, 1)
    scaler.step(wrapper)
    scaler.update()
    scheduler.step()
    assert all(entries["step"] == 1 for entries in run.optimizer.state.values())
