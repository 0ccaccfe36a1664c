"""One step of a story on every side, compared with torch's separate passes and with float64.

After every step stock torch goes on from our numbers. So what is judged is one step at a time,
however long the story; and between two steps the sides must agree to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from cases import COUNTED, LAYOUTS, Run, lay_out, random
from separate_passes import any_nonfinite, assert_norm, separate_step, stored_values
from torch import Tensor
from torch.nn import Parameter

from .judge import Judge, assert_same
from .story import COMPLEX, REALS
from .world import Side, World, values

#: How a step comes about.
WAYS = ("plain", "plain", "closure", "preset", "found_inf", "torch", "unscaled", "fused")
WIDE = (torch.float64, torch.complex128)
#: Scales of somebody else's scaler, which keeps them in float32.
PRESETS = (1.0, 8.0, 3.0, torch.tensor(0.3).item())
BY_SCALER = ("torch", "unscaled", "fused")


def takes_other_grads(side: Side, own: torch.dtype) -> bool:
    """Whether gradients may have another type than the parameter; torch's rules refuse them."""
    return side.optimizer.backend != "torch" and own not in COMPLEX


def takes_sparse(side: Side, group: dict[str, Any], param: Tensor) -> bool:
    """Whether torch's rule takes a sparse gradient here and leaves a dense state."""
    states = side.optimizer.state.get(param, {}).items()
    decays = group.get("weight_decay", 0) != 0 and not group.get("decoupled_weight_decay")
    return (
        side.entry.sparse
        and not decays
        and all(k in COUNTED or v is None or v.dtype == param.dtype for k, v in states)
        and group.get("momentum", 0) == 0
        and param.dtype in (torch.float32, torch.float64)
        and param.dim() == 2
        and param.numel() > 0
    )


def as_sparse(dense: Tensor) -> Tensor:
    """Returns a sparse gradient of the first rows, one of which appears twice."""
    rows = [*range(0, dense.shape[0], 2), 0]
    return torch.sparse_coo_tensor([rows], dense[rows], dense.shape, check_invariants=True)


def draw_grad(
    rng: Random, side: Side, group: dict[str, Any], param: Tensor, odd: float, scale: float
) -> Tensor:
    """Returns a gradient; `odd`: how likely it has another type or layout than the parameter."""
    number = rng.randrange(10**6)
    kind = rng.choice(REALS) if rng.random() < odd else param.dtype
    layout = rng.choice((*LAYOUTS, "expanded")) if rng.random() < odd else None
    sparse = rng.random() < 0.3
    size = scale * rng.choice((1.0, 1.0, 1e-3, 30.0))
    extreme = rng.choice((1e12, 1e-12)) if rng.random() < 0.03 else 1.0
    if not takes_other_grads(side, param.dtype):
        kind = param.dtype
    if kind == param.dtype and kind in (torch.float32, torch.float64):
        size *= extreme
    grad = values(param.shape, number, kind, size).to(param.device)
    if sparse and takes_sparse(side, group, param):
        return as_sparse(grad.to(param.dtype))
    if layout == "expanded" and param.dim() and param.shape[0]:
        return grad[:1].expand(param.shape)
    if layout in LAYOUTS:
        return lay_out(grad, layout)
    return torch.empty_like(param.detach(), dtype=kind).copy_(grad)


def set_grads(side: Side, seed: int, scale: float = 1.0, poison: float | None = None) -> None:
    """Gives the parameters of a side gradients: the same on every side for the same seed."""
    rng = Random(seed)
    missing = rng.choice((0.0, 0.0, 0.3, 0.7))
    odd = rng.choice((0.0, 0.0, 0.4))
    filled = []
    for group in side.optimizer.param_groups:
        for param in group["params"]:
            absent = rng.random() < missing
            grad = draw_grad(rng, side, group, param, odd, scale)
            param.grad = None
            if absent:
                continue
            if getattr(param, "grad_dtype", grad.dtype) != grad.dtype:
                param.grad_dtype = grad.dtype
            param.grad = grad
            if grad.numel() and not grad.is_sparse and not grad.is_complex():
                filled.append(grad)
    if poison is not None and filled:
        victim = rng.choice(filled)
        victim[tuple(rng.randrange(size) for size in victim.shape)] = poison


def possible(way: str, side: Side) -> str:
    """Returns `way`, or "plain" where a scaler cannot take the gradients."""
    grads = [param.grad for param in side.params if param.grad is not None]
    # Torch's writes, which elements that share memory do not take.
    odd = any(grad.is_sparse or grad.is_complex() or 0 in grad.stride() for grad in grads)
    half = any(grad.dtype == torch.float16 for grad in grads)
    refused = odd or (half and side.unscales(way))
    if way in BY_SCALER and not grads or way in ("torch", "unscaled") and refused:
        return "plain"
    return way


