"""Checkpoints interchange with torch's in mid-training; copies and pickles lose nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import (
    CASES,
    COUNTING,
    ENTRIES,
    TABLE,
    Run,
    assert_close,
    assert_same_bits,
    backends,
    copies,
    device_of,
    make_fused,
    make_params,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())
OWN_KEYS = ["max_grad_norm_per_param", "max_grad_value", "decoupled_weight_decay"]
SETTINGS = {"max_grad_norm": 0.5, "skip_nonfinite": True}


def through_a_file(checkpoint: dict) -> dict:
    """Saves and loads, with torch's safe loader."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(run: Run, other: Run) -> Run:
    """Gives `other` the values and the checkpoint of `run`."""
    with torch.no_grad():
        for to, param in zip(other.params, run.params, strict=True):
            to.copy_(param)
    other.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    return other


def with_unset_momentum(backend: str) -> Run:
    """Returns an SGD whose first step was skipped: memory for the momentum, and nothing in it."""
    start = make_params(SHAPES, device=device_of(backend))
    run = run_fused(TABLE["SGD"], start, backend, momentum=0.9, dampening=0.3)
    run.optimizer.found_inf = torch.ones((), device=device_of(backend))
    run.steps(1)
    del run.optimizer.found_inf
    assert all(torch.equal(a, b) for a, b in zip(run.params, start, strict=True))
    return run


@pytest.mark.parametrize("entry, options", **CASES)
@BACKENDS
def test_there_and_back(entry, options, backend):
    """Torch -> ours -> torch -> ours, two steps each, ends where torch alone does."""
    if options.get("decoupled_weight_decay") and not entry.decouples:
        options = {**options, "decoupled_weight_decay": False}
    plain = {k: v for k, v in options.items() if k != "decoupled_weight_decay" or v}
    start = make_params(SHAPES, device=device_of(backend))
    expected = run_stock(entry, start, **plain).steps(8)
    run = run_stock(entry, start, **plain).steps(2)
    for first, make in ((3, "ours"), (5, "stock"), (7, "ours")):
        if make == "ours":
            following = run_fused(entry, start, backend, **options)
        else:
            following = run_stock(entry, start, **plain)
        run = continued(run, following).steps(2, first)
    assert_close(run.tensors(), expected.tensors())
    ours, theirs = run.optimizer.state_dict(), expected.optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in ours["state"].items():
        assert {k for k, v in theirs["state"][index].items() if v is not None} == entries.keys()
        for name, value in entries.items():
            assert isinstance(value, torch.Tensor), name
            assert value.shape == theirs["state"][index][name].shape
            assert value.device == theirs["state"][index][name].device


@OURS
@BACKENDS
def test_rolling_back(entry, backend):
    """A live optimizer takes an older checkpoint and repeats itself bit for bit."""
    start = make_params(SHAPES, device=device_of(backend))
    run = run_fused(entry, start, backend, **richest(entry)).steps(2)
    saved = copies(run.params), copy.deepcopy(run.optimizer.state_dict())
    first = {name: value.clone() for name, value in run.steps(3, first=3).tensors().items()}
    with torch.no_grad():
        for param, value in zip(run.params, saved[0], strict=True):
            param.copy_(value)
    run.optimizer.load_state_dict(saved[1])
    assert_same_bits(run.steps(3, first=3).tensors(), first)


@OURS
@pytest.mark.parametrize(
    "given", [OWN_KEYS[:1], OWN_KEYS[1:2], OWN_KEYS[2:], OWN_KEYS], ids=lambda names: names[0]
)
def test_defaults_and_group_keys(entry, given):
    """They are torch's in torch's order, and after them those of ours that are set."""
    ours, stock = entry.fused(make_params()), entry.stock(make_params())
    assert list(ours.defaults.items()) == list(stock.defaults.items())
    assert list(ours.param_groups[0]) == list(stock.param_groups[0])
    values = {"max_grad_norm_per_param": 2.0, "max_grad_value": 0.5, "decoupled_weight_decay": True}
    options = entry.known(**{name: values[name] for name in given})
    ours = entry.fused(make_params(), **options)
    added = [name for name in OWN_KEYS if name in options and name not in stock.defaults]
    assert list(ours.defaults) == [*stock.defaults, *added]
    # torch puts "params" first, its keys, and whatever else stands in the group.
    assert list(ours.param_groups[0]) == [*stock.param_groups[0], *added]
    assert options.items() <= ours.param_groups[0].items()
    ours.add_param_group({"params": make_params()})
    assert ours.param_groups[1].keys() == ours.param_groups[0].keys()


