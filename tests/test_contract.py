"""What surrounds step() works as with torch's classes: hooks, closures, schedulers, compile."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import types
import warnings
from unittest import mock

import pytest
import torch
from cases import (
    CAPTURABLE,
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
    make_stock,
    random,
    richest,
    run_fused,
    run_stock,
    set_grads,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())


@OURS
def test_is_a_torch_optimizer(entry):
    """Subclass, signature and name: what trainers look at."""
    assert issubclass(entry.fused, entry.stock)
    assert entry.fused.__name__ == entry.stock.__name__
    ours = list(inspect.signature(entry.fused).parameters.values())
    theirs = list(inspect.signature(entry.stock).parameters.values())
    assert ours[: len(theirs)] == theirs
    added = ours[len(theirs) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in added)
    names = {parameter.name for parameter in ours}
    assert {"max_grad_norm", "max_grad_norm_per_param", "max_grad_value"} <= names
    assert {"skip_nonfinite", "decoupled_weight_decay", "backend", "fused"} <= names
    assert "grad_scaler" not in inspect.signature(entry.fused.step).parameters
    optimizer = entry.fused(make_params())
    assert "step" not in vars(optimizer)
    assert repr(optimizer).startswith(f"{entry.name} (\nParameter Group 0")


@OURS
def test_positional_arguments(entry):
    """The constructor takes what torch's takes by position, in the same order."""
    order = list(inspect.signature(entry.stock).parameters.values())[1:]
    values = [p.default for p in order if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    params = make_params()
    ours, stock = entry.fused(params, *values), entry.stock(params, *values)
    assert {k: ours.defaults[k] for k in stock.defaults} == stock.defaults


@OURS
@BACKENDS
@pytest.mark.parametrize("stock_alive", [False, True])
def test_hooks_fire_once(entry, backend, stock_alive):
    """Also while a stock optimizer lives, which makes torch wrap the step of its class."""
    params = make_params(device=device_of(backend))
    optimizer = make_fused(entry, params, backend)
    alive = entry.stock(make_params()) if stock_alive else None
    fired = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: fired.append("pre"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: fired.append("post"))
    everywhere = register_optimizer_step_pre_hook(lambda opt, args, kwargs: fired.append("global"))
    try:
        Run(params, optimizer).steps(2)
    finally:
        everywhere.remove()
    assert fired == ["global", "pre", "post"] * 2
    if alive is not None:
        Run(alive.param_groups[0]["params"], alive).steps(1)
        assert len(fired) == 6


@OURS
@BACKENDS
def test_hooks_fire_once_around_an_overridden_step(entry, backend):
    """A subclass whose step calls ours is hooked on the outside only, as every step is."""
    fired = []
    params = make_params(SHAPES, device=device_of(backend))

    class Counting(type(make_fused(entry, params, backend))):
        def step(self, closure=None):
            fired.append("begin")
            super().step(closure)
            fired.append("end")

    optimizer = Counting(params, backend=backend)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: fired.append("pre"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: fired.append("post"))
    set_grads(params, 0)
    optimizer.step()
    assert fired == ["pre", "begin", "end", "post"]


def make_wrapped(base):
    """A subclass whose step is the base's own in a decorator, as old code has it."""

    class Wrapped(base):
        step = torch.no_grad()(base.step)

    return Wrapped


@OURS
@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_see_what_they_see_of_torchs_classes(entry, wrapped):
    """Arguments as they were given, by position or name, also through a decorated step."""
    seen = {}
    for base in (entry.stock, entry.fused):
        params = make_params(SHAPES)
        optimizer = (make_wrapped(base) if wrapped else base)(params)
        calls = seen.setdefault(base, [])
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs, calls=calls: calls.append((len(args), set(kwargs)))
        )
        optimizer.register_step_post_hook(
            lambda opt, args, kwargs, calls=calls: calls.append((len(args), set(kwargs)))
        )
        set_grads(params, 0)
        optimizer.step()
        optimizer.step(lambda: None)
        optimizer.step(None)
        optimizer.step(closure=lambda: None)
    assert seen[entry.fused] == seen[entry.stock]