def step(world: World, rng: Random) -> None:
    """Steps every side and compares whatever there is to compare."""
    ours = world.ours
    way, seed, preset = rng.choice(WAYS), rng.randrange(10**9), rng.choice(PRESETS)
    poison = rng.choice((math.inf, -math.inf, math.nan)) if rng.random() < 0.15 else None
    if way in ("plain", "closure", "preset") and rng.random() < 0.7:
        poison = None  # unless the step skips, it stays in the parameters for good
    scale = {"plain": 1.0, "closure": 1.0, "preset": preset, "found_inf": preset}.get(way)
    if scale is None:
        scale = ours.scalers["fused" if way == "fused" else "torch"].get_scale()
    for side in (ours, *world.twins):
        set_grads(side, seed, scale, poison)
    way = possible(way, ours)
    if way == "plain":
        scale = 1.0
    grads = [None if p.grad is None else p.grad.detach().to("cpu", copy=True) for p in ours.params]
    bad = any_nonfinite([None if grad is None else stored_values(grad) for grad in grads])
    found_inf = 2.0 if way == "found_inf" else 0.0
    skips = world.settings["skip_nonfinite"] or way in BY_SCALER
    skip = found_inf != 0 or (bad and skips)
    world.log.append(
        f"{way}, gradients {''.join('-' if grad is None else 'x' for grad in grads)}, scale"
        f" {scale:g}{', not finite' if bad else ''}{', skipped' if skip else ''}"
    )
    truth = make_truth(world)
    shaken = [make_truth(world, Random(i)) for i in range(world.shakes)]
    befores = []
    for side in (ours, *world.twins):
        if side.unscales(way):
            side.scalers["torch"].unscale_(side.optimizer)
        befores.append(side.snapshot())
        versions = [param._version for param in side.params]
        side.step(way, scale, found_inf)
        check_versions(side, versions, grads, skip)
        if way in BY_SCALER:
            scaler = side.scalers["fused" if way == "fused" else "torch"]
            assert scaler.get_scale() == (scale / 2 if bad else scale), "the scaler missed it"
    reference_step(world, world.stock.run(), grads, scale, skip)
    norm = reference_step(world, truth, grads, scale, skip)
    for i, run in enumerate(shaken):
        others = [None if grad is None else shake(grad, Random(-i)) for grad in grads]
        reference_step(world, run, others, scale, skip)
    for side, before in zip((ours, *world.twins), befores, strict=True):
        called = side.optimizer._step_supports_amp_scaling or not (skip and side.unscales(way))
        if called:
            check_report(world, side, norm, skip)
        check_untouched(side, before, grads, skip)
    judge(world, befores[0], truth, shaken, grads)
    go_on_from_ours(world)
    world.agree()


def widen(value: Tensor) -> Tensor:
    """Returns a float64 or complex128 copy."""
    return value.cpu().to(torch.complex128 if value.is_complex() else torch.float64, copy=True)


def shake(value: Tensor, rng: Random | None) -> Tensor:
    """Returns a wide copy, with `rng` every number an eps up or down."""
    wide = widen(value.detach())
    if rng is None:
        return wide
    eps = torch.finfo(torch.float64 if value.dtype in WIDE else torch.float32).eps
    signs = random(wide.shape, rng.randrange(1000)).sign()
    return wide * (1 + eps * signs.double())


def make_truth(world: World, rng: Random | None = None) -> Run:
    """Returns stock torch in float64, going on from our numbers, shaken with `rng`."""
    stock, exact = world.stock, world.ours.run().tensors()
    wide = [Parameter(shake(param, rng)) for param in world.ours.params]
    at = {id(param): i for i, param in enumerate(stock.params)}
    groups = [
        # Torch's own rules compute in the type of a learning rate that is a tensor.
        {**group, "params": [wide[at[id(p)]] for p in group["params"]], "lr": float(group["lr"])}
        for group in stock.optimizer.param_groups
    ]
    truth = world.make_stock(groups)
    truth.state.clear()
    for i, param in enumerate(stock.params):
        truth.state[wide[i]] = {
            name: value.clone() if name in COUNTED else shake(exact[f"{name} of param {i}"], rng)
            for name, value in stock.optimizer.state.get(param, {}).items()
            if value is not None
        }
    return Run(wide, truth)