@OURS
@BACKENDS
def test_stock_checkpoint_keeps_our_settings(entry, backend):
    """What a stock checkpoint does not know stays as it is, group by group."""
    params = make_params([(3,), (4,)], device=device_of(backend))
    several = {"foreach": True} if entry.takes("foreach") else {}
    stock = entry.stock([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], **several)
    Run(params, stock).steps(1)
    groups = [
        {"params": params[:1], "max_grad_value": 0.25},
        {"params": params[1:], "max_grad_norm_per_param": 3.0, "maximize": True},
    ]
    ours = make_fused(entry, groups, backend, max_grad_value=7.0, **SETTINGS)
    decoupled = [group.get("decoupled_weight_decay") for group in ours.param_groups]
    ours.load_state_dict(through_a_file(stock.state_dict()))
    assert [group["max_grad_value"] for group in ours.param_groups] == [0.25, 7.0]
    assert [group.get("max_grad_norm_per_param") for group in ours.param_groups] == [None, 3.0]
    assert [group.get("decoupled_weight_decay") for group in ours.param_groups] == decoupled
    assert ours.param_groups[1]["lr"] == 0.5
    assert ours.param_groups[1]["maximize"] is False
    assert (ours.max_grad_norm, ours.skip_nonfinite, ours.backend) == (0.5, True, backend)
    Run(params, ours).steps(1, first=2)
    assert (ours.max_grad_norm, ours.skip_nonfinite) == (0.5, True)


@OURS
def test_our_checkpoint_carries_group_keys_only(entry):
    """Group keys of ours travel; what belongs to the optimizer does not."""
    saved = entry.fused(make_params(), max_grad_value=0.5, backend="torch", **SETTINGS)
    checkpoint = through_a_file(saved.state_dict())
    assert checkpoint.keys() == {"state", "param_groups"}
    assert not {*SETTINGS, "backend"} & checkpoint["param_groups"][0].keys()
    other = entry.fused(make_params(), max_grad_value=9.0, max_grad_norm=4.0)
    other.load_state_dict(checkpoint)
    assert other.param_groups[0]["max_grad_value"] == 0.5
    assert (other.max_grad_norm, other.skip_nonfinite, other.backend) == (4.0, False, "auto")