@OURS
@BACKENDS
def test_pre_hook_may_change_the_arguments_and_the_gradients(entry, backend):
    """It returns new (args, kwargs), as torch allows."""
    start = make_params(SHAPES, device=device_of(backend))
    runs = run_stock(entry, start), run_fused(entry, start, backend)
    for run in runs:

        def hook(optimizer, args, kwargs, params=run.params):
            set_grads(params, 77)
            return (optimizer, lambda: 42), {}

        run.optimizer.register_step_pre_hook(hook)
        assert run.optimizer.step() == 42
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
def test_closure(entry, backend):
    """Called once with gradients enabled, its value returned; the rest runs without autograd."""
    start = make_params([(6, 2)], device=device_of(backend))
    runs = run_stock(entry, start), run_fused(entry, start, backend)
    for run in runs:
        calls = []

        def closure(run=run, calls=calls):
            assert torch.is_grad_enabled()
            calls.append(1)
            run.optimizer.zero_grad()
            loss = (run.params[0] ** 2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [run.optimizer.step(closure) for _ in range(3)]
        assert len(calls) == 3
        assert losses[2] < losses[0]
        assert all(p.requires_grad and p.grad_fn is None for p in run.params)
    assert_close(runs[1].tensors(), runs[0].tensors())


@OURS
@BACKENDS
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.3),
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=3),
        lambda opt: lr_scheduler.OneCycleLR(
            opt, max_lr=0.1, total_steps=10, cycle_momentum=cycles(opt)
        ),
        lambda opt: lr_scheduler.CyclicLR(
            opt, 1e-3, 1e-1, step_size_up=2, cycle_momentum=cycles(opt)
        ),
        lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    ],
    ids=["StepLR", "warm_restarts", "OneCycleLR", "CyclicLR", "LambdaLR"],
)
def test_schedulers(entry, backend, make):
    """They write lr, and some of them betas or momentum, between the steps."""
    start = make_params(SHAPES, device=device_of(backend))
    runs = (
        run_stock(entry, start, **richest(entry)),
        run_fused(entry, start, backend, **richest(entry)),
    )
    for run in runs:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = make(run.optimizer)
            for seed in range(1, 8):
                run.steps(1, first=seed)
                scheduler.step()
    assert_close(runs[1].tensors(), runs[0].tensors(), factor=4)


def cycles(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the scheduler can cycle this optimizer's momentum or betas."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


@OURS
@BACKENDS
def test_tensor_lr_filled_in_place(entry, backend):
    """The learning rate is read in every step, also from a tensor."""
    start = make_params(SHAPES, device=device_of(backend))
    runs = []
    for kind in ("tensor", "number"):
        lr = torch.tensor(0.1) if kind == "tensor" else 0.1
        run = run_fused(entry, start, backend, **{**richest(entry), "lr": lr})
        assert run.optimizer.param_groups[0]["lr"] is lr
        run.steps(1)
        for seed, value in ((2, 0.03), (3, 0.5)):
            if kind == "tensor":
                lr.fill_(value)
            else:
                run.optimizer.param_groups[0]["lr"] = value
            run.steps(1, first=seed)
        runs.append(run.tensors())
    assert_close(*runs)


@OURS
@BACKENDS
def test_tensor_hyperparameters(entry, backend):
    """One-element tensors where torch takes them: betas of Adam, weight decay everywhere."""
    start = make_params(SHAPES, device=device_of(backend))
    options = entry.known(weight_decay=torch.tensor(0.1))
    if entry.name in ("Adam", "AdamW"):
        options["betas"] = (torch.tensor(0.8), torch.tensor(0.95))
    stock = run_stock(entry, start, **options).steps(3)
    ours = run_fused(entry, start, backend, **options).steps(3)
    assert_close(ours.tensors(), stock.tensors())


@OURS
@BACKENDS
def test_step_with_zero_lr_and_zero_gradients_changes_nothing(entry, backend):
    """Distributed checkpointing makes state exist this way; signs of zeros and NaN stay."""
    start = make_params(SHAPES, device=device_of(backend))
    with torch.no_grad():
        start[0][0] = torch.tensor([-0.0, float("nan"), 1e-42])
    for lr in (0.0, torch.tensor(0.0)):
        own = copies(start)
        optimizer = make_fused(entry, own, backend, lr=lr)
        for param in own:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        if backend != "torch" or entry.name in ("Adam", "SGD"):
            names = [f"param {i}" for i in range(len(own))]
            assert_same_bits(
                dict(zip(names, own, strict=True)), dict(zip(names, start, strict=True))
            )
        for param, before in zip(own, start, strict=True):
            torch.testing.assert_close(param.data, before.data, rtol=0, atol=0, equal_nan=True)


@OURS
@BACKENDS
def test_named_parameters(entry, backend):
    """Names are kept in the groups and the state dict, as by torch."""
    module = torch.nn.Linear(3, 2).to(device_of(backend))
    optimizer = make_fused(entry, module.named_parameters(), backend)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    module(random((4, 3), 0, device=device_of(backend))).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, module.weight)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@OURS
