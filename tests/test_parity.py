"""Ours do what torch's do, over PyTorch's own tables of hyperparameters and of bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import (
    ENTRIES,
    IN_TORCH,
    INTERPRETED,
    SHAPES,
    Entry,
    Run,
    assert_close,
    backends,
    copies,
    device_of,
    make_params,
)
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

INFOS = {info.optim_cls: info for info in optim_db}
OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())


def inputs(entry: Entry, device: str) -> list[dict]:
    """Returns PyTorch's keyword arguments for an optimizer, with foreach, fused and so on."""
    info = INFOS[entry.stock]
    found = _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info)
    assert len(found) >= 10
    return [case.kwargs for case in found]


@pytest.mark.parametrize("entry", **IN_TORCH)
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optim_db_inputs(entry, backend, dtype):
    """Parameters and every state stay with torch's over several steps, one of them partial."""
    device = device_of(backend)
    for kwargs in inputs(entry, device)[:: 3 if INTERPRETED else 1]:
        if kwargs.get("fused") is False and backend != "torch":
            continue
        start = make_params(SHAPES, dtype, device)
        own, theirs = copies(start), copies(start)
        if kwargs["differentiable"]:
            # Autograd refuses to change leaves in place, so these must not require a gradient.
            for param in (*own, *theirs):
                param.requires_grad_(False)
        plain = {k: v for k, v in kwargs.items() if k not in ("foreach", "fused")}
        ours = Run(own, entry.fused(own, backend=backend, **kwargs))
        stock = Run(theirs, entry.stock(theirs, **plain, foreach=False))
        for run in (ours, stock):
            run.steps(2)
            run.params[0].grad = None
            run.optimizer.step()
            run.steps(1, first=4)
        assert_close(ours.tensors(), stock.tensors())
        assert not same_values(ours.params, start), f"{kwargs} changed nothing"


def same_values(left: list, right: list) -> bool:
    """Whether all parameters are equal."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def outcome(cls: type, case, **extras) -> tuple:
    """Returns how torch's test would see `case` fail: (type, text) of the error or warning."""
    params = case.optimizer_error_input.params
    if params is None:
        params = [torch.nn.Parameter(torch.ones(1))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = cls(params, **case.optimizer_error_input.kwargs, **extras)
            if case.error_on is OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()
    except Exception as error:
        return type(error), str(error)
    return None, None


@pytest.mark.parametrize("entry", **IN_TORCH)
@BACKENDS
def test_optim_db_error_inputs(entry, backend):
    """Whatever torch refuses, we refuse with the same type and the same text."""
    cases = INFOS[entry.stock].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(cases) >= 6
    for case in cases:
        expected = outcome(entry.stock, case)
        assert expected[0] is case.error_type
        assert outcome(entry.fused, case, backend=backend) == expected, case


@OURS
@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"weight_decay": -0.5}, {"eps": -1.0}, {"unheard_of": 1}],
    ids=lambda options: next(iter(options)),
)
def test_refused_options(entry, options):
    """Values and names that torch's constructor refuses."""
    params = make_params([(2,)])
    with pytest.raises((ValueError, TypeError)) as expected:
        entry.stock(params, **options)
    with pytest.raises(expected.type) as caught:
        entry.fused(params, **options)
    if expected.type is ValueError:
        assert str(caught.value) == str(expected.value)
    else:
        assert "unheard_of" in str(caught.value) or next(iter(options)) in str(caught.value)
