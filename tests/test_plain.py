"""The room for plain rules: the base of what torch lacks, and the adapter around every class."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Run, assert_same_bits, copies, make_params

from fusedopt.plain.optimizer import PlainOptimizer
from fusedopt.plain.rule import PlainRule, Training


class Signum(PlainOptimizer):
    """A toy: the sign of an average."""

    _STATES = ("average",)

    def __init__(self, params, lr=0.1, weight_decay=0.0, *, maximize=False, differentiable=False):
        flags = {"maximize": maximize, "differentiable": differentiable}
        super().__init__(params, lr=lr, weight_decay=weight_decay, rate=0.25, **flags)

    def _update(self, group, param, grad, *states):
        (average,) = states
        average.lerp_(grad, group["rate"])
        param.sub_(average.sign() * group["lr"])


RULE = PlainRule("signum", Signum, states=("average",), has_step=False)


def test_base_trains():
    """As the formula has it, complex parameters by their parts, the first step from zeros."""
    params = [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(1) * 1j)]
    run = Run(params, Signum(params, maximize=True))
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([1 - 2j])
    run.optimizer.step()
    assert torch.equal(params[0].detach(), torch.tensor([1.1, -2.0]))
    torch.testing.assert_close(params[1].detach(), torch.tensor([0.1 + 0.9j]))
    assert torch.equal(run.optimizer.state[params[0]]["average"], torch.tensor([-0.75, -0.0]))
    assert run.optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_base_refuses(options, message):
    """In torch's words."""
    with pytest.raises(ValueError, match=message):
        Signum(make_params([(2,)]), **options)


def test_base_refuses_sparse_gradients():
    """In torch's words, under the name of the class, whoever runs it."""
    (param,) = make_params([(3,)])
    param.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    optimizer = Signum([param])
    training = Training(optimizer.param_groups, optimizer.state, optimizer.defaults)
    for step in (optimizer.step, lambda: RULE.update(optimizer.param_groups[0], None, training)):
        with pytest.raises(RuntimeError, match="^Signum does not support sparse gradients$"):
            step()


def test_adapter_runs_the_step_of_the_class():
    """Over the groups, state and gradients that it is given, and no user's hooks."""
    start = make_params([(3,), (2, 2), (4,)])
    own, theirs = copies(start), copies(start)
    stock, ours = Signum(theirs), Signum(own)
    ours.register_step_pre_hook(lambda *_: pytest.fail("a hook of the optimizer was called"))
    training = Training(ours.param_groups, ours.state, ours.defaults)
    for step in range(3):
        grads = [torch.full_like(param, step - 1.5) for param in start]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        for param in own:
            param.grad = torch.full_like(param, math.nan)
        stock.step()
        with torch.no_grad():
            RULE.update(ours.param_groups[0], grads, training)
    assert_same_bits(Run(own, ours).tensors(), Run(theirs, stock).tensors())


def test_needed_state():
    """What a checkpoint must hold, without a parameter to ask."""
    optimizer = Signum(make_params([(2,)]))
    assert RULE.needed_state(optimizer.param_groups[0], optimizer.defaults) == {"average"}
    assert not optimizer.state