@BACKENDS
def test_profiler_range(entry, backend):
    """A step appears once under torch's name for it."""
    params = make_params(device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend)).steps(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.optimizer.step()
    name = f"Optimizer.step#{entry.name}.step"
    (event,) = [event for event in profile.events() if event.name == name]
    # Under it, what takes the time.
    child = f"fusedopt::{entry.rule.kernel}" if backend != "torch" else "aten::"
    assert any(inner.name.startswith(child) for inner in event.cpu_children)


@OURS
def test_wrong_arguments_of_step(entry):
    """The TypeError names `step` as users know it."""
    optimizer = entry.fused(make_params(SHAPES))
    for watched in (False, True):
        if watched:
            optimizer.register_step_pre_hook(lambda *args: None)
        with pytest.raises(TypeError, match=r"\.step\(\) takes from 1 to 2 positional arguments"):
            optimizer.step(1, 2)
        with pytest.raises(TypeError, match=r"\.step\(\) got an unexpected keyword"):
            optimizer.step(closer=None)


@contextlib.contextmanager
def pretended_gpu(capturing: bool):
    """Stands in for all that torch's capture check asks of a GPU, from torch 2.11 on."""
    stream = types.SimpleNamespace(is_capturing=lambda: capturing)
    accelerator = types.SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda check_available=False: types.SimpleNamespace(type="cuda"),
        current_stream=lambda: stream,
    )
    with (
        mock.patch.object(torch, "accelerator", accelerator),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing),
    ):
        yield


@OURS
@pytest.mark.parametrize("capturing", [False, True])
def test_graph_capture_check(entry, capturing):
    """Where torch's class checks, ours does, with torch's texts; SGD and Adagrad never do."""
    params = make_params([(2,)])
    outcomes = []
    for make in (make_stock, lambda *args: make_fused(*args, "torch")):
        optimizer = make(entry, params)
        set_grads(params, 1)
        try:
            with pretended_gpu(capturing):
                optimizer.step()
            outcomes.append(None)
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    checks = capturing and "capturable" in optimizer.defaults
    assert (outcomes[1] is not None) == checks


@pytest.mark.parametrize("entry", **CAPTURABLE)
def test_uncaptured_capturable_warns_once(entry):
    """Torch warns an optimizer that was made capturable and is not captured; so do we."""
    for cls in (entry.stock, entry.fused):
        optimizer = cls(make_params([(2,)]), capturable=True)
        optimizer._warned_capturable_if_run_uncaptured = False
        with (
            pretended_gpu(capturing=False),
            pytest.warns(UserWarning, match="constructed with capturable=True"),
        ):
            optimizer._accelerator_graph_capture_health_check()
        assert optimizer._warned_capturable_if_run_uncaptured


@pytest.mark.parametrize("entry", **CAPTURABLE)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_do_not_warn_again(entry, how):
    """Torch's constructor lets an optimizer off that warning, and torch's copies forget it."""
    optimizer = how(make_fused(entry, make_params([(2,)]), "torch", capturable=True))
    with pretended_gpu(capturing=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer._accelerator_graph_capture_health_check()


def test_compiled_training_step():
    """A graph break at step() is fine, a crash is not."""
    entry = TABLE["AdamW"]
    start = make_params([(4, 3)])
    runs = run_stock(entry, start), run_fused(entry, start, "auto")

    def train(run: Run) -> torch.Tensor:
        loss = (run.params[0] ** 2).sum()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return loss

    compiled = torch.compile(train, backend="eager")
    for _ in range(3):
        train(runs[0])
        compiled(runs[1])
    assert_close(runs[1].tensors(), runs[0].tensors())
