"""Plans and tables of the Triton backend without an optimizer, for its tests.

Importing this imports Triton.
"""

import copy
from array import array

import pytest
import torch
from fusedopt.kernels import launch
from fusedopt.kernels.live import bring_up, encode_groups

from fusedopt.backends import extension
from fusedopt.backends.triton import make_plan


def use_books(kind, monkeypatch):
    """Makes plans over the books of the "extension", or over those in "python"."""
    if kind == "python":
        monkeypatch.setattr(extension, "unavailable", lambda: "this test does without")
    elif (reason := extension.unavailable()) is not None:
        pytest.skip(reason)


def make_tables(rule, rows, groups, addresses):
    """Tables on the CPU over rows, with GroupRows and the addresses of gradients."""
    control = torch.zeros(5, dtype=torch.float64)
    tables = launch.Tables(launch.load_rule(rule), torch.device("cpu"), rows, len(groups), control)
    feed(tables, groups, addresses)
    return tables


def feed(tables, groups, addresses):
    """Writes what changes from step to step."""
    wanted = encode_groups(groups) + array("q", addresses)
    tables.take(lambda words: bring_up(words, wanted))


SHAPES = [(3, 5), (70,), (0,), (), (1100,)]


class Model:
    """What an optimizer of ours would hold, beside a stock optimizer on copies."""

    def __init__(
        self, rule="adam", stock=torch.optim.AdamW, kwargs=None, shapes=SHAPES, groups=1, **extras
    ):
        torch.manual_seed(0)
        self.rule = rule
        self.params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.copies = copy.deepcopy(self.params)
        self.stock = stock(
            [{"params": self.copies[i::groups], "lr": 0.1 / (1 + i)} for i in range(groups)],
            **(kwargs or {}),
        )
        self.groups = []
        for index, group in enumerate(self.stock.param_groups):
            keys = {"decoupled_weight_decay": stock is torch.optim.AdamW, **extras}
            self.groups.append({**group, **keys, "params": self.params[index::groups]})
        self.state = {}
        self.counters = torch.zeros(len(self.params))
        for param in self.params:
            self.add_state(param)
        self.plan = self.make_plan()

    def add_state(self, param):
        """Gives a parameter zeros for states."""
        module = launch.load_rule(self.rule)
        variant = sum(1 << bit for bit, name in enumerate(module.VARIANTS) if self.groups[0][name])
        self.state[param] = {
            name: torch.zeros_like(param) for name in launch.state_names(module, variant)
        }
        if self.rule != "sgd":
            place = next(i for i, each in enumerate(self.params) if each is param)
            self.state[param]["step"] = self.counters[place]

    def make_plan(self):
        """A plan over everything as it is now."""
        index = {id(param): i for i, param in enumerate(self.params)}
        self.slots = [
            (g, p, self.state.get(p, {}).get("step", self.counters[index[id(p)]]))
            for g, group in enumerate(self.groups)
            for p in group["params"]
        ]
        return make_plan(self.rule, torch.device("cpu"), self.slots, self.groups, self.state)

    def backward(self, skip=(), scale=1.0):
        """Fresh gradients on both sides, ours multiplied by a loss scale."""
        for index, (param, other) in enumerate(zip(self.params, self.copies, strict=True)):
            grad = None if index in skip else torch.randn_like(param)
            param.grad = None if grad is None else grad * scale
            other.grad = grad

    def begin(self):
        """The plan's check."""
        return self.plan.begin(self.groups, self.state)

    def step(self, grad_scale=None, found_inf=None, max_grad_norm=None, skip_nonfinite=False):
        """A step that needs nothing from outside the plan."""
        said = self.plan.step(
            self.groups, self.state, grad_scale, found_inf, max_grad_norm, skip_nonfinite
        )
        assert said is None
        return self.plan.control

    def snapshot(self):
        """Copies of all that a step may change."""
        tensors = [
            *self.params,
            self.counters,
            *(t for entry in self.state.values() for t in entry.values()),
        ]
        return [tensor.detach().clone() for tensor in tensors]

    def assert_follows_stock(self):
        """Parameters agree with the stock optimizer's."""
        for param, other in zip(self.params, self.copies, strict=True):
            torch.testing.assert_close(param, other, rtol=2e-5, atol=1e-6)
