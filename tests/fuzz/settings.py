"""Changes of numbers and settings between two steps."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import torch
from cases import COUNTED
from torch import Tensor

from .story import LIMITS
from .world import OUR_KEYS, World, pick_group


def hyperparameter(world: World, rng: Random) -> None:
    """Writes a number of torch's into a group, the learning rate also as a tensor."""
    choices: dict[str, tuple[Any, ...]] = {
        "lr": (0.0, 1e-3, 0.03, 0.5, 1, torch.tensor(0.03), torch.tensor(0.1).double()),
        "weight_decay": (0.0, 0.1, 1),
        "maximize": (True, False),
        "eps": (1e-3, 1e-6),
        "betas": ((0.5, 0.9), [0.8, 0.99]),
        "alpha": (0.5, 0.9),
        "rho": (0.5, 0.95),
        "lr_decay": (0.0, 0.1),
        "etas": ((0.3, 1.5), [0.6, 1.1]),
        "step_sizes": ((1e-4, 0.1), [1e-3, 10.0]),
    }
    if world.entry.name == "SGD":
        choices |= {"momentum": (0.0, 0.5, 0.9), "dampening": (0.0, 0.3)}
    groups = pick_group(world, rng)
    name = rng.choice([key for key in choices if key in groups[-1]])
    value = rng.choice(choices[name])
    if groups[-1].get("nesterov"):
        return  # torch wants a momentum and no dampening, but looks only once
    world.log[-1] += f" ({name} = {value})"
    for group in groups:
        group[name] = copy.deepcopy(value)


def fill_lr(world: World, rng: Random) -> None:
    """Fills a learning rate that is a tensor, as schedulers do."""
    value = rng.choice((0.0, 0.01, 0.2))
    for group in pick_group(world, rng):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)


def write_betas(world: World, rng: Random) -> None:
    """Writes into a list of betas."""
    value = rng.choice((0.4, 0.7))
    for group in pick_group(world, rng):
        if isinstance(group.get("betas"), list):
            group["betas"][0] = value


def group_setting(world: World, rng: Random) -> None:
    """Writes one of our keys into a group."""
    groups = pick_group(world, rng)
    name = rng.choice(OUR_KEYS)
    if name == "decoupled_weight_decay" and not world.entry.takes("weight_decay"):
        return
    if name == "decoupled_weight_decay":
        value: Any = True if world.entry.always_decouples else rng.random() < 0.5
    else:
        value = rng.choice(LIMITS)
    if name == "max_grad_value" and any(p.is_complex() for p in groups[0]["params"]):
        return
    world.log[-1] += f" ({name} = {value})"
    for group in groups:
        group[name] = value


def setting(world: World, rng: Random) -> None:
    """Changes a setting of the whole optimizer."""
    name = rng.choice(tuple(world.settings))
    value = rng.choice(LIMITS) if name == "max_grad_norm" else rng.random() < 0.5
    world.settings[name] = value
    world.log[-1] += f" ({name} = {value})"
    for side in (world.ours, *world.twins):
        setattr(side.optimizer, name, value)


def other_backend(world: World, rng: Random) -> None:
    """Changes the backend of ours and of its twin."""
    value = rng.choice((world.native, world.native, "torch", "auto"))
    if value == "torch" and any(
        k not in COUNTED and v is not None and v.dtype != param.dtype
        for param in world.ours.params
        for k, v in world.ours.optimizer.state.get(param, {}).items()
    ):
        return  # its rules refuse states of another type
    world.log[-1] += f" ({value})"
    for side in (world.ours, *world.twins):
        side.optimizer.backend = side.native if value == world.native else value
