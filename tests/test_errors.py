"""Bad input: a message with name, value, expectation and remedy, before anything is changed."""

from __future__ import annotations

import math
import sys
import types
import warnings

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    Run,
    assert_close,
    assert_same_bits,
    backends,
    device_of,
    entries,
    make_fused,
    make_params,
    native_backends,
    richest,
    run_fused,
    run_stock,
    set_grads,
)

import fusedopt
from fusedopt import backends as library_backends
from fusedopt.backends import extension

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
NATIVE = pytest.mark.parametrize("backend", native_backends())
LIMITS = ("max_grad_norm", "max_grad_norm_per_param", "max_grad_value")


@OURS
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -1.5, math.nan, "1", True, [1.0]], ids=repr)
def test_limits(entry, name, value):
    """Whatever is no number above zero."""
    with pytest.raises(ValueError) as caught:
        entry.fused(make_params(), **{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name} is {value!r} ")
    assert "expected a number above 0, or None for no limit" in text


@OURS
@pytest.mark.parametrize("name", LIMITS)
def test_good_limits(entry, name):
    """Numbers of any kind above zero, infinity among them."""
    for value in (1, 0.5, math.inf, 1e-30, None):
        entry.fused(make_params(), **{name: value})


@OURS
@pytest.mark.parametrize("name", ["max_grad_norm_per_param", "max_grad_value"])
def test_limits_in_a_group(entry, name):
    """The message names the group, and the group is not added."""
    params = make_params([(2,), (3,)])
    groups = [{"params": params[:1]}, {"params": params[1:], name: -2}]
    with pytest.raises(ValueError, match=rf"^{name} is -2 in param group 1; expected"):
        entry.fused(groups)
    optimizer = entry.fused(params[:1])
    with pytest.raises(ValueError, match=rf"^{name} is -2 in param group 1; expected"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


@OURS
@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite", "backend"])
def test_settings_in_a_group(entry, name):
    """What belongs to the optimizer is refused in a group, with the right place for it."""
    group = {"params": make_params(), name: None}
    with pytest.raises(ValueError) as caught:
        entry.fused([group])
    assert str(caught.value).startswith(
        f"{name} is None in param group 0, but it belongs to the optimizer as a whole; pass it to"
        f" {entry.name}() itself, or set optimizer.{name}"
    )


@OURS
def test_unknown_backend(entry):
    """The known ones are named."""
    with pytest.raises(ValueError) as caught:
        entry.fused(make_params(), backend="metal")
    known = ", ".join(map(repr, library_backends.CHOICES))
    assert str(caught.value) == f"backend is 'metal'; expected one of {known}"
    assert {"auto", "cpu", "torch"} <= set(library_backends.CHOICES)


@OURS
def test_contradicting_backend(entry):
    """fused=False is another way to say backend='torch'."""
    with pytest.raises(ValueError, match="fused=False means backend='torch', but backend is 'cpu'"):
        entry.fused(make_params(), fused=False, backend="cpu")
    assert entry.fused(make_params(), fused=False).backend == "torch"
    assert entry.fused(make_params(), fused=False, backend="torch").backend == "torch"
    assert entry.fused(make_params(), fused=True).backend == "auto"


@pytest.mark.parametrize(
    "entry", **entries(entry for entry in TABLE.values() if not entry.takes("weight_decay"))
)
@pytest.mark.parametrize("backend", backends())
def test_no_weight_decay(entry, backend):
    """Refused where it is asked for; what stands in a group by other ways is as nothing."""
    text = f"{entry.name} has no weight decay"
    with pytest.raises(TypeError, match=f"unexpected keyword argument 'weight_decay'; {text}"):
        entry.fused(make_params(), weight_decay=0.0)
    with pytest.raises(ValueError, match=f"decoupled_weight_decay is True for the .* {text}"):
        entry.fused(make_params(), decoupled_weight_decay=True)
    start = make_params([(3,), (4,)], device=device_of(backend))
    run = run_fused(entry, start, backend, decoupled_weight_decay=False)
    for key, value in {"weight_decay": 0.1, "decoupled_weight_decay": True}.items():
        with pytest.raises(ValueError, match=f"{key} is {value} in param group 1, but {text}"):
            run.optimizer.add_param_group({"params": make_params([(2,)]), key: value})
        run.optimizer.param_groups[0][key] = value
    assert_close(run.steps(2).tensors(), run_stock(entry, start).steps(2).tensors())


def test_adamw_always_decouples():
    """Asking AdamW for L2 decay names Adam as the way out."""
    for make in (
        lambda: fusedopt.AdamW(make_params(), decoupled_weight_decay=False),
        lambda: fusedopt.AdamW([{"params": make_params(), "decoupled_weight_decay": False}]),
    ):
        with pytest.raises(ValueError, match=r"decouples it; use fusedopt\.Adam for L2"):
            make()
    assert fusedopt.AdamW(make_params()).defaults["decoupled_weight_decay"] is True


@OURS
@BACKENDS
def test_settings_changed_later(entry, backend):
    """Attributes may be set between steps; nonsense is refused at the next step at the latest."""
    run = run_fused(entry, make_params(device=device_of(backend)), backend).steps(1)
    before = {name: value.clone() for name, value in run.tensors().items()}
    for name, value in (
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", "1"),
        ("backend", "metal"),
    ):
        kept = getattr(run.optimizer, name)
        with pytest.raises(ValueError, match=name):
            setattr(run.optimizer, name, value)
            run.optimizer.step()
        setattr(run.optimizer, name, kept)
        assert_same_bits(run.tensors(), before)
    run.optimizer.backend = "torch"
    run.steps(1)
    assert run.optimizer.backend_of(run.params[0]) == "torch"


def misfits() -> dict[str, tuple]:
    """Returns ways to spoil a gradient: what is done to it and what the message must say."""

    def integer(param):
        param.grad.data = torch.ones(param.shape, dtype=torch.int64, device=param.device)

    def other_shape(param):
        param.grad.data = torch.ones(7, device=param.device)

    def transposed_shape(param):
        param.grad.data = torch.ones(param.shape[::-1], device=param.device)

    def imaginary(param):
        param.grad.data = torch.ones(param.shape, dtype=torch.complex64, device=param.device)

    return {f.__name__: f for f in (integer, other_shape, transposed_shape, imaginary)}


@OURS
@BACKENDS
@pytest.mark.parametrize("misfit", misfits().values(), ids=misfits())
@pytest.mark.parametrize("started", [False, True], ids=["first", "later"])
def test_gradient_that_does_not_fit(entry, backend, misfit, started):
    """Parameter, group, what is wrong and the remedy are named; neighbours stay as they were."""
    params = make_params([(3,), (4, 2), (3, 5)], device=device_of(backend))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    run = Run(params, make_fused(entry, groups, backend, **richest(entry)))
    if started:
        run.steps(1)
    set_grads(params, 2)
    misfit(params[2])
    before = {name: value.clone() for name, value in run.tensors().items()}
    with pytest.raises(ValueError) as caught:
        run.optimizer.step()
    text = str(caught.value)
    assert "the gradient of parameter 1 of param group 1 is" in text
    assert "expected a floating-point tensor shaped like the parameter" in text
    assert "Set parameter.grad = None" in text
    after = run.tensors()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    # State may have been created meanwhile; it counts no steps.
    for name in after.keys() - before.keys():
        assert not after[name].any()
    params[2].grad = None
    run.steps(1, first=3)


@OURS
@NATIVE
def test_state_that_does_not_fit(entry, backend):
    """A state tensor of another shape names the state, the parameter and the remedy."""
    params = make_params([(3,), (4,)], device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend, **richest(entry))).steps(1)
    name = entry.states[0]
    run.optimizer.state[params[1]][name] = torch.zeros(9, device=params[0].device)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError) as caught:
        run.steps(1)
    text = str(caught.value)
    assert f"state '{name}' of parameter 1 of param group 0 is" in text
    assert "Load a matching checkpoint, or delete optimizer.state[parameter]" in text
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@OURS
@NATIVE
@pytest.mark.parametrize("value", ["fast", None, [0.1], torch.ones(2)], ids=repr)
def test_hyperparameter_that_is_no_number(entry, backend, value):
    """Written into a group later, past torch's checks."""
    params = make_params([(3,)], device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend)).steps(1)
    before = params[0].detach().clone()
    run.optimizer.param_groups[0]["lr"] = value
    with pytest.raises((TypeError, ValueError), match=r"lr.*expected"):
        run.steps(1)
    assert torch.equal(before, params[0])


