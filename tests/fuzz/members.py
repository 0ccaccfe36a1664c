"""Changes of parameters and groups between two steps."""

from __future__ import annotations

import weakref
from random import Random

import torch
from cases import COUNTED, LAYOUTS, lay_out
from torch import Tensor
from torch.nn import Parameter

from .story import REALS, draw_group, draw_param
from .world import Side, World, make_param, pick, pick_group


def add_group(world: World, rng: Random) -> None:
    """Adds a group with settings of its own."""
    group = draw_group(rng, world.entry)
    specs = [draw_param(rng, rng.choice(REALS), group, True) for _ in range(2)]
    for side in world.sides:
        params = [make_param(spec, side.device) for spec in specs]
        keys = {"decoupled_weight_decay": _decouples(world)} if side is world.stock else {}
        side.optimizer.add_param_group({**keys, **group, "params": params})


def _decouples(world: World) -> bool:
    default = world.entry.always_decouples
    return bool(world.story.options.get("decoupled_weight_decay", default))


def append_param(world: World, rng: Random) -> None:
    """Appends to the list of a group, past add_param_group."""
    groups = pick_group(world, rng)
    spec = draw_param(rng, rng.choice(REALS), groups[0], True)
    for side, group in zip(world.sides, groups, strict=True):
        param = make_param(spec, side.device)
        group["params"].append(param)


def remove_param(world: World, rng: Random) -> None:
    """Takes a parameter and its state away."""
    index = pick(world, rng)
    if len(world.ours.params) == 1:
        return
    for side in world.sides:
        param = side.params[index]
        side.optimizer.state.pop(param, None)
        _replace(side, param, [])
        world.gone.append(weakref.ref(param))


def _replace(side: Side, param: Parameter, others: list[Parameter]) -> None:
    """Puts others in a parameter's place."""
    for group in side.optimizer.param_groups:
        at = [i for i, member in enumerate(group["params"]) if member is param]
        for i in at:
            group["params"][i : i + 1] = others


def prune(world: World, rng: Random) -> None:
    """Puts a parameter of more or fewer rows in another's place and takes its state along."""
    index = pick(world, rng)
    shape = world.ours.params[index].shape
    if not shape:
        return
    rows = torch.tensor([i for i in range(shape[0]) if rng.random() < 0.7] * 2, dtype=torch.int64)
    if any(
        set(side.optimizer.state.get(side.params[index], {}))
        != set(world.stock.optimizer.state.get(world.stock.params[index], {}))
        for side in world.sides
    ):
        return  # a state that only ours has made so far
    for side in world.sides:
        old = side.params[index]
        new = Parameter(old.detach()[rows.to(old.device)])
        entries = side.optimizer.state.pop(old, None)
        if entries is not None:
            side.optimizer.state[new] = {
                k: v[rows.to(v.device)] if isinstance(v, Tensor) and k not in COUNTED else v
                for k, v in entries.items()
            }
        _replace(side, old, [new])
        world.gone.append(weakref.ref(old))


def reorder(world: World, rng: Random) -> None:
    """Assigns another list of parameters, in another order."""
    for group in pick_group(world, rng):
        group["params"] = list(reversed(group["params"]))


def regroup(world: World, rng: Random) -> None:
    """Replaces dicts of groups, splits them or moves parameters from one to another."""
    how, lr = rng.choice(("dicts", "split", "move")), rng.choice((0.02, 0.2))
    for side in world.sides:
        groups = side.optimizer.param_groups
        if how == "dicts":
            side.optimizer.param_groups = [dict(group) for group in groups]
        elif how == "split":
            first = groups[0]
            one, rest = first["params"][:1], first["params"][1:]
            split = [{**first, "params": one, "lr": lr}, {**first, "params": rest}]
            side.optimizer.param_groups = [*split, *groups[1:]]
        elif len(groups) > 1 and len(groups[0]["params"]) > 1:
            if groups[0]["params"][-1].is_complex():
                return  # the other may limit values
            groups[-1]["params"].append(groups[0]["params"].pop())


def move_data(world: World, rng: Random) -> None:
    """Gives a parameter other memory, perhaps of another layout."""
    index, layout, set_ = pick(world, rng), rng.choice(LAYOUTS), rng.random() < 0.3
    for side in world.sides:
        param = side.params[index]
        moved = lay_out(param.detach(), layout)
        if set_:
            with torch.no_grad():
                param.set_(moved)
        else:
            param.data = moved


def data_dtype(world: World, rng: Random) -> None:
    """Puts a parameter and its states into another type, as module.half() and a reload do."""
    index, dtype = pick(world, rng), rng.choice(REALS)
    for side in world.sides:
        param = side.params[index]
        if param.is_complex():
            return
        param.grad = None
        param.data = param.data.to(dtype)
        entries = side.optimizer.state.get(param, {})
        for name, value in entries.items():
            if isinstance(value, Tensor) and name not in COUNTED:
                entries[name] = value.to(dtype)


def zero_grad(world: World, rng: Random) -> None:
    """Drops or zeroes the gradients."""
    set_to_none = rng.random() < 0.5
    for side in world.sides:
        for param in side.params:
            if not set_to_none and param.grad is not None and 0 in param.grad.stride():
                param.grad = None  # torch cannot zero it in place
        side.optimizer.zero_grad(set_to_none=set_to_none)


def hooks(world: World, rng: Random) -> None:
    """Registers hooks, with which torch's wrapper comes around the step."""
    for side in world.sides:
        side.optimizer.register_step_pre_hook(lambda *_: None)
        side.optimizer.register_step_post_hook(lambda *_: None)
