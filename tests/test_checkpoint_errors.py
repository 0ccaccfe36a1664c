"""A checkpoint that does not fit is refused whole, with what is wrong by name."""

from __future__ import annotations

import copy
import math
import random as chance
from types import SimpleNamespace

import pytest
import torch
from cases import (
    ENTRIES,
    TABLE,
    assert_same_bits,
    backends,
    device_of,
    make_params,
    richest,
    run_fused,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
BACKENDS = pytest.mark.parametrize("backend", backends())
SHAPES = ((5, 3), (7,), ())


def spoiled() -> dict[str, tuple]:
    """Returns ways to spoil a checkpoint: what is done, the error and what it must say.

    `{state}` stands for the name of the entry's first state.
    """

    def change(*path, to):
        def spoil(checkpoint, state):
            *way, last = (state if key == "{state}" else key for key in path)
            for key in way:
                checkpoint = checkpoint[key]
            checkpoint[last] = to(checkpoint.get(last)) if isinstance(checkpoint, dict) else to(0)

        return spoil

    def drop(*path):
        def spoil(checkpoint, state):
            *way, last = (state if key == "{state}" else key for key in path)
            for key in way:
                checkpoint = checkpoint[key]
            del checkpoint[last]

        return spoil

    group, entries = ("param_groups", 0), ("state", 1)
    where, of = "in param group 0 of state_dict", "in the state of parameter 1 of param group 0"
    state = (*entries, "{state}")
    return {
        "no state": (drop("state"), KeyError, "state_dict has no 'state'"),
        "no groups": (drop("param_groups"), KeyError, "state_dict has no 'param_groups'"),
        "state is a list": (change("state", to=lambda _: []), TypeError, "'state' of state_dict"),
        "groups are a dict": (
            change("param_groups", to=lambda _: {}),
            TypeError,
            "'param_groups' of state_dict is a dict; expected a list",
        ),
        "two groups": (
            change("param_groups", to=lambda groups: groups * 2),
            ValueError,
            "different number of parameter groups: 2, expected 1",
        ),
        "group is None": (
            change(*group, to=lambda _: None),
            TypeError,
            "param group 0 of state_dict is a NoneType; expected a dict",
        ),
        "no params": (drop(*group, "params"), TypeError, f"'params' is None {where}"),
        "params are a number": (
            change(*group, "params", to=lambda _: 3),
            TypeError,
            f"'params' is 3 {where}",
        ),
        "one parameter less": (
            change(*group, "params", to=lambda params: params[:-1]),
            ValueError,
            f"doesn't match the size of optimizer's group: 2 parameters {where}, expected 3",
        ),
        "no lr": (drop(*group, "lr"), KeyError, f"there is no 'lr' {where}"),
        "limit": (
            change(*group, "max_grad_value", to=lambda _: -1.0),
            ValueError,
            f"max_grad_value is -1.0 {where}; expected a number above 0",
        ),
        "entries are a list": (
            change(*entries, to=lambda _: [1]),
            TypeError,
            "the state of parameter 1 of param group 0 in state_dict is a list; expected a dict",
        ),
        "other shape": (
            change(*state, to=lambda _: torch.zeros(4, 9)),
            ValueError,
            f"'{{state}}' {of} in state_dict is float32 [4, 9] on cpu; expected a tensor like",
        ),
        "integers": (
            change(*state, to=lambda _: torch.zeros(7, dtype=torch.int32)),
            ValueError,
            f"'{{state}}' {of} in state_dict is int32 [7] on cpu; expected a tensor like",
        ),
        "complex": (
            change(*state, to=lambda _: torch.zeros(7, dtype=torch.complex64)),
            ValueError,
            f"'{{state}}' {of} in state_dict is complex64 [7] on cpu; expected",
        ),
        "no tensor": (
            change(*state, to=lambda _: "1.0"),
            TypeError,
            f"'{{state}}' {of} in state_dict is '1.0'; expected a tensor",
        ),
        "unknown type": (
            change(*state, to=lambda _: SimpleNamespace(shape=(7,))),
            TypeError,
            f"'{{state}}' {of} in state_dict is namespace(shape=(7,)); expected a tensor",
        ),
    }


def only_with_steps() -> dict[str, tuple]:
    """Returns what only rules that count steps look at."""

    def missing(name):
        return lambda checkpoint, state: checkpoint["state"][1].pop(name or state)

    def step(value):
        return lambda checkpoint, state: checkpoint["state"][1].update(step=value)

    of = "the state of parameter 1 of param group 0 in state_dict"
    return {
        "no step": (missing("step"), KeyError, f"{of} has no 'step'"),
        "no state tensor": (missing(None), KeyError, f"{of} has no '{{state}}'"),
        "step is text": (step("3"), TypeError, f"'step' in {of} is '3'; expected a tensor"),
        "several steps": (
            step(torch.ones(2)),
            ValueError,
            f"'step' in {of} is float32 [2] on cpu; expected one number",
        ),
    }


CASES = {**spoiled(), **only_with_steps()}


@OURS
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_changed(entry, case):
    """Parameters, state, groups and settings are what they were, and the next step works."""
    if case in only_with_steps() and not entry.has_step:
        pytest.skip("without steps, whatever is missing starts anew")
    spoil, error, text = CASES[case]
    start = make_params(SHAPES)
    runs = [run_fused(entry, start, "auto", **richest(entry)).steps(2) for _ in range(2)]
    checkpoint = copy.deepcopy(runs[0].optimizer.state_dict())
    spoil(checkpoint, entry.states[0])
    kept = copy.deepcopy(checkpoint)
    groups = copy.deepcopy(runs[0].optimizer.state_dict()["param_groups"])
    with pytest.raises(error) as caught:
        runs[0].optimizer.load_state_dict(checkpoint)
    message = str(caught.value)
    assert text.format(state=entry.states[0]) in message.replace('\\"', '"')
    if case != "limit":
        assert "load what state_dict()" in message
        assert "nothing has been changed" in message
    assert_same_bits(runs[0].tensors(), runs[1].tensors())
    assert runs[0].optimizer.state_dict()["param_groups"] == groups
    assert kept.keys() == checkpoint.keys()
    assert_same_bits(*(run.steps(2, first=3).tensors() for run in runs))


@OURS
def test_what_is_no_checkpoint_at_all(entry):
    """None, a list, an optimizer."""
    optimizer = entry.fused(make_params())
    for value in (None, [1], optimizer, "file.pt"):
        with pytest.raises(TypeError, match=f"state_dict is a {type(value).__name__}; expected"):
            optimizer.load_state_dict(value)


def test_another_optimizers_checkpoint():
    """Stock Adam takes SGD's and fails in its next step; ours refuses it at once."""
    sgd = run_fused(TABLE["SGD"], make_params(), "auto", momentum=0.9).steps(1)
    adam = run_fused(TABLE["Adam"], make_params(), "auto").steps(1)
    with pytest.raises(KeyError, match="there is no 'betas' in param group 0 of state_dict"):
        adam.optimizer.load_state_dict(sgd.optimizer.state_dict())
    adam.steps(1)


@OURS
def test_hooks_may_make_a_checkpoint_fit(entry):
    """They run before it is looked at; without them it would be refused."""
    run = run_fused(entry, make_params(SHAPES), "auto", **richest(entry)).steps(2)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    checkpoint["model"] = {"weights": [checkpoint.pop("state")]}

    def repair(optimizer, checkpoint):
        checkpoint["state"] = checkpoint.pop("model")["weights"][0]

    with pytest.raises(KeyError, match="has no 'state'"):
        run.optimizer.load_state_dict(checkpoint)
    run.optimizer.register_load_state_dict_pre_hook(repair)
    run.optimizer.load_state_dict(checkpoint)
    run.optimizer.register_load_state_dict_pre_hook(lambda optimizer, checkpoint: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.optimizer.load_state_dict(checkpoint)
    assert len(run.optimizer._optimizer_load_state_dict_pre_hooks) == 2
    run.steps(1)


@OURS
def test_unheard_of_entries_are_kept(entry):
    """Keys of others in groups and states, and state of no parameter: as in torch."""
    run = run_fused(entry, make_params(SHAPES), "auto", **richest(entry)).steps(1)
    checkpoint = copy.deepcopy(run.optimizer.state_dict())
    checkpoint["param_groups"][0]["initial_lr"] = 0.5
    checkpoint["state"][1]["ema"] = torch.ones(2)
    checkpoint["state"]["global"] = {"count": 3}
    run.optimizer.load_state_dict(checkpoint)
    assert run.optimizer.param_groups[0]["initial_lr"] == 0.5
    assert torch.equal(run.optimizer.state[run.params[1]]["ema"], torch.ones(2))
    assert run.optimizer.state["global"] == {"count": 3}
    run.steps(1)


@OURS
@BACKENDS
def test_random_damage(entry, backend):
    """Whatever is thrown in: it loads, or it is refused and nothing has changed."""
    junk = (None, "x", -1, math.nan, [], {}, torch.ones(2), torch.ones(7, dtype=torch.bool), object)
    start = make_params(((7,), (2,)), device=device_of(backend))
    pick = chance.Random(1)
    for _ in range(15):
        run = run_fused(entry, start, backend, **richest(entry)).steps(1)
        checkpoint = copy.deepcopy(run.optimizer.state_dict())
        places = [checkpoint, checkpoint["state"], *checkpoint["state"].values()]
        places += checkpoint["param_groups"]
        place = pick.choice([place for place in places if place])
        place[pick.choice(list(place))] = pick.choice(junk)
        before = {name: value.clone() for name, value in run.tensors().items()}
        try:
            run.optimizer.load_state_dict(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError):
            assert_same_bits(run.tensors(), before)
            run.steps(1, first=2)


def test_loading_keeps_the_pipeline():
    """With the settings, the lock and whatever a captured graph may write to; its plans are new."""
    run = run_fused(TABLE["Adam"], make_params(), "auto", max_grad_norm=1.0).steps(1)
    pipeline = run.optimizer._pipeline
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer._pipeline is pipeline
    assert pipeline._plans is None