def reference_step(
    world: World, run: Run, grads: Sequence[Tensor | None], scale: float, skip: bool
) -> Tensor:
    """Steps torch's optimizer after torch's utilities, with our decoupled decay; the norm."""
    apart = []
    if world.entry.takes("weight_decay") and not world.entry.decouples:
        apart = [g for g in run.optimizer.param_groups if g.get("decoupled_weight_decay")]
    decays = [group["weight_decay"] for group in apart]
    present = {id(p) for p, grad in zip(run.params, grads, strict=True) if grad is not None}
    for group, decay in zip(apart, decays, strict=True):
        group["weight_decay"] = 0
        for param in group["params"]:
            if id(param) in present and not skip:
                param.detach().mul_(1 - group["lr"] * decay)
    norm = separate_step(run, grads, 1 / scale, world.settings["max_grad_norm"], skip)
    for group, decay in zip(apart, decays, strict=True):
        group["weight_decay"] = decay
    return norm


def check_report(world: World, side: Side, norm: Tensor, skip: bool) -> None:
    """What the optimizer says about its step."""
    skipped, own_norm = side.optimizer.last_step_skipped, side.optimizer.last_grad_norm
    assert skipped.dtype == torch.bool and skipped.shape == ()
    assert bool(skipped) == skip, f"last_step_skipped of {side.name} is {skipped}"
    if world.settings["max_grad_norm"] is None:
        assert own_norm is None
    else:
        if norm.isfinite():
            assert_norm(own_norm, norm)
        assert norm.isfinite() == own_norm.isfinite(), f"last_grad_norm is {own_norm}, not {norm}"


def check_versions(
    side: Side, before: Sequence[int], grads: Sequence[Tensor | None], skip: bool
) -> None:
    """Autograd must notice that a parameter was written."""
    for param, old, grad in zip(side.params, before, grads, strict=True):
        written = grad is not None and not skip
        assert not written or param._version > old, (
            f"autograd does not see that {side.name} wrote a parameter"
        )


def check_untouched(
    side: Side, before: dict[str, Tensor], grads: Sequence[Tensor | None], skip: bool
) -> None:
    """Gradients, the memory around tensors, and all of a parameter that took no part."""
    resting = {f"param {i}" for i, grad in enumerate(grads) if skip or grad is None}
    names = [
        name
        for name in before
        if name.startswith(("gradient", "memory"))
        or name in resting
        or name.partition(" of ")[2] in resting
    ]
    after = side.snapshot()
    same = {name: before[name] for name in names}
    assert_same({name: after[name] for name in names}, same, f"written by {side.name}")


def judge(
    world: World,
    before: dict[str, Tensor],
    truth: Run,
    shaken: Sequence[Run],
    grads: Sequence[Tensor | None],
) -> None:
    """Counters exactly, everything else within the errors that `Judge` allows."""
    limits = [group.get("max_grad_norm_per_param") for group in world.stock.optimizer.param_groups]
    clips = any(limit is not None for limit in (world.settings["max_grad_norm"], *limits))
    present = [grad for grad in grads if grad is not None]
    kinds = {p.dtype for p, grad in zip(world.ours.params, grads, strict=True) if grad is not None}
    narrow = clips and not kinds <= set(WIDE)
    found = Judge(sum(grad.numel() for grad in present) if clips else 0, narrow)
    ours, stock, exact = (run.tensors() for run in (world.ours.run(), world.stock.run(), truth))
    others = [run.tensors() for run in shaken]
    assert not stock.keys() - ours.keys(), f"missing: {sorted(stock.keys() - ours.keys())}"
    for name, value in stock.items():
        if name.split()[0] in COUNTED:
            assert ours[name] == value, f"{name} is {ours[name]}, torch's {value}"
            continue
        grad = grads[int(name.rpartition(" ")[2])]
        native = (
            world.ours.optimizer.backend != "torch"
            and grad is not None
            and not grad.is_sparse
            and not value.is_complex()
        )
        start = before.get(name, torch.zeros_like(value))
        found.add(
            name,
            start,
            ours[name].detach(),
            value,
            exact[name],
            [other[name] for other in others],
            native,
        )
    found.decide()


def go_on_from_ours(world: World) -> None:
    """Gives stock torch our numbers."""
    with torch.no_grad():
        for param, own in zip(world.stock.params, world.ours.params, strict=True):
            param.copy_(own)
            own_entries = world.ours.optimizer.state.get(own, {})
            for name, value in world.stock.optimizer.state.get(param, {}).items():
                if value is not None and name not in COUNTED:
                    value.copy_(own_entries[name])
