"""Groups, states and tensors that are unusual and legal, or wrong and refused with a clear word."""

from __future__ import annotations

import collections
import contextlib
import re

import numpy as np
import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    make_params,
    native_backends,
    random,
    richest,
    run_fused,
    run_stock,
    same_bits,
    set_grads,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())
ADAM, SGD, ADAGRAD = TABLE["Adam"], TABLE["SGD"], TABLE["Adagrad"]
SHAPES = ((3,), (2, 2))


def both(entry, backend, shapes=SHAPES, **options):
    """Torch's run and ours over the same parameters."""
    start = make_params(shapes, device=device_of(backend))
    return run_stock(entry, start, **options), run_fused(entry, start, backend, **options)


@pytest.mark.parametrize(
    "name, options",
    [
        ("Adam", {"amsgrad": None, "maximize": None}),
        ("SGD", {"nesterov": None, "maximize": None, "momentum": 0.9}),
        ("RMSprop", {"centered": None}),
        ("Adam", {"amsgrad": "yes", "maximize": 1}),
    ],
)
@BACKENDS
def test_flags_are_truths(name, options, backend):
    """As torch asks them: None is false, a text is true."""
    stock, ours = both(TABLE[name], backend, **options)
    assert_close(ours.steps(2).tensors(), stock.steps(2).tensors())


@OURS
@BACKENDS
def test_groups_and_parameters_in_tuples(entry, backend):
    """Assigned past ``add_param_group``; numbers are read from them every step."""
    runs = both(entry, backend, **richest(entry))
    for run in runs:
        run.steps(1)
        run.optimizer.param_groups = tuple(run.optimizer.param_groups)
        group = run.optimizer.param_groups[0]
        group["params"] = tuple(group["params"])
        run.steps(1, 2)
        group["lr"] = 0.3
        run.steps(1, 3)
    assert_close(runs[1].tensors(), runs[0].tensors())


@NATIVE
@pytest.mark.parametrize("name, key", [("Adam", "lr"), ("Adam", "eps"), ("SGD", "momentum")])
def test_a_number_in_an_array_is_read_every_step(backend, name, key):
    """NumPy's, filled in place, which changes no dict."""
    stock, ours = both(TABLE[name], backend, **{"lr": 0.1, key: 0.5})
    number = np.array(0.5)
    for run in (stock, ours):
        run.optimizer.param_groups[0][key] = number.copy() if run is ours else 0.5
        run.steps(1)
    ours.optimizer.param_groups[0][key].fill(0.25)
    stock.optimizer.param_groups[0][key] = 0.25
    assert_close(ours.steps(2, 2).tensors(), stock.steps(2, 2).tensors())


@NATIVE
@pytest.mark.parametrize("key", ["lr", "eps", "max_grad_value", "max_grad_norm_per_param"])
def test_an_integer_beyond_floats_is_refused(backend, key):
    """With a word for it, and nothing changed."""
    run = run_fused(ADAM, make_params(SHAPES, device=device_of(backend)), backend).steps(1)
    before = {name: value.clone() for name, value in run.tensors().items()}
    run.optimizer.param_groups[0][key] = 10**400
    with pytest.raises(ValueError, match=rf"{key}.* too large for a float"):
        run.optimizer.step()
    assert_same_bits(run.tensors(), before)
    if key.startswith("max"):
        with pytest.raises(ValueError, match="expected a number above 0"):
            run_fused(ADAM, make_params(SHAPES), backend, **{key: 10**400})


@NATIVE
def test_groups_and_state_of_a_wrong_kind(backend):
    """The message says what is expected."""
    run = run_fused(ADAM, make_params(SHAPES, device=device_of(backend)), backend).steps(1)
    groups, state = run.optimizer.param_groups, run.optimizer.state
    for name, value, text in [
        ("state", None, "optimizer.state is None; expected a dict"),
        ("param_groups", iter(groups), "param_groups is .* expected a list of dicts"),
        ("param_groups", [{"lr": 1.0, "params": None}], "list of parameters"),
    ]:
        set_grads(run.params, 2)
        setattr(run.optimizer, name, value)
        with pytest.raises(TypeError, match=text) as caught:
            run.optimizer.step()
        assert "Invoked with" not in str(caught.value)
        run.optimizer.param_groups, run.optimizer.state = groups, state
    run.steps(1)


