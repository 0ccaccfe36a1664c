"""The plan of the Triton backend, interpreted on the CPU, over either kind of host plan.

What it notices, what it refuses, and that steps are torch's.

Run by test_triton_interpreted.py, or by hand with TRITON_INTERPRET=1.
"""

import math
import os
import weakref

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process with TRITON_INTERPRET=1; test_triton_interpreted.py starts one",
        allow_module_level=True,
    )

from fusedopt.kernels import launch
from fusedopt.kernels.host_plan import HostPlan
from triton_tools import Model, use_host

from fusedopt.backends import extension

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [
    ("adam", torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    ("adam", torch.optim.AdamW, {"maximize": True}),
    ("sgd", torch.optim.SGD, {"weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ("rmsprop", torch.optim.RMSprop, {}),
    ("adagrad", torch.optim.Adagrad, {"lr_decay": 0.1}),
    ("adadelta", torch.optim.Adadelta, {"weight_decay": 0.1}),
]


@pytest.fixture(autouse=True, params=["extension", "python"])
def host(request, monkeypatch):
    """Runs a test over either kind of host plan."""
    use_host(request.param, monkeypatch)
    return request.param


def test_the_host_plan_is_the_one_asked_for(host):
    """Or all tests here would run over the same one."""
    native = extension.module().TablePlan
    assert type(Model().plan._host) is (native if host == "extension" else HostPlan)


@pytest.mark.parametrize(("rule", "stock", "kwargs"), CASES)
def test_steps_are_torchs(rule, stock, kwargs):
    """Two groups, a gradient that comes late, a learning rate that changes."""
    model = Model(rule, stock, kwargs, groups=2)
    for step in range(3):
        model.backward(skip=(1,) if step == 0 else ())
        model.step()
        model.stock.step()
        for group in (*model.groups, *model.stock.param_groups):
            group["lr"] = group["lr"] * 0.5
    model.assert_follows_stock()
    assert model.counters.tolist() == [3.0, 2.0, 3.0, 3.0, 3.0]


def test_pipeline_is_torchs_utilities():
    """Unscale, clip by value, by the parameter's norm and globally, in this order."""
    model = Model(max_grad_value=0.8, max_grad_norm_per_param=2.0)
    for _ in range(2):
        model.backward(scale=16.0)
        control = model.step(torch.tensor(16.0), torch.tensor(0.0), max_grad_norm=1.5)
        torch.nn.utils.clip_grad_value_(model.copies, 0.8)
        for param in model.copies:
            torch.nn.utils.clip_grad_norm_([param], 2.0)
        norm = torch.nn.utils.clip_grad_norm_(model.copies, 1.5)
        model.stock.step()
        torch.testing.assert_close(control[2], norm.double(), rtol=1e-6, atol=0)
    model.assert_follows_stock()


def test_passes_one_by_one_equal_the_step():
    """Reduce and apply under a control block made outside give the same bits."""
    models = [Model(max_grad_norm_per_param=2.0) for _ in range(2)]
    for model in models:
        torch.manual_seed(3)
        model.backward()
    models[0].step(max_grad_norm=1.0)
    one = models[1]
    assert one.begin() is None
    total, nonfinite = one.plan.reduce(torch.tensor(1.0, dtype=torch.float64)).tolist()
    assert nonfinite == 0.0
    clip = min(1.0, 1.0 / (math.sqrt(total) + 1e-6))
    one.plan.apply(torch.tensor([1.0, clip, math.sqrt(total), 0.0, 0.0], dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(models[0].snapshot(), one.snapshot(), strict=True))


@pytest.mark.parametrize("how", ["found_inf", "skip_nonfinite"])
def test_a_skipped_step_leaves_everything(how):
    """The very first step is skipped; the next one is as if it had never happened."""
    model = Model("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5})
    model.backward()
    if how == "skip_nonfinite":
        model.params[1].grad[3] = math.inf
    before = model.snapshot()
    found_inf = torch.tensor(2.0) if how == "found_inf" else None
    control = model.step(torch.tensor(1.0), found_inf, skip_nonfinite=how == "skip_nonfinite")
    assert control[4] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.snapshot(), strict=True))
    model.backward()
    model.step()
    model.stock.step()
    model.assert_follows_stock()


def test_gradients_of_other_layouts_and_types():
    """Transposed, expanded and half gradients, changing between steps, without another plan."""
    model = Model(shapes=[(6, 8), (40,)])
    transposed, expanded = (lambda g: g.t().contiguous().t()), (lambda g: g[:1].expand_as(g))
    for change in (lambda g: g, transposed, expanded, lambda g: g):
        model.backward()
        for param, other in zip(model.params, model.copies, strict=True):
            param.grad = change(param.grad)
            other.grad = param.grad.clone()
        model.step()
        model.stock.step()
    model.assert_follows_stock()
    model.params[1].grad = None
    model.params[1].grad_dtype = torch.bfloat16
    model.params[1].grad = model.copies[1].grad.bfloat16()
    model.copies[1].grad = model.params[1].grad.float()
    model.step(max_grad_norm=math.inf)
    model.stock.step()
    model.assert_follows_stock()


def replace_state(model):
    """Another tensor in the state dict."""
    model.state[model.params[1]]["exp_avg"] = torch.zeros(70)


def move_state(model):
    """The same tensor with other memory."""
    tensor = model.state[model.params[1]]["exp_avg"]
    tensor.data = tensor.data.clone()


def drop_state(model):
    """No state any more."""
    del model.state[model.params[0]]


def replace_entry(model):
    """Another dict with the same tensors."""
    model.state[model.params[0]] = dict(model.state[model.params[0]])


def retype_state(model):
    """The same tensor with other memory of another type."""
    tensor = model.state[model.params[1]]["exp_avg"]
    tensor.data = tensor.data.half()


def move_counter(model):
    """A counter with other memory, as after a careless load."""
    model.slots[1][2].data = model.slots[1][2].data.clone()


def move_param(model):
    """The same parameter with other memory."""
    model.params[0].data = model.params[0].data.clone()


def reshape_param(model):
    """The same memory with another shape."""
    model.params[0].grad = None
    model.params[0].data = model.params[0].data.view(5, 3)
    model.params[0].grad = torch.ones(5, 3)


def add_group(model):
    """One more group."""
    model.groups.append({**model.groups[0], "params": [torch.nn.Parameter(torch.zeros(2))]})


def replace_param(model):
    """Another parameter in the list of a group."""
    model.groups[0]["params"][2] = torch.nn.Parameter(torch.zeros(0))


def change_variant(model):
    """A flag that asks for another state."""
    model.groups[0]["amsgrad"] = True


@pytest.mark.parametrize(
    "change",
    [
        replace_state,
        move_state,
        retype_state,
        move_counter,
        drop_state,
        replace_entry,
        move_param,
        reshape_param,
        add_group,
        replace_param,
        change_variant,
    ],
)
def test_asks_for_another_plan(change):
    """Whatever changes under the plan, it says so and touches nothing."""
    model = Model()
    model.backward()
    model.step()
    change(model)
    before = model.snapshot()
    assert model.begin() == (True, [], [])
    assert all(torch.equal(a, b) for a, b in zip(before, model.snapshot(), strict=True))


def test_reports_first_gradients_and_sparse_ones():
    """First gradients are missing state, sparse ones are left to torch for a step."""
    model = Model(shapes=[(4, 3), (5,), (6,)])
    del model.state[model.params[1]]
    model.plan = model.make_plan()
    model.backward(skip=(1,))
    assert model.begin() is None
    model.backward()
    rebuild, missing, foreign = model.begin()
    assert not rebuild
    assert [p is model.params[1] for p in missing] == [True]
    assert foreign == []

    model.add_state(model.params[1])
    assert model.begin() == (True, [], [])
    model.plan = model.make_plan()
    dense = model.params[0].grad
    model.params[0].grad = dense.to_sparse()
    rebuild, missing, foreign = model.begin()
    assert (rebuild, missing, len(foreign)) == (False, [], 1)
    before = model.params[0].detach().clone()
    model.plan.apply(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    model.plan.end()
    assert torch.equal(before, model.params[0])
    assert model.counters.tolist() == [0.0, 1.0, 1.0]
    model.params[0].grad = dense
    model.step()
    assert model.counters.tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("bad", ["shape", "dtype"])
@pytest.mark.parametrize("known", [False, True])
def test_refuses_gradients_that_cannot_belong(bad, known):
    """Before anything is changed, and naming parameter, value and remedy."""
    model = Model()
    model.backward()
    if known:
        model.step()
    param = model.params[1]
    if bad == "shape":
        param.grad.data = torch.zeros(7, 10)
    else:
        param.grad = None
        param.grad_dtype = None
        param.grad = torch.zeros(70, dtype=torch.int32)
    before = model.snapshot()
    with pytest.raises(
        ValueError, match=r"parameter 1 of param group 0 .* expected a floating-point tensor"
    ):
        model.begin()
    assert all(torch.equal(a, b) for a, b in zip(before, model.snapshot(), strict=True))


def test_refuses_state_that_does_not_fit():
    """Naming state, parameter and remedy; only a step that needs it."""
    model = Model()
    model.state[model.params[0]]["exp_avg"] = torch.zeros(4)
    model.plan = model.make_plan()
    model.backward(skip=(0,))
    model.step()
    model.backward()
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0 of param group 0"):
        model.begin()


def test_tensor_hyperparameters_are_read_every_step():
    """Filled in place, as schedulers do."""
    model = Model()
    lr = torch.tensor(0.1)
    model.groups[0]["lr"] = lr
    for value in (0.1, 0.02):
        lr.fill_(value)
        model.stock.param_groups[0]["lr"] = value
        model.backward()
        model.step()
        model.stock.step()
    model.assert_follows_stock()


def test_uploads_only_what_changed(host, monkeypatch):
    """Nothing, one pointer, then one number of a group; from Python everything when anything."""
    sent = []
    send = launch.Tables._send
    monkeypatch.setattr(
        launch.Tables,
        "_send",
        lambda self, to, source: (sent.append(len(source)), send(self, to, source)),
    )
    model = Model(groups=2)
    model.backward()
    model.step()
    sent.clear()
    model.step()
    assert sent == []
    model.params[3].grad = model.params[3].grad.clone()
    model.step()
    model.groups[1]["lr"] = 0.5
    model.step()
    assert sent == ([1, 1] if host == "extension" else [2 * 16 + 5] * 2)


def test_without_rows_the_control_block_is_written():
    """A scaler may report inf before any parameter has state."""
    model = Model(shapes=[(3,)])
    model.state.clear()
    model.plan = model.make_plan()
    control = model.step(torch.tensor(4.0), torch.tensor(1.0), max_grad_norm=1.0)
    assert control.tolist() == [0.25, 1.0, 0.0, 0.0, 1.0]
    assert control is model.plan.control


def test_passes_ask_for_begin():
    """Also after a begin that found something to do first."""
    model = Model()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"call begin\(\) first in every step"):
            model.plan.apply(torch.zeros(5, dtype=torch.float64))
        model.begin()
        replace_param(model)
        model.begin()


def test_holds_no_gradients():
    """zero_grad frees them, and a step without gradients changes no counter."""
    model = Model()
    model.backward()
    model.step()
    grads = [weakref.ref(param.grad) for param in model.params]
    for param in model.params:
        param.grad = None
    assert all(grad() is None for grad in grads)
    model.step()
    assert model.counters.tolist() == [1.0] * 5


def test_a_captured_graph_has_tables_of_its_own(monkeypatch):
    """What a capture recorded is kept, and no later step writes into it."""
    monkeypatch.setattr(launch, "_captured", [])
    model = Model()
    model.backward()
    model.step()
    eager = model.plan._tables
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    model.step()
    captured = model.plan._tables
    assert captured is not eager
    assert launch._captured == [captured]
    recorded = captured._current.clone()
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    model.backward()
    model.groups[0]["lr"] = 0.7
    model.step()
    assert model.plan._tables not in (eager, captured)
    assert torch.equal(recorded, captured._current)


def test_memory_is_known_on_every_stream_that_uses_it(monkeypatch):
    """Tables that are replaced while another stream uses them are not given to others meanwhile."""
    model = Model()
    streams = iter(["first", "first", "other", "other"])
    monkeypatch.setattr(launch, "_stream", lambda device: next(streams))
    recorded = []
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: recorded.append((tensor.untyped_storage().data_ptr(), stream)),
    )
    model.backward()
    model.step()
    assert not recorded
    model.backward()
    model.step()
    tables = model.plan._tables
    used = {
        (value.untyped_storage().data_ptr(), "other")
        for name, value in [*vars(tables).items(), *(("", memory) for memory in tables._table)]
        if isinstance(value, torch.Tensor) and name != "_host"
    }
    used.add((0, "other"))  # there are no layouts
    assert set(recorded) == used and len(recorded) == len(used)
