"""Checkpoints and copies between two steps."""

from __future__ import annotations

import copy
import io
import pickle
from random import Random
from typing import Any

import torch
from cases import copies
from torch.nn import Parameter

import fusedopt
from fusedopt._checkpoint import keep_scalars

from .world import Side, World


def _fresh(world: World, side: Side, params: list[Parameter], kind: str) -> torch.optim.Optimizer:
    """Returns a new optimizer over `params`, with the groups of a side; kind: "ours", "stock"."""
    rest = iter(params)
    groups = []
    for group in side.optimizer.param_groups:
        settings = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        groups.append({**settings, "params": [next(rest) for _ in group["params"]]})
    if kind == "stock":
        return world.make_stock(groups)
    return world.make_ours(groups, side.optimizer.backend)


def reload(world: World, rng: Random) -> None:
    """Loads a checkpoint: into itself or a new optimizer, directly, from a file, through torch."""
    how = rng.choice(("itself", "new", "file", "torch", "from_torch"))
    world.log[-1] += f" ({how})"
    for side in world.sides:
        checkpoint = side.optimizer.state_dict()
        if how == "itself":
            _load(world, side.optimizer, checkpoint)
            continue
        kind = "stock" if side is world.stock else "ours"
        params = copies(side.params)
        if how == "file":
            file = io.BytesIO()
            torch.save(checkpoint, file)
            file.seek(0)
            checkpoint = torch.load(file)
        elif how in ("torch", "from_torch"):
            stock = _fresh(world, side, params, "stock")
            _load(world, stock, checkpoint)
            if how == "from_torch" and side is not world.stock:
                side.optimizer = fusedopt.from_torch(
                    stock, backend=side.optimizer.backend, **world.settings
                )
                continue
            checkpoint = stock.state_dict()
        fresh = _fresh(world, side, params, kind)
        _load(world, fresh, checkpoint)
        side.optimizer = fresh


def duplicate(world: World, rng: Random) -> None:
    """Goes on with a copy: deepcopy or pickle."""
    pickles = rng.random() < 0.5
    for side in world.sides:
        # Torch 2.13 keeps the type of gradients in a parameter, and its copy forgets it.
        for param in side.params:
            param.grad = None
        side.optimizer = (
            pickle.loads(pickle.dumps(side.optimizer)) if pickles else copy.deepcopy(side.optimizer)
        )


def remember(world: World, rng: Random) -> None:
    """Keeps a checkpoint for later."""
    checkpoints = [copy.deepcopy(side.optimizer.state_dict()) for side in world.sides]
    world.remembered = checkpoints, _shapes(world)


def restore(world: World, rng: Random) -> None:
    """Goes back to the states of a checkpoint that was kept."""
    if world.remembered is None or world.remembered[1] != _shapes(world):
        return
    for side, checkpoint in zip(world.sides, world.remembered[0], strict=True):
        _load(world, side.optimizer, copy.deepcopy(checkpoint))


def _load(world: World, optimizer: Any, checkpoint: dict[str, Any]) -> None:
    optimizer.load_state_dict(checkpoint)
    # Torch rounds scalars to the parameters' type, and is the reference for one that does not.
    keep_scalars(world.entry.fused._rule, optimizer, checkpoint)


def _shapes(world: World) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(param.shape) for param in group["params"]]
        for group in world.ours.optimizer.param_groups
    ]