@OURS
@BACKENDS
def test_state_of_a_parameter_without_gradient_need_not_fit(entry, backend):
    """Torch steps the others; with a gradient ours says what does not fit, where kernels work."""
    runs = both(entry, backend, **richest(entry))
    for run in runs:
        run.steps(1)
        entries = run.optimizer.state[run.params[0]]
        name = entry.states[0]
        entries[name] = entries[name].new_zeros(5)
        set_grads(run.params, 2)
        run.params[0].grad = None
        run.optimizer.step()
    assert_close(runs[1].tensors(), runs[0].tensors())
    if backend != "torch":
        set_grads(runs[1].params, 3)
        with pytest.raises(ValueError, match=rf"state '{entry.states[0]}' of parameter 0 of param"):
            runs[1].optimizer.step()


class Elsewhere(dict):
    """Holds names, and others in the place of the tensors that it returns."""

    def __init__(self, tensors=()):
        super().__init__()
        self.tensors = {}
        for name, tensor in dict(tensors).items():
            self[name] = tensor

    def __setitem__(self, name, tensor):
        super().__setitem__(name, torch.zeros_like(tensor))
        self.tensors[name] = tensor

    def __getitem__(self, name):
        return self.tensors[name]


@OURS
@BACKENDS
@pytest.mark.parametrize("kind", [collections.UserDict, Elsewhere, collections.OrderedDict])
def test_a_state_in_another_mapping(entry, backend, kind):
    """Torch reads any; one after a step, one that a first step fills."""
    runs = both(entry, backend, **richest(entry))
    for run in runs:
        set_grads(run.params, 1)
        if entry.name != "Adagrad":
            run.optimizer.state[run.params[0]] = kind()
        run.optimizer.step()
        run.optimizer.state[run.params[1]] = kind(run.optimizer.state[run.params[1]])
        run.steps(2, 2)
    assert_close(runs[1].tensors(), runs[0].tensors())
    assert type(runs[1].optimizer.state[runs[1].params[1]]) is kind


class Halving(dict):
    """A group whose learning rate is not the one that it holds."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        return value / 2 if name == "lr" else value


@OURS
@BACKENDS
def test_a_group_of_another_kind_of_dict(entry, backend):
    """Torch asks it; one given to ``add_param_group``, one put in later."""
    runs = both(entry, backend, **richest(entry))
    for run in runs:
        more = make_params([(4,)], device=device_of(backend), seed=9)
        run.params += more
        run.optimizer.add_param_group(Halving(params=more, lr=0.5))
        run.steps(2)
        run.optimizer.param_groups[0] = Halving(run.optimizer.param_groups[0])
        run.steps(2, 2)
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
@pytest.mark.parametrize("value", [None, [1.0]], ids=str)
def test_a_state_that_is_no_mapping(entry, backend, value):
    """The message names the parameter; nothing has been changed."""
    run = run_fused(entry, make_params(SHAPES, device=device_of(backend)), backend).steps(1)
    run.optimizer.state[run.params[1]] = value
    before = [param.detach().clone() for param in run.params]
    set_grads(run.params, 2)
    text = f"state of parameter 1 of param group 0 is {value!r}; expected a dict"
    with pytest.raises(TypeError, match=re.escape(text)):
        run.optimizer.step()
    for param, old in zip(run.params, before, strict=True):
        assert same_bits(param.detach(), old)


@NATIVE
@pytest.mark.parametrize("value", [None, [1.0, 2.0]], ids=str)
def test_a_state_that_is_no_tensor(backend, value):
    """The message names it."""
    run = run_fused(ADAM, make_params(SHAPES, device=device_of(backend)), backend).steps(1)
    run.optimizer.state[run.params[1]]["exp_avg"] = value
    before = [param.detach().clone() for param in run.params]
    set_grads(run.params, 2)
    text = f"state 'exp_avg' of parameter 1 of param group 0 is {value!r}; expected a tensor"
    with pytest.raises(ValueError, match=re.escape(text)):
        run.optimizer.step()
    assert all(map(torch.equal, before, run.params))


@BACKENDS
@pytest.mark.parametrize("place", ["param", "state", "later"])
def test_negated_views(backend, place):
    """Memory that holds the negative of what the tensor says."""
    device = device_of(backend)
    runs = both(SGD, backend, shapes=((3,),), lr=0.1, momentum=0.9)
    for run in runs:
        if place == "param":
            run.params[0].data = torch._neg_view(run.params[0].detach())
        run.steps(1)
        entries = run.optimizer.state[run.params[0]]
        if place == "state":
            entries["momentum_buffer"] = torch._neg_view(entries["momentum_buffer"])
        if place == "later":
            run.params[0].data = torch._neg_view(random((3,), 5, device=device))
        run.steps(2, 2)
    assert_close(runs[1].tensors(), runs[0].tensors())


@BACKENDS
@pytest.mark.parametrize("ones", [10, 64, 80])
def test_more_dimensions_than_anybody_needs(backend, ones):
    """Dimensions of one element do not count."""
    device = device_of(backend)
    shape = [1] * ones
    runs = both(ADAM, backend, shapes=((6,),))
    for run in runs:
        param = torch.nn.Parameter(run.params[0].detach().view([*shape, 2, 3]))
        run.optimizer.param_groups[0]["params"] = run.params = [param]
        for seed in (1, 2):
            grad = random((6,), seed, device=device).view([3, 1, 2, *shape[1:]])
            param.grad = grad.permute(*range(3, grad.dim()), 1, 2, 0)
            assert param.grad.shape == param.shape
            assert not param.grad.is_contiguous()
            run.optimizer.step()
    for (name, ours), theirs in zip(
        runs[1].tensors().items(), runs[0].tensors().values(), strict=True
    ):
        torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), msg=name)


@contextlib.contextmanager
def flushing():
    """Denormals become zero in this thread."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@OURS
