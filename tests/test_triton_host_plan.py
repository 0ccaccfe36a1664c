"""The host plans of the Triton backend, in C++ and in Python: both say the same of an optimizer.

No kernel runs here.
"""

import math
from array import array

import pytest
import torch
from cases import CASES, SCALED, TABLE, make_params, richest, set_grads

pytest.importorskip("triton")

from fusedopt.kernels.host_plan import HostPlan
from fusedopt.kernels.rows import Row

from fusedopt.backends import extension

RULES = {"AdamW": "adam"}
SHAPES = ((3, 5), (70,), (), (0,), (4, 6))

needs_extension = pytest.mark.skipif(
    extension.unavailable() is not None, reason=str(extension.unavailable())
)


class Twins:
    """Both host plans of one optimizer's parameters, groups and state."""

    def __init__(self, entry, options, **extras):
        self.params = make_params(SHAPES)
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.25}]
        ours = {"decoupled_weight_decay": options.get("decoupled_weight_decay", False), **extras}
        stock = entry.stock(groups, **{k: v for k, v in options.items() if k not in ours})
        self.groups = stock.param_groups
        for group in self.groups:
            group.update(ours)
        set_grads(self.params, 1)
        stock.step()
        self.state = dict(stock.state)
        for entries in self.state.values():
            entries.pop("step", None)
        self.counters = torch.zeros(len(SHAPES))
        self.rule = RULES.get(entry.name, entry.name.lower())
        self.make()

    def make(self):
        """Makes the plans anew."""
        slots = [
            (index, param, self.counters[i])
            for i, (index, param) in enumerate(
                (index, param)
                for index, group in enumerate(self.groups)
                for param in group["params"]
            )
        ]
        device = torch.device("cpu")
        native = extension.module().TablePlan
        self.plans = [
            kind(self.rule, device, slots, self.groups, self.state) for kind in (native, HostPlan)
        ]

    def begin(self):
        """What both say at the beginning of a step, which must be the same."""
        said = []
        for plan in self.plans:
            plan.end()  # a step that it had begun before
            try:
                said.append(plan.begin(self.groups, self.state))
            except (KeyError, TypeError, ValueError) as error:
                said.append((type(error), str(error)))
        native, python = said
        if native is None or python is None or isinstance(native[0], type):
            assert native == python
        else:
            assert [native[0], *map(ids, native[1:])] == [python[0], *map(ids, python[1:])]
        return native

    def assert_same(self):
        """Rows, layouts and words agree; returns the words as numbers."""
        native, python = (list(Row.unpack(plan.rows(800))) for plan in self.plans)
        assert [row for row in native if row.step] == [row for row in python if row.step]
        assert [row.step == 0 for row in native] == [row.step == 0 for row in python]
        layouts = [array("q", plan.layouts()) for plan in self.plans]
        assert layouts[0] == layouts[1]
        words = [array("q", [7] * 100) for _ in self.plans]
        changed = [plan.write(each) for plan, each in zip(self.plans, words, strict=True)]
        assert words[0] == words[1]
        assert changed[0] == changed[1] == (0, 2 * 16 + len(SHAPES))
        assert [plan.write(each) for plan, each in zip(self.plans, words, strict=True)] == [
            (0, 0)
        ] * 2
        return array("d", words[0].tobytes())


def ids(tensors):
    """Tensors have no equality to compare by."""
    return list(map(id, tensors))


@needs_extension
@pytest.mark.parametrize("entry, options", **CASES)
def test_rows_and_words_are_the_same(entry, options):
    """For every rule and variant, with limits, missing gradients, other layouts and types."""
    twins = Twins(entry, options, max_grad_value=0.5)
    assert twins.begin() is None
    twins.assert_same()
    twins.groups[0]["max_grad_norm_per_param"] = torch.tensor(2.0)
    twins.groups[1]["lr"] = torch.tensor(0.125)
    twins.params[1].grad = None
    twins.params[0].grad = twins.params[0].grad.t().contiguous().t()
    twins.params[4].grad = None
    set_grads(twins.params[4:], 2, dtype=torch.bfloat16)
    assert twins.begin() is None
    twins.assert_same()
    set_grads(twins.params[:3], 2)
    assert twins.begin() is None
    twins.assert_same()


@needs_extension
def test_words_tell_what_changed():
    """In C++ the range is the smallest; words behind the gradients' are left alone."""
    twins = Twins(*CASES["argvalues"][0])
    count = 2 * 16 + len(SHAPES)
    words = array("q", [5] * (count + 3))
    assert twins.begin() is None
    twins.plans[0].write(words)
    assert list(words[count:]) == [5] * 3
    assert words[32] == twins.params[0].grad.data_ptr()
    twins.groups[1]["lr"] *= 2
    twins.params[1].grad = None
    assert twins.begin() is None
    assert twins.plans[0].write(words) == (16, 34)
    assert words[33] == 0
    with pytest.raises(ValueError, match=r"words has 3 items of 8 bytes; expected at least 37"):
        twins.plans[0].write(array("q", [0] * 3))


@needs_extension
def test_the_version_of_the_rows():
    """Changes with types and layouts of gradients, not with their addresses."""
    twins = Twins(*CASES["argvalues"][0])

    def versions():
        assert twins.begin() is None
        return [plan.rows_version for plan in twins.plans]

    set_grads(twins.params, 3)
    before = versions()
    set_grads(twins.params, 4)
    assert versions() == before
    for change in (lambda g: g.t().contiguous().t(), lambda g: g.contiguous()):
        twins.params[4].grad = change(twins.params[4].grad)
        after = versions()
        assert all(new > old for new, old in zip(after, before, strict=True))
        before = after