@OURS
@NATIVE
def test_group_without_a_key_of_torch(entry, backend):
    """A group put together by hand that lacks what the rule needs."""
    params = make_params([(3,)], device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend)).steps(1)
    del run.optimizer.param_groups[0]["maximize"]
    with pytest.raises(KeyError, match="maximize"):
        run.steps(1)


@OURS
@NATIVE
def test_limit_written_into_a_group(entry, backend):
    """Our own keys are checked at the step that would use them."""
    params = make_params([(3,)], device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend)).steps(1)
    run.optimizer.param_groups[0]["max_grad_value"] = -1.0
    with pytest.raises(ValueError, match=r"max_grad_value.*-1.*expected a number above 0"):
        run.steps(1)


@OURS
def test_misspelt_names(entry):
    """What is close to a name of ours is told so, and not silently kept by the group."""
    with pytest.raises(TypeError, match=r"'max_norm'; did you mean 'max_grad_norm'\?"):
        entry.fused(make_params(), max_norm=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'unheard_of'$"):
        entry.fused(make_params(), unheard_of=1.0)
    group = {"params": make_params(), "max_grad_norm_per_parm": 1.0}
    with pytest.raises(ValueError, match=r"param group 0.*did you mean 'max_grad_norm_per_param'"):
        entry.fused([group])
    optimizer = entry.fused([{"params": make_params(), "initial_lr": 1.0, "name": "head"}])
    assert optimizer.param_groups[0]["name"] == "head"


@OURS
@pytest.mark.parametrize("value", ["no", 1, "False"])
def test_flags_that_are_no_flags(entry, value):
    """A string is true to Python; None is False, as in torch."""
    for name in ("skip_nonfinite", "decoupled_weight_decay"):
        with pytest.raises(ValueError, match=rf"^{name} is {value!r} .*expected True or False"):
            entry.fused(make_params(), **{name: value})
        assert name not in entry.fused(make_params(), **{name: None}).param_groups[0] or (
            name in entry.stock(make_params()).defaults
        )
    with pytest.raises(ValueError, match=rf"^fused is {value!r} .*expected True, False or None"):
        entry.fused(make_params(), fused=value)


@OURS
@BACKENDS
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_what_a_scaler_cannot_have_meant(entry, backend, name):
    """No number, or several of them."""
    params = make_params([(3,)], device=device_of(backend))
    run = Run(params, make_fused(entry, params, backend)).steps(1)
    before = params[0].detach().clone()
    for value, text in (("x", "is 'x'"), (torch.ones(2), "is a tensor of 2 elements")):
        setattr(run.optimizer, name, value)
        with pytest.raises((TypeError, ValueError), match=f"^{name} {text}; expected a number or"):
            run.optimizer.step()
        delattr(run.optimizer, name)
        assert torch.equal(before, params[0])


@BACKENDS
@pytest.mark.parametrize(
    "betas",
    [(0.9,), (0.9, 0.99, 0.5), 0.9, None, torch.tensor(0.9), torch.tensor([0.9, 0.99, 0.5])],
    ids=repr,
)
def test_betas_that_are_not_two(backend, betas):
    """Written into a group later; the message names them."""
    params = make_params([(3,)], device=device_of(backend))
    run = Run(params, make_fused(TABLE["Adam"], params, backend)).steps(1)
    run.optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(TypeError, match=r"'betas' of param group 0 is .*; expected 2 numbers"):
        run.steps(1)


@pytest.fixture
def build_info(monkeypatch):
    """Lets a test pretend that the extension was built another way; None: not at all."""

    def pretend(info: dict | None, loads: bool = True) -> None:
        module = None if info is None else types.SimpleNamespace(**info)
        monkeypatch.setitem(sys.modules, "fusedopt._build_info", module)
        if not loads:
            monkeypatch.setitem(sys.modules, "fusedopt._C", None)
        extension._find.cache_clear()

    monkeypatch.setattr(library_backends, "_warned", set())
    yield pretend
    monkeypatch.undo()
    extension._find.cache_clear()


def built(torch_version: str = torch.__version__, kinds: tuple = ("cpu",), **left_out: str) -> dict:
    """Returns what setup.py writes down."""
    info = {"TORCH_VERSION": torch_version, "BACKENDS": kinds, "LEFT_OUT": left_out}
    return {**info, "WANTED": ("cpu", "cuda")}


WITHOUT = {
    "sources": (None, True, "imported from its sources"),
    "none": (built(kinds=(), cpu="no C++ compiler"), True, r"cpu: no C\+\+ compiler"),
    "another_torch": (built("1.0.0"), True, r"built for torch 1\.0\.0, but this is torch \d"),
    "broken": (built(), False, "does not load"),
}


@OURS
@pytest.mark.parametrize("info, loads, why", WITHOUT.values(), ids=WITHOUT)
def test_cpu_backend_without_the_extension(entry, build_info, info, loads, why):
    """An explicit backend="cpu" names the reason and how to rebuild."""
    build_info(info, loads)
    with pytest.raises(RuntimeError, match=why) as caught:
        entry.fused(make_params(), backend="cpu")
    assert "pip install --no-build-isolation ." in str(caught.value)
    assert "backend='cpu' does not work here" in str(caught.value)


@pytest.mark.parametrize("info, loads, why", WITHOUT.values(), ids=WITHOUT)
def test_auto_without_the_extension(build_info, info, loads, why):
    """Training goes on with torch's rules; one warning, unless that was to be expected."""
    build_info(info, loads)
    expected = "sources" not in why
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("Adam", "SGD"):
            run = run_fused(TABLE[name], make_params(), "auto").steps(2)
            assert run.optimizer.backend_of(run.params[0]) == "torch"
    texts = [str(w.message) for w in caught if "fusedopt" in str(w.message)]
    assert len(texts) == expected
    if expected:
        assert texts[0].startswith("fusedopt goes on without its cpu backend: ")
        assert "pip install --no-build-isolation ." in texts[0]


@OURS
@NATIVE
def test_device_that_a_backend_cannot_serve(entry, backend):
    """The message names the parameter's device and the way out."""
    params = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = make_fused(entry, params, backend)
    params[0].grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=rf"meta.*backend='{backend}'.*backend='auto'"):
        optimizer.step()
