"""`fusedopt.from_torch`: a twin that goes on where a torch optimizer was."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    COUNTED,
    ENTRIES,
    TABLE,
    Run,
    assert_close,
    backends,
    copies,
    device_of,
    make_params,
    richest,
)

import fusedopt

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())


#: The variants that torch's class itself has, and the flags.
OF_TORCH = [case for case in CASES["argvalues"] if all(map(case[0].takes, case[1]))]
FLAGS = [(e, flag) for e in TABLE.values() for flag in ("foreach", "fused") if e.takes(flag)]


@pytest.mark.parametrize("entry, options", OF_TORCH)
@BACKENDS
@pytest.mark.parametrize("steps", [0, 2])
def test_twin_goes_on(entry, options, backend, steps):
    """From the start or from mid-training, in the same tensors."""
    start = make_params(SHAPES, device=device_of(backend))
    own, theirs = copies(start), copies(start)
    source = entry.stock(own, **entry.serial, **options)
    Run(own, source).steps(steps)
    tensors = {p: dict(entries) for p, entries in source.state.items()}
    twin = fusedopt.from_torch(source, backend=backend)
    assert type(twin) is entry.fused
    assert twin.backend == backend
    assert [group["params"] for group in twin.param_groups] == [own]
    for key, value in source.param_groups[0].items():
        assert twin.param_groups[0][key] is value or key in ("params", "betas")
    Run(own, twin).steps(3, first=steps + 1)
    stock = Run(theirs, entry.stock(theirs, **options, **entry.serial)).steps(steps + 3)
    assert_close(Run(own, twin).tensors(), stock.tensors())
    for param, entries in tensors.items():
        for name, value in entries.items():
            if name not in COUNTED and value is not None:
                assert twin.state[param][name] is value


@OURS
def test_groups_extras_and_names(entry):
    """Groups keep their own hyperparameters, extras win, names stay."""
    module = torch.nn.Linear(3, 2)
    named = list(module.named_parameters())
    groups = [{"params": named[:1], "lr": 0.25}, {"params": named[1:], "maximize": True}]
    source = entry.stock(groups, **richest(entry))
    twin = fusedopt.from_torch(source, max_grad_norm=2.0, max_grad_value=0.5, skip_nonfinite=True)
    assert [group["param_names"] for group in twin.param_groups] == [["weight"], ["bias"]]
    assert [group["lr"] for group in twin.param_groups] == [0.25, source.defaults["lr"]]
    assert twin.param_groups[1]["maximize"] is True
    assert [group["max_grad_value"] for group in twin.param_groups] == [0.5, 0.5]
    assert (twin.max_grad_norm, twin.skip_nonfinite, twin.backend) == (2.0, True, "auto")
    assert list(twin.param_groups[0])[0] == "params"
    assert source.param_groups[0].keys() <= twin.param_groups[0].keys()
    for name, value in source.defaults.items():
        assert twin.defaults[name] == value


@pytest.mark.parametrize("entry, flag", FLAGS)
def test_speed_flags_of_the_source(entry, flag):
    """foreach=False or fused=False of the source does not bring torch's backend along."""
    twin = fusedopt.from_torch(entry.stock(make_params(), **{flag: False}))
    assert twin.backend == "auto"
    Run(twin.param_groups[0]["params"], twin).steps(1)
    explicit = fusedopt.from_torch(entry.stock(make_params()), fused=False)
    assert explicit.backend == "torch"


@pytest.mark.parametrize("entry", [entry for entry, flag in FLAGS if flag == "fused"])
def test_fused_source(entry):
    """A torch optimizer with fused=True hands over its state too."""
    params = make_params(SHAPES)
    theirs = copies(params)
    source = Run(params, entry.stock(params, fused=True)).steps(2).optimizer
    twin = Run(params, fusedopt.from_torch(source)).steps(2, first=3)
    stock = Run(theirs, entry.stock(theirs, foreach=False)).steps(4)
    assert_close(twin.tensors(), stock.tensors())


@OURS
def test_source_stays_usable_as_a_record(entry):
    """The source's own dictionaries are not the twin's: clearing one leaves the other."""
    params = make_params(SHAPES)
    source = Run(params, entry.stock(params, **richest(entry))).steps(1).optimizer
    twin = fusedopt.from_torch(source)
    source.state.clear()
    source.param_groups[0]["lr"] = 123.0
    assert twin.param_groups[0]["lr"] != 123.0
    assert len(twin.state) == len(params)


def test_what_has_no_twin():
    """The message names what came and what would do."""
    params = make_params([(2,)])

    class Own(torch.optim.SGD):
        """A subclass may have another rule."""

    for optimizer in (torch.optim.ASGD(params), Own(params), TABLE["Adam"].fused(params)):
        with pytest.raises(
            TypeError, match=r"expected exactly one of torch\.optim\.Adadelta, "
        ) as caught:
            fusedopt.from_torch(optimizer)
        assert f"optimizer is a {type(optimizer).__name__}" in str(caught.value)
    with pytest.raises(TypeError, match="optimizer is a list"):
        fusedopt.from_torch([1])


@OURS
def test_bad_extras(entry):
    """They are refused as by the constructor."""
    source = entry.stock(make_params())
    with pytest.raises(ValueError, match=r"max_grad_norm is -1.*above 0"):
        fusedopt.from_torch(source, max_grad_norm=-1)
    with pytest.raises(TypeError, match="unheard_of"):
        fusedopt.from_torch(source, unheard_of=1)


def test_hyperparameters_among_the_extras_win_in_every_group():
    """Also where the source's groups have values of their own."""
    source = torch.optim.Adam(make_params([(3,)]), lr=0.1, weight_decay=0.1)
    twin = fusedopt.from_torch(source, lr=0.5, decoupled_weight_decay=True)
    (group,) = twin.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.1)
    assert group["decoupled_weight_decay"] is True