@needs_extension
def test_parameters_without_state():
    """They have a row without a counter, and are reported when a gradient comes."""
    twins = Twins(*CASES["argvalues"][0])
    del twins.state[twins.params[1]]
    twins.params[1].grad = None
    twins.make()
    assert twins.begin() is None
    for plan in twins.plans:
        assert [row.step == 0 for row in Row.unpack(plan.rows(0))] == [False, True] + [False] * 3
    twins.assert_same()
    set_grads(twins.params, 5)
    assert twins.begin() is not None


@needs_extension
@pytest.mark.parametrize("entry", **SCALED)
def test_scalars_that_come_and_go(entry):
    """A scalar that is gone is missing state; another one, or other memory, is another plan."""
    twins = Twins(entry, richest(entry))
    (name, *_), entries = entry.scalars, twins.state[twins.params[1]]
    for change in (
        lambda: entries.update({name: entries[name].double()}),
        lambda: setattr(entries[name], "data", entries[name].data.clone()),
        lambda: entries.pop(name),
    ):
        change()
        assert twins.begin()[0]
        twins.make()
        twins.begin()
        twins.assert_same()
    assert ids(twins.begin()[1]) == ids([twins.params[1]])
    entries[name] = torch.tensor(0.5)
    assert twins.begin()[0]


def give(param, grad):
    """Sets a gradient of another type."""
    param.grad = None
    param.grad_dtype = None
    param.grad = grad


SPOILERS = {
    "text": lambda twins: twins.groups[0].update(lr="fast"),
    "several numbers": lambda twins: twins.groups[1].update(eps=torch.ones(2)),
    "no number": lambda twins: twins.groups[0].update(betas=(0.9, None)),
    "missing key": lambda twins: twins.groups[0].pop("maximize"),
    "missing flag": lambda twins: twins.groups[1].pop("amsgrad"),
    "limit": lambda twins: twins.groups[1].update(max_grad_value=-2),
    "limit nan": lambda twins: twins.groups[0].update(max_grad_norm_per_param=math.nan),
    "shape": lambda twins: setattr(twins.params[4].grad, "data", torch.zeros(6, 4)),
    "type": lambda twins: give(twins.params[4], torch.zeros(4, 6, dtype=torch.int32)),
    "sparse": lambda twins: setattr(twins.params[1], "grad", twins.params[1].grad.to_sparse()),
    "negated": lambda twins: setattr(
        twins.params[1], "grad", torch._neg_view(twins.params[1].grad)
    ),
    "dropped": lambda twins: twins.state.pop(twins.params[0]),
    "none of ours": lambda twins: twins.groups[0].pop("decoupled_weight_decay"),
}


@needs_extension
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_the_same_is_said(spoil):
    """The same error with the same text, or the same list of what is to be done."""
    twins = Twins(*CASES["argvalues"][0])
    assert twins.begin() is None
    spoil(twins)
    twins.begin()


@needs_extension
def test_what_is_refused_is_refused_again():
    """Nothing of a step that was refused is kept, and all of it is read when it is mended."""
    twins = Twins(TABLE["AdamW"], {})
    assert twins.begin() is None
    twins.groups[0]["lr"], twins.groups[1]["max_grad_value"] = 0.5, -1.0
    for plan in (*twins.plans, *twins.plans):
        with pytest.raises(ValueError, match="max_grad_value"):
            plan.begin(twins.groups, twins.state)
    twins.groups[1]["max_grad_value"] = None
    assert twins.begin() is None
    assert twins.assert_same()[0] == 0.5


@needs_extension
def test_a_tensor_among_betas_is_read_every_step():
    """Filled in place, which changes no dict."""
    twins = Twins(TABLE["AdamW"], {})
    beta = torch.tensor(0.25, dtype=torch.float64)
    twins.groups[0]["betas"] = (beta, 0.5)
    assert twins.begin() is None
    beta.fill_(0.75)
    assert twins.begin() is None
    assert twins.assert_same()[4] == 0.75


@needs_extension
def test_the_same_is_said_of_state_that_does_not_fit():
    """Once its parameter has a gradient: before, nobody needs it."""
    twins = Twins(*CASES["argvalues"][0])
    twins.state[twins.params[0]]["exp_avg"] = torch.zeros(4)
    twins.params[0].grad = None
    twins.make()
    assert twins.begin() is None
    twins.assert_same()
    set_grads(twins.params, 3)
    assert twins.begin()[0] is ValueError


@needs_extension
def test_the_same_is_said_of_a_gradient_in_written_memory():
    """All of that step is torch's: the same address, a part, a whole that holds a parameter."""
    twins = Twins(*CASES["argvalues"][0])
    exp_avg = twins.state[twins.params[1]]["exp_avg"]
    for memory in (twins.params[1].data, exp_avg, twins.params[1].data.flip(0)[:0]):
        twins.params[1].grad = memory if memory.numel() else None
        said = twins.begin()
        if memory.numel():
            assert len(said[2]) == len(SHAPES)
        else:
            assert said is None
    whole = torch.zeros(210)
    param, grad = twins.params[1], whole[:140:2]
    param.data = whole[100:170].copy_(param.data)
    twins.make()
    assert twins.begin() is None
    param.grad = grad
    assert len(twins.begin()[2]) == len(SHAPES)