@OURS
@BACKENDS
@pytest.mark.parametrize("loaded", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_loaded_flags_do_not_change_the_backend(entry, backend, loaded):
    """`fused` and `foreach` of a checkpoint say how it was made, not how we go on."""
    if not all(map(entry.takes, loaded)):
        pytest.skip("the plain class has no such form")
    params = make_params([(3,)], device=device_of(backend))
    stock = entry.stock(params, **loaded)
    Run(params, stock).steps(1)
    ours = make_fused(entry, params, backend)
    ours.load_state_dict(stock.state_dict())
    Run(params, ours).steps(1, first=2)
    assert ours.backend == backend
    assert ours.backend_of(params[0]) == backend


@OURS
@BACKENDS
def test_empty_state(entry, backend):
    """A checkpoint from before the first step loads, and training starts as if nothing was."""
    start = make_params(SHAPES, device=device_of(backend))
    run = run_fused(entry, start, backend, **richest(entry))
    checkpoint = through_a_file(entry.stock(copies(start), **richest(entry)).state_dict())
    run.optimizer.load_state_dict(checkpoint)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert_close(
        run.steps(2).tensors(), run_stock(entry, start, **richest(entry)).steps(2).tensors()
    )


@pytest.mark.parametrize("entry", **COUNTING)
@BACKENDS
@pytest.mark.parametrize("kind", [int, float])
def test_old_steps(entry, backend, kind):
    """A step that an old checkpoint holds as a number becomes a 0-dim tensor and counts on."""
    start = make_params(SHAPES, device=device_of(backend))
    stock = run_stock(entry, start, **richest(entry)).steps(3)
    checkpoint = copy.deepcopy(stock.optimizer.state_dict())
    for entries in checkpoint["state"].values():
        entries["step"] = kind(entries["step"].item())
    ours = run_fused(entry, stock.params, backend, **richest(entry))
    ours.optimizer.load_state_dict(checkpoint)
    assert_close(ours.steps(1, first=4).tensors(), stock.steps(1, first=4).tensors())
    for entries in ours.optimizer.state.values():
        assert entries["step"].shape == ()
        assert entries["step"] == 4


@OURS
@BACKENDS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_and_pickles(entry, backend, how):
    """The twin has every setting, trains on as the original and shares nothing with it."""
    start = make_params(SHAPES, device=device_of(backend))
    settings = {**SETTINGS, "max_grad_value": 0.9, "max_grad_norm_per_param": 0.4}
    run = run_fused(entry, start, backend, **richest(entry), **settings).steps(2)
    # Together: only so does the optimizer's copy refer to the copied parameters.
    twin = Run(*how((run.params, run.optimizer)))
    assert type(twin.optimizer) is entry.fused
    assert (twin.optimizer.max_grad_norm, twin.optimizer.skip_nonfinite) == (0.5, True)
    assert twin.optimizer.backend == backend
    assert twin.optimizer.param_groups[0]["max_grad_value"] == 0.9
    assert twin.optimizer.defaults == run.optimizer.defaults
    assert twin.optimizer._step_supports_amp_scaling == run.optimizer._step_supports_amp_scaling
    before = {name: value.clone() for name, value in run.tensors().items()}
    ahead = twin.steps(2, first=3).tensors()
    assert_same_bits(run.tensors(), before)
    assert_same_bits(run.steps(2, first=3).tensors(), ahead)
    twin.optimizer.add_param_group({"params": make_params([(2,)], device=device_of(backend))})
    assert twin.optimizer.param_groups[1]["max_grad_value"] == 0.9
    with pytest.raises(ValueError, match="backend is 'cpu' in param group"):
        twin.optimizer.add_param_group({"params": make_params([(2,)]), "backend": "cpu"})


@BACKENDS
def test_unset_momentum_is_left_out(backend):
    """After a skipped first step there is no momentum: not in a checkpoint, a pickle or a copy."""
    run = with_unset_momentum(backend)
    assert not any(run.optimizer.state_dict()["state"].values())
    loaded = pickle.loads(pickle.dumps(run.optimizer))
    assert not any("momentum_buffer" in entries for entries in loaded.state.values())
    twin = Run(*copy.deepcopy((run.params, run.optimizer)))
    start = copies(run.params)
    expected = run_stock(TABLE["SGD"], start, momentum=0.9, dampening=0.3).steps(2).tensors()
    assert_close(run.steps(2).tensors(), expected)
    assert_close(twin.steps(2).tensors(), expected)
    assert run.optimizer.state_dict()["state"][0].keys() == {"momentum_buffer"}


@BACKENDS
def test_momentum_of_late_gradients_in_a_checkpoint(backend):
    """Only parameters that had a gradient have it; the others start theirs after loading."""
    options = {"momentum": 0.9, "dampening": 0.3}
    start = make_params(SHAPES, device=device_of(backend))
    entry = TABLE["SGD"]
    runs = run_stock(entry, start, **options), run_fused(entry, start, backend, **options)
    ends = []
    for run in runs:
        set_grads(run.params, 1)
        run.params[1].grad = None
        run.optimizer.step()
        following = run_fused(entry, start, backend, **options)
        ends.append(continued(run, following).steps(2, first=2).tensors())
        assert run.optimizer.state_dict()["state"].keys() == {0, 2}
    assert_close(*ends)
    assert_close(runs[1].steps(2, first=2).tensors(), ends[0])


@OURS
@BACKENDS
def test_checkpoint_of_another_shape_of_groups(entry, backend):
    """Torch's texts, and nothing has been changed."""
    run = run_fused(entry, make_params(SHAPES, device=device_of(backend)), backend).steps(1)
    two = [{"params": make_params([(1,)])}, {"params": make_params([(2,)])}]
    before = {name: value.clone() for name, value in run.tensors().items()}
    with pytest.raises(ValueError, match="different number of parameter groups"):
        run.optimizer.load_state_dict(entry.stock(two).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        run.optimizer.load_state_dict(entry.stock(make_params([(1,)])).state_dict())
    assert_same_bits(run.tensors(), before)
    run.steps(1, first=2)


@OURS
def test_state_dict_hooks(entry):
    """All four kinds fire once, also through our own state_dict."""
    optimizer = entry.fused(make_params())
    fired = []
    optimizer.register_state_dict_pre_hook(lambda opt: fired.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, checkpoint: fired.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, checkpoint: fired.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda opt: fired.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == ["pre", "post", "load pre", "load post"]


@OURS
@BACKENDS
def test_state_dict_is_small(entry, backend):
    """A checkpoint holds no more than torch's."""
    start = make_params([(1,)] * 200, device=device_of(backend))
    sizes = []
    for run in (run_stock(entry, start), run_fused(entry, start, backend)):
        file = io.BytesIO()
        torch.save(run.steps(1).optimizer.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[1] < 1.2 * sizes[0] + 1000


@OURS
def test_what_was_switched_off_stays_off(entry):
    """Through two resumes by a script whose constructor switches it on."""
    options = {"max_grad_value": 0.5, "max_grad_norm_per_param": 1.0}
    optimizer = entry.fused(make_params([(3,)]), **options)
    for name in options:
        optimizer.param_groups[0][name] = None
    for _ in range(2):
        checkpoint = through_a_file(optimizer.state_dict())
        optimizer = entry.fused(make_params([(3,)]), **options)
        optimizer.load_state_dict(checkpoint)
        assert [optimizer.param_groups[0][name] for name in options] == [None, None]