@pytest.mark.skipif("cpu" not in native_backends(), reason="no native extension")
def test_flushed_denormals_are_flushed_by_every_thread(entry):
    """The same bits for any number of threads, and the workers' own settings are left alone."""
    start = make_params([(50_000,)] * 4)
    for param in start:
        param.data *= 1e-38
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 2):
            torch.set_num_threads(count)
            run = run_fused(entry, start, "cpu", **richest(entry), max_grad_norm=1.0)
            with flushing():
                run.steps(1, scale=1e-38)
            results.append(run.tensors())
        for other in results[1:]:
            assert_same_bits(other, results[0])
        # Torch's own workers are those of ours.
        tiny = torch.full((1_000_000,), 1e-40)
        assert bool((tiny * 1.0 != 0).all())
    finally:
        torch.set_num_threads(threads)


@NATIVE
def test_under_another_default_device(backend):
    """``torch.device("meta")`` as a context, as it is used to make models without memory.

    Some of torch's own optimizers fail in it.
    """
    stock, ours = both(ADAM, backend)
    for seed in (1, 2):
        set_grads(stock.params, seed)
        stock.optimizer.step()
        set_grads(ours.params, seed)
        if seed == 2:
            ours.optimizer.grad_scale = 1.0
        with torch.device("meta"):
            ours.optimizer.step()
    assert_close(ours.tensors(), stock.tensors())


@pytest.mark.parametrize("backend", [b for b in native_backends() if device_of(b) == "cpu"])
def test_gradients_of_function_transforms(backend):
    """They are wrappers without memory, which an error says; torch's class refuses them, too."""
    for kind, extras in ((torch.optim.SGD, {}), (SGD.fused, {"backend": backend})):
        (param,) = make_params([(4,)], device=device_of(backend))
        before = param.detach().clone()
        optimizer = kind([param], lr=0.1, **extras)
        set_grads([param], 1)

        def step(x, param=param, optimizer=optimizer):
            param.grad = x * param.grad.detach()
            with torch.no_grad():
                optimizer.step()
            return x.sum()

        with pytest.raises(RuntimeError, match="captured Tensor|doesn't have storage"):
            torch.func.grad(step)(torch.ones(4, device=param.device))
        assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("backend", native_backends())
def test_forward_mode_differentiation_sees_the_step(backend):
    """Tangents of gradients reach the parameters, as with torch's class."""
    tangents = []
    for kind, extras in ((torch.optim.SGD, {}), (SGD.fused, {"backend": backend})):
        (param,) = make_params([(2,)], device=device_of(backend))
        optimizer = kind([param], lr=0.1, **extras)
        set_grads([param], 1)
        optimizer.step()
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            tangent = torch.tensor([1.0, 2.0], device=param.device)
            param.grad = torch.autograd.forward_ad.make_dual(param.grad.detach(), tangent)
            optimizer.step()
            tangents.append(torch.autograd.forward_ad.unpack_dual(param).tangent.clone())
    assert torch.equal(*tangents)
