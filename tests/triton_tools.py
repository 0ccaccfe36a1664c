"""Plans and tables of the Triton backend without an optimizer, for its tests.

Importing this imports Triton.
"""

import copy
from array import array
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from fusedopt.kernels import launch

from fusedopt.backends import extension
from fusedopt.backends.triton import make_plan


def use_host(kind, monkeypatch):
    """Makes host plans of the "extension", or those in "python"."""
    if kind == "python":
        monkeypatch.setattr(extension, "unavailable", lambda: "this test does without")
    elif (reason := extension.unavailable()) is not None:
        pytest.skip(reason)


def make_tables(rule, rows, groups, addresses, layouts=None):
    """Tables on the CPU over rows, their layouts, GroupRows and the addresses of gradients."""
    layouts = layouts or [()] * len(rows)

    def place(address):
        packed = b""
        for row, layout in zip(rows, layouts, strict=True):
            packed += row._replace(layout=address if layout else 0).pack()
            address += 8 * len(layout)
        return packed

    host = host_of(groups, addresses)
    host.layouts = lambda: array("q", chain.from_iterable(layouts)).tobytes()
    host.rows = place
    control = torch.zeros(5, dtype=torch.float64)
    return launch.Tables(launch.load_rule(rule), torch.device("cpu"), host, len(groups), control)


def host_of(groups, addresses):
    """A host plan of a step that has begun, for `Tables.take`."""
    wanted = array("q", b"".join(group.pack() for group in groups)) + array("q", addresses)

    def write(words):
        words[: len(wanted)] = wanted
        return 0, len(wanted)

    return SimpleNamespace(write=write)


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
