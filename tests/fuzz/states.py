"""Changes of optimizer.state between two steps."""

from __future__ import annotations

import collections
import weakref
from random import Random
from typing import Any

import torch
from cases import COUNTED, LAYOUTS, lay_out
from torch import Tensor

from .story import REALS
from .world import World, pick


def _entries(world: World, index: int) -> list[dict[str, Any]]:
    """Returns the state of the same parameter on every side; empty where torch has none."""
    found = [side.optimizer.state.get(side.params[index], {}) for side in world.sides]
    # Ours may have made state for a step that was skipped; torch's user finds none to change.
    return found if found[-1] else []


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Returns the names of the states that torch has too, without the counter."""
    return [k for k, value in entries[-1].items() if isinstance(value, Tensor) and k not in COUNTED]


def _each_state(world: World, rng: Random) -> list[tuple[dict[str, Any], str]]:
    """Returns a state of a parameter: where it is on every side, and its name; or nothing."""
    entries = _entries(world, pick(world, rng))
    if not entries or not _names(entries):
        return []
    name = rng.choice(_names(entries))
    world.log[-1] += f" ({name})"
    return [(each, name) for each in entries]


def replace_state(world: World, rng: Random) -> None:
    """Exchanges a state tensor for another with other values, perhaps of another layout."""
    layout = rng.choice(LAYOUTS)
    found = _each_state(world, rng)
    for entries, name in found:
        world.gone.append(weakref.ref(entries[name]))
        # Ours may be of a wider type than stock torch's, which gets the same numbers, rounded.
        numbers = found[0][0][name].detach() if entries is not found[0][0] else entries[name] * 2
        entries[name] = lay_out(numbers.detach().to(entries[name]), layout)


def write_state(world: World, rng: Random) -> None:
    """Writes into a state tensor."""
    found = _each_state(world, rng)
    for entries, name in found:
        first = found[0][0][name]
        entries[name].copy_(first * 2 if entries[name] is first else first)


def move_state(world: World, rng: Random) -> None:
    """Gives a state tensor other memory under the same object."""
    share = rng.random() < 0.3
    for entries, name in _each_state(world, rng):
        if share and entries[name].is_contiguous() and entries[name].numel():
            entries[name].share_memory_()
        else:
            entries[name].data = entries[name].data.clone()


def state_dtype(world: World, rng: Random) -> None:
    """Puts a state into another type; stock torch keeps its own, with the same numbers."""
    dtype = rng.choice(REALS)
    if world.ours.optimizer.backend == "torch":
        return  # torch's rules refuse it
    for side, (entries, name) in zip(world.sides, _each_state(world, rng), strict=False):
        value = entries[name]
        if value.is_complex():
            return
        if side is world.stock:
            value.copy_(value.to(dtype))
        else:
            entries[name] = value.to(dtype)


def counter(world: World, rng: Random) -> None:
    """Writes, moves or exchanges a step counter."""
    how, value = rng.choice(("write", "move", "replace", "exchange")), float(rng.randrange(60))
    for entries in _entries(world, pick(world, rng)):
        if "step" not in entries:
            return
        if how == "write":
            entries["step"].fill_(value)
        elif how == "move":
            entries["step"].data = entries["step"].data.clone() + value
        elif how == "replace":
            entries["step"] = torch.tensor(value)
        else:
            entries["step"] = entries["step"].clone()


def new_entries(world: World, rng: Random) -> None:
    """Exchanges the dict of one parameter's state, or the dict of all."""
    index, everything = pick(world, rng), rng.random() < 0.5
    for side in world.sides:
        state, param = side.optimizer.state, side.params[index]
        if everything:
            side.optimizer.state = collections.defaultdict(dict, state)
        elif param in state:
            state[param] = dict(state[param])


def drop_state(world: World, rng: Random) -> None:
    """Lets a parameter, or all, start anew."""
    index, how = pick(world, rng), rng.choice(("pop", "empty", "clear"))
    for side in world.sides:
        dropped = [side.params[index]] if how != "clear" else side.params
        for entries in (side.optimizer.state.get(param, {}) for param in dropped):
            world.gone += [weakref.ref(v) for v in entries.values() if isinstance(v, Tensor)]
        if how == "pop":
            side.optimizer.state.pop(side.params[index], None)
        elif how == "empty":
            side.optimizer.state[side.params[index]] = {}
        else:
            side.optimizer.state.clear()
