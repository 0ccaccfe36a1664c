"""Steps that must be refused, with everything left bit for bit as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from cases import COUNTED
from compare import same_bits
from torch import Tensor

from .judge import bits
from .steps import as_sparse, set_grads
from .world import Side, World

#: Takes the spoilt thing back.
Undo = Callable[[], None]


def _with_grad(side: Side) -> list[tuple[dict[str, Any], torch.nn.Parameter]]:
    """Returns the parameters that take part in the step, with their groups."""
    return [
        (group, param)
        for group in side.optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    ]


def _pick(side: Side, rng: Random, native: bool = False) -> Any:
    """Returns (group, parameter with a gradient), or None; `native`: one that a kernel updates."""
    found = _with_grad(side)
    if native:
        found = [
            (group, param)
            for group, param in found
            if not param.is_complex() and not param.grad.is_sparse
            if side.optimizer.backend != "torch"
        ]
    return rng.choice(found) if found else None


def _put(container: dict[str, Any], key: str, value: Any) -> Undo:
    old = dict(container)
    container[key] = value

    def undo() -> None:
        container.pop(key)
        container.update({key: old[key]} if key in old else {})

    return undo


def _spoil_gradient(
    side: Side, rng: Random, make: Callable[[Tensor], Tensor | None]
) -> Undo | None:
    if (found := _pick(side, rng)) is None:
        return None
    param = found[1]
    bad = make(param)
    if bad is None or param.grad.is_sparse:
        return None
    param.grad.data = bad

    def undo() -> None:
        param.grad = None

    return undo


def gradient_shape(side: Side, rng: Random) -> Undo | None:
    """A gradient of another shape."""
    return _spoil_gradient(
        side, rng, lambda p: p.detach().new_ones((*p.shape, 2)) if p.numel() else None
    )


def gradient_integer(side: Side, rng: Random) -> Undo | None:
    """A gradient of whole numbers."""
    return _spoil_gradient(side, rng, lambda p: torch.ones_like(p, dtype=torch.int64))


def gradient_complex(side: Side, rng: Random) -> Undo | None:
    """A complex gradient of a real parameter."""
    return _spoil_gradient(
        side, rng, lambda p: None if p.is_complex() else torch.ones_like(p, dtype=torch.complex64)
    )


def gradient_sparse(side: Side, rng: Random) -> Undo | None:
    """A sparse gradient where torch's rule takes none."""
    if side.entry.sparse or (found := _pick(side, rng)) is None:
        return None
    param = found[1]
    if param.dim() != 2 or not param.numel():
        return None
    param.grad = None
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = param.dtype
    param.grad = as_sparse(torch.ones_like(param))

    def undo() -> None:
        param.grad = None

    return undo


def hyperparameter(side: Side, rng: Random) -> Undo | None:
    """Something that is no number."""
    if (found := _pick(side, rng, native=True)) is None:
        return None
    value = rng.choice(("fast", None, [0.1], torch.ones(2)))
    return _put(found[0], rng.choice([k for k in ("lr", "weight_decay") if k in found[0]]), value)


def limit(side: Side, rng: Random) -> Undo | None:
    """A limit that is not above zero."""
    if (found := _pick(side, rng)) is None:
        return None
    name = rng.choice(("max_grad_value", "max_grad_norm_per_param"))
    return _put(found[0], name, rng.choice((-1.0, 0, math.nan, "small")))


def complex_limit(side: Side, rng: Random) -> Undo | None:
    """A limit by value for a complex parameter."""
    found = [group for group, param in _with_grad(side) if param.is_complex()]
    return _put(rng.choice(found), "max_grad_value", 1.0) if found else None


def _spoil_state(side: Side, rng: Random, make: Callable[[Tensor], Any]) -> Undo | None:
    if (found := _pick(side, rng, native=True)) is None:
        return None
    entries = side.optimizer.state.get(found[1], {})
    names = [k for k, value in entries.items() if isinstance(value, Tensor) and k not in COUNTED]
    if found[0].get("momentum") == 0:
        names = [name for name in names if name != "momentum_buffer"]  # not looked at
    if not names or (bad := make(entries[names[0]])) is None:
        return None
    return _put(entries, rng.choice(names), bad)


def state_shape(side: Side, rng: Random) -> Undo | None:
    """A state of another shape."""
    return _spoil_state(side, rng, lambda old: old.new_zeros((*old.shape, 2)))


def state_list(side: Side, rng: Random) -> Undo | None:
    """A state that is no tensor."""
    return _spoil_state(side, rng, lambda old: [0.0])


def state_elsewhere(side: Side, rng: Random) -> Undo | None:
    """A state on another device."""
    return _spoil_state(side, rng, lambda old: old.to("meta"))


def state_missing(side: Side, rng: Random) -> Undo | None:
    """One of several entries of the state is gone, or the counter."""
    if (found := _pick(side, rng, native=True)) is None:
        return None
    entries = side.optimizer.state.get(found[1], {})
    if len(entries) < 2:
        return None
    before, name = dict(entries), rng.choice(sorted(entries))
    del entries[name]

    def undo() -> None:
        entries.clear()
        entries.update(before)

    return undo


def param_expanded(side: Side, rng: Random) -> Undo | None:
    """A parameter whose elements share memory, which torch refuses to write."""
    if (found := _pick(side, rng)) is None or found[1].numel() < 2 or not found[1].dim():
        return None
    param = found[1]
    old = param.data
    if param.shape[0] < 2:
        return None
    param.data = old[:1].clone().expand(param.shape)

    def undo() -> None:
        param.data = old

    return undo


SPOILS = (
    gradient_shape,
    gradient_integer,
    gradient_complex,
    gradient_sparse,
    hyperparameter,
    limit,
    complex_limit,
    state_shape,
    state_list,
    state_elsewhere,
    state_missing,
    param_expanded,
)


def refuse(world: World, rng: Random) -> None:
    """Spoils one thing of ours and its twin, sees the step refused, and takes it back."""
    spoil, seed = rng.choice(SPOILS), rng.randrange(10**9)
    world.log[-1] += f" ({spoil.__name__})"
    for side in (world.ours, *world.twins):
        set_grads(side, seed)
        undo = spoil(side, Random(seed))
        if undo is None:
            return
        before = side.snapshot()
        try:
            with side.at_home():
                side.optimizer.step()
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            message = str(error)
            assert "incompatible function arguments" not in message, message
            assert "another thread" not in message, message
        else:
            raise AssertionError(f"{side.name} took a step with {spoil.__doc__.lower()}")
        after = side.snapshot()
        for name, value in before.items():
            assert name in after and same_bits(bits(after[name]), bits(value)), (
                f"{name} was changed by a step that was refused ({message})"
            )
        undo()
