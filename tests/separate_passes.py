"""Torch's separate passes, which the gradient pipeline must equal: unscale, clips, check, step.

`Trio` trains the same parameters three times: with ours, with torch's utilities one after another,
and with those in float64. Used by test_pipeline_*.py and test_scaler_*.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import cases
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

Grads = Sequence["Tensor | None"]


def transformed(
    run: cases.Run, grads: Grads, unscale: float, max_grad_norm: float | None
) -> tuple[list[Tensor | None], Tensor]:
    """Returns (what torch's rule sees, the global norm).

    By torch's utilities one after another on wide copies: float64 for float64 parameters, complex
    for complex ones and float32 for all others, the types that we compute in. Of a sparse gradient
    they see the coalesced values.
    """
    shadows: dict[int, torch.nn.Parameter] = {}
    for param, grad in zip(run.params, grads, strict=True):
        if grad is None:
            continue
        wide = param.dtype if param.dtype in _WIDE else torch.float32
        stored = stored_values(grad)
        shadow = torch.nn.Parameter(torch.zeros_like(stored, dtype=wide))
        shadow.grad = stored.to(wide) * torch.tensor(unscale, dtype=wide)
        shadows[id(param)] = shadow
    for group in run.optimizer.param_groups:
        members = [shadows[id(p)] for p in group["params"] if id(p) in shadows]
        # Torch's utility refuses a list without gradients.
        if members and group.get("max_grad_value") is not None:
            clip_grad_value_(members, group["max_grad_value"])
        limit = group.get("max_grad_norm_per_param")
        # Torch's own formula gives nan for an infinite norm under an infinite limit; ours only
        # measures then.
        if limit is not None and limit != math.inf:
            for shadow in members:
                clip_grad_norm_([shadow], limit)
    present = [shadow.grad for shadow in shadows.values()]
    norm = get_total_norm(present) if present else torch.zeros(())
    if max_grad_norm is not None and max_grad_norm != math.inf:
        clip_grad_norm_(list(shadows.values()), max_grad_norm)
    seen = [
        None if grad is None else _like(grad, shadows[id(param)].grad)
        for param, grad in zip(run.params, grads, strict=True)
    ]
    return seen, norm


_WIDE = (torch.float64, torch.complex64, torch.complex128)


def stored_values(grad: Tensor) -> Tensor:
    """Returns the elements that a gradient consists of: of a sparse one the coalesced values."""
    return grad.coalesce().values() if grad.is_sparse else grad


def _like(grad: Tensor, values: Tensor) -> Tensor:
    """Returns `values` as the elements of a gradient like `grad`."""
    if not grad.is_sparse:
        return values
    indices = grad.coalesce().indices()
    return torch.sparse_coo_tensor(indices, values, grad.shape, check_invariants=True).coalesce()


def separate_step(
    run: cases.Run,
    grads: Grads,
    unscale: float = 1.0,
    max_grad_norm: float | None = None,
    skip: bool = False,
) -> Tensor:
    """Steps torch's optimizer on what `transformed` gives, unless `skip`; returns the norm."""
    seen, norm = transformed(run, grads, unscale, max_grad_norm)
    for param, grad in zip(run.params, seen, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)
    if not skip:
        cases.make_missing_state(run.optimizer)
        run.optimizer.step()
    return norm


def any_nonfinite(grads: Grads) -> bool:
    """Whether any element of the raw gradients is inf or nan."""
    return any(grad is not None and not bool(grad.isfinite().all()) for grad in grads)


def snapshot(run: cases.Run) -> dict[str, Tensor]:
    """Returns copies of everything that training changes, and of the gradients."""
    found = {name: value.clone() for name, value in run.tensors().items()}
    for i, param in enumerate(run.params):
        if param.grad is not None:
            found[f"gradient of param {i}"] = param.grad.clone()
    return found


def assert_untouched(run: cases.Run, before: dict[str, Tensor]) -> None:
    """Compares a run with its `snapshot`; state made since then must be as if no step had come.

    Gradients count where the snapshot has them: stock torch unscales them in place.
    """
    now = snapshot(run)
    cases.assert_same_bits({name: now[name] for name in before}, before)
    groups = run.optimizer.param_groups
    initial = {
        "sum": {group.get("initial_accumulator_value", 0.0) for group in groups},
        "mu_product": {1.0},
        "mu": {1.0},
        "eta": {torch.tensor(float(group["lr"])).item() for group in groups},
    }
    made = [name for name in now.keys() - before.keys() if not name.startswith("gradient")]
    for name in made:
        start = initial.get(name.partition(" ")[0], {0.0})
        assert set(now[name].flatten().tolist()) <= start, f"{name} was written"


def bad_steps(count: int) -> set[int]:
    """Returns which of `count` steps overflow in most tests: the first, a middle and the last."""
    return {0, count // 2, count - 1}


class Trio:
    """The same training three times.

    Args:
        entry: The optimizer.
        backend: Ours.
        params: Values to start from.
        groups: Settings of every group, torch's keys and our clips; parameters are dealt out to the
            groups in turn.
        options: Keyword arguments for torch's and our constructor.
        extras: Ours alone: `max_grad_norm`, `skip_nonfinite`.
    """

    def __init__(
        self,
        entry: cases.Entry,
        backend: str,
        params: Sequence[Tensor],
        groups: Sequence[dict[str, Any]] = ({},),
        options: dict[str, Any] | None = None,
        **extras: Any,
    ) -> None:
        options = options or {}
        own, torchs, wide = (cases.copies(params, kind) for kind in (None, None, torch.float64))

        def dealt(members: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
            return [{"params": members[i :: len(groups)], **g} for i, g in enumerate(groups)]

        self.ours = cases.Run(
            own, cases.make_fused(entry, dealt(own), backend, **options, **extras)
        )
        self.stock = cases.Run(torchs, cases.make_stock(entry, dealt(torchs), **options))
        self.truth = cases.Run(wide, cases.make_stock(entry, dealt(wide), **options))
        self.applied = 0

    def runs(self) -> Iterator[cases.Run]:
        """Yields the three runs."""
        yield from (self.ours, self.stock, self.truth)

    def step(self, grads: Grads, scale: float | None = None, found_inf: float = 0.0) -> None:
        """Steps all three, ours as under a scaler, and compares norm, skip flag and gradients."""
        optimizer = self.ours.optimizer
        for param, grad in zip(self.ours.params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        before = snapshot(self.ours)
        device = self.ours.params[0].device
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()
        if scale is not None:
            del optimizer.grad_scale, optimizer.found_inf
        skip = found_inf != 0 or (optimizer.skip_nonfinite and any_nonfinite(grads))
        self.follow(grads, scale or 1.0, skip, before)

    def follow(self, grads: Grads, scale: float, skip: bool, before: dict[str, Tensor]) -> None:
        """Steps the two references after ours and compares what can be compared at once."""
        optimizer = self.ours.optimizer
        limit = optimizer.max_grad_norm
        separate_step(self.stock, grads, 1 / scale, limit, skip)
        norm = separate_step(self.truth, grads, 1 / scale, limit, skip)
        self.applied += not skip
        assert optimizer.last_step_skipped.dtype == torch.bool
        assert optimizer.last_step_skipped.shape == ()
        assert bool(optimizer.last_step_skipped) == skip
        if limit is None:
            assert optimizer.last_grad_norm is None
        else:
            assert_norm(optimizer.last_grad_norm, norm)
        after = snapshot(self.ours)
        kept = {name for name in before if name.startswith("gradient of")}
        cases.assert_same_bits({n: after[n] for n in kept}, {n: before[n] for n in kept})
        if skip:
            assert_untouched(self.ours, before)

    def check(self) -> None:
        """Compares parameters and states after some steps."""
        assert_as_accurate(
            self.ours.tensors(), self.stock.tensors(), self.truth.tensors(), self.applied
        )


def assert_norm(ours: Tensor, truth: Tensor) -> None:
    """`last_grad_norm` against the norm in float64.

    Gradients are unscaled and clipped in float32 (one rounding a factor, three at most, by half an
    eps each), summed in float64, and the norm is rounded to float32 once: two eps.
    """
    assert ours.dtype == torch.float32
    assert ours.shape == ()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        ours.cpu().double(), truth.cpu().double(), rtol=2 * eps, atol=0, equal_nan=True
    )


def assert_as_accurate(
    ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor], steps: int
) -> None:
    """Our error against float64 is at most twice that of torch's passes, plus one eps a step.

    Errors are root mean squares: a single wrong element still stands out by orders of magnitude,
    but one in which gradient and weight decay happen to cancel does not decide. They are relative
    to the tensor, or to an eighth of the largest of the same role and type: a lone element may have
    cancelled too. Torch's error is the worst in the role, because a lone element can be exact by
    luck. float64 has no better oracle: there both are right to a few roundings a step, and 16 eps
    are allowed.

    Inf and nan must stand where the truth has them; half types may overflow or divide by zero
    elsewhere only where torch's do. What only we have must be the untouched state of a parameter
    whose steps were all skipped.
    """
    assert stock.keys() == truth.keys()
    assert stock.keys() <= ours.keys()
    for name in ours.keys() - stock.keys():
        start = float(name.startswith("mu"))
        assert (ours[name] == start).all(), f"{name} is set, but torch's does not exist"
    roles: dict[Any, list[str]] = defaultdict(list)
    finite = {}
    for name, value in stock.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        finite[name] = value.isfinite() & truth[name].isfinite()
        assert bool(ours[name][finite[name]].isfinite().all()), f"{name} has inf or nan of its own"
        assert not bool(ours[name][~truth[name].isfinite()].isfinite().any()), (
            f"{name} lost inf or nan"
        )
        if finite[name].any():
            roles[name.split(" ")[0], value.dtype].append(name)
    for (_, dtype), names in roles.items():
        size = {name: _rms(truth[name][finite[name]]) for name in names}
        floor = max(size.values()) / 8 or 1.0

        def error(value: Tensor, name: str, floor: float = floor, size: Any = size) -> float:
            return _rms((value.double() - truth[name])[finite[name]]) / max(size[name], floor)

        torchs = max(error(stock[name], name) for name in names)
        eps = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
        limit = 2 * torchs + max(1, steps) * eps
        for name in names:
            found = error(ours[name], name)
            assert found <= limit, (
                f"{name} ({dtype}): error {found:.3g}, at most {limit:.3g} allowed"
                f" (torch's is {torchs:.3g})"
            )


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def make_grads(
    params: Sequence[Tensor],
    seed: int,
    scale: float = 1.0,
    missing: Sequence[int] = (),
    poison: float | None = None,
) -> list[Tensor | None]:
    """Returns normal numbers in the parameters' types, times `scale`, one of them `poison`.

    Args:
        params: For shapes, strides, types and devices.
        seed: Of the numbers.
        scale: Their standard deviation.
        missing: Indices of parameters without a gradient.
        poison: inf or nan, for one element of one gradient; None for none.
    """
    grads: list[Tensor | None] = []
    for i, param in enumerate(params):
        values = cases.random(param.shape, 1000 * seed + i, torch.float64, scale=scale)
        grads.append(None if i in missing else torch.empty_like(param.detach()).copy_(values))
    if poison is not None:
        filled = [grad for grad in grads if grad is not None and grad.numel() > 0]
        filled[seed % len(filled)].view(-1)[-1] = poison
    return grads
