"""Draws a training story from a seed: what is trained, and what happens to it, as plain data.

Events are names with seeds of their own. What they touch is drawn when they happen, from what is
there then, so any part of a story is a story too, and one that fails can be shortened.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from cases import LAYOUTS, NAMES, TABLE, Entry

REALS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
#: One of several pieces and threads, in one story of twelve.
LARGE = (16384 + 77,)
SHAPES = ((), (0,), (1,), (3, 0, 2), (7,), (33,), (5, 3), (2, 3, 4, 5), (1, 17), (4, 1, 6), (1031,))
LIMITS = (None, None, None, 0.3, 3.0, float("inf"))


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its values are `table.random(shape, seed)`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int


@dataclass(frozen=True)
class Event:
    """A step, a change or a refused step, and the seed of whatever it draws."""

    name: str
    seed: int


@dataclass(frozen=True)
class Story:
    """A whole case.

    Attributes:
        seed: What it was drawn from.
        entry: The optimizer.
        options: Its keyword arguments in torch.
        settings: `max_grad_norm` and `skip_nonfinite`.
        groups: Settings of every group, torch's and ours.
        params: Of every group.
        fused: Whether torch's scaler leaves unscaling and skipping to ours, as with `fused=True`.
        threads: Of the twin.
        instructions: Which of the CPU's instruction sets the twin uses, modulo how many there are.
        events: In order.
    """

    seed: int
    entry: Entry
    options: dict[str, Any]
    settings: dict[str, Any]
    groups: tuple[dict[str, Any], ...]
    params: tuple[tuple[ParamSpec, ...], ...]
    fused: bool
    threads: int
    instructions: int
    events: tuple[Event, ...]


def draw_param(
    rng: Random, dtype: torch.dtype, group: dict[str, Any], small: bool = False
) -> ParamSpec:
    """Returns a parameter for a group, rarely of another type than the story's."""
    if rng.random() < 0.15:
        dtype = rng.choice(REALS)
    elif rng.random() < 0.04 and group.get("max_grad_value") is None:
        dtype = rng.choice(COMPLEX)
    layout = rng.choice(LAYOUTS) if rng.random() < 0.5 else "contiguous"
    shape = rng.choice(SHAPES[:-1] if small else SHAPES)
    return ParamSpec(shape, dtype, layout, rng.randrange(10**6))


def draw_group(rng: Random, entry: Entry) -> dict[str, Any]:
    """Returns what a group has of its own."""
    group: dict[str, Any] = {}
    if rng.random() < 0.6:
        group["lr"] = rng.choice((0.0, 1e-3, 0.03, 0.5))
    if rng.random() < 0.3 and entry.takes("weight_decay"):
        group["weight_decay"] = rng.choice((0.0, 0.1))
    for name in ("max_grad_norm_per_param", "max_grad_value"):
        if rng.random() < 0.3:
            group[name] = rng.choice(LIMITS)
    if not entry.always_decouples and rng.random() < 0.2 and entry.takes("weight_decay"):
        group["decoupled_weight_decay"] = True
    return group


def draw(seed: int, weights: dict[str, float], small: bool = False) -> Story:
    """Returns the story of a seed.

    Args:
        seed: Any number.
        weights: How often each kind of event comes, by name.
        small: For a backend that takes its time: fewer parameters, none of them large.
    """
    rng = Random(seed)
    entry = TABLE[rng.choice(NAMES)]
    dtype = rng.choice(REALS)
    shared = draw_group(rng, entry) if rng.random() < 0.5 else {}
    groups = tuple(
        {**shared, **(draw_group(rng, entry) if rng.random() < 0.6 else {})}
        for _ in range(rng.choice((1, 1, 2) if small else (1, 1, 2, 3)))
    )
    counts = (1, 1, 2) if small else (1, 2, 3)
    params = [
        tuple(draw_param(rng, dtype, group, small) for _ in range(rng.choice(counts)))
        for group in groups
    ]
    if not small and rng.random() < 1 / 12:
        params[0] = (*params[0], ParamSpec(LARGE, dtype, rng.choice(LAYOUTS), seed))
    names = list(weights)
    count = rng.choice((2, 4) if small else (3, 6, 6, 12))
    events = tuple(
        Event(name, rng.randrange(10**9))
        for name in rng.choices(names, [weights[name] for name in names], k=count)
    )
    return Story(
        seed,
        entry,
        dict(rng.choice(list(entry.variants.values()))),
        {"max_grad_norm": rng.choice(LIMITS), "skip_nonfinite": rng.random() < 0.3},
        groups,
        tuple(params),
        rng.random() < 0.5,
        rng.choice((1, 2)),
        rng.randrange(6),
        # However it went, it goes on.
        (*events, Event("step", rng.randrange(10**9)), Event("step", rng.randrange(10**9))),
    )
