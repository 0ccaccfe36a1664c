"""How the tests compare what two optimizers made: by bits, by tolerances, against an oracle.

What is compared are the dictionaries of `table.Run.tensors`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; any NaN equals any other, and nothing else does."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    if not a.is_floating_point():
        return torch.equal(a, b)
    kind = _INTEGERS[a.element_size()]
    equal = a.view(kind) == b.view(kind)
    return bool((equal | (a.isnan() & b.isnan())).all())


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compares what `Run.tensors` returned for two runs."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert same_bits(value, theirs[name]), f"{name} differs:\n{value}\n{theirs[name]}"


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], factor: float = 1.0) -> None:
    """Compares two runs with torch's default tolerances of their types, times `factor`."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        rtol, atol = torch.testing._comparison.default_tolerances(value.dtype)
        torch.testing.assert_close(
            value.cpu(),
            theirs[name].cpu(),
            rtol=rtol * factor,
            atol=atol * factor,
            msg=functools.partial("{}: {}".format, name),
        )


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda x: x.abs().max(),
    "mean square": lambda x: x.square().mean().sqrt(),
}


def assert_accurate(
    ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Our error against the oracle is at most twice plain torch's, plus one eps of the result.

    Judged by the largest error and by the mean square error, over all parameters together and over
    each state of all parameters together: one element alone may be exact by luck. Elements where
    torch itself overflowed or divided zero by zero (it does in float16) are left out.
    """
    assert ours.keys() == stock.keys() == truth.keys()
    for kind in sorted({_kind(name) for name in ours}):
        names = [name for name in ours if _kind(name) == kind]
        assert [ours[n].dtype for n in names] == [stock[n].dtype for n in names], kind
        for dtype in sorted({ours[n].dtype for n in names}, key=str):
            same = [n for n in names if ours[n].dtype == dtype]
            judged = _join(stock, same).isfinite()
            _judge(kind, dtype, *(_join(run, same)[judged] for run in (ours, stock, truth)))


def _kind(name: str) -> str:
    return name.split()[0]


def _join(run: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([run[name].detach().cpu().double().flatten() for name in names])


def _judge(kind: str, dtype: torch.dtype, ours: Tensor, stock: Tensor, truth: Tensor) -> None:
    if truth.numel() == 0:
        return
    info = torch.finfo(dtype)
    # In float64 the oracle is plain torch, whose own error (it counts twice) does not show.
    slack = 4 if dtype == torch.float64 else 1
    for measure, norm in _NORMS.items():
        own_error = norm(ours - truth).item()
        stock_error = norm(stock - truth).item()
        limit = 2 * stock_error + info.eps * (slack * norm(truth).item() + info.tiny)
        assert own_error <= limit, (
            f"{kind} in {dtype}: {measure} error {own_error:.3g}, but torch's is"
            f" {stock_error:.3g} (at most {limit:.3g} allowed)"
        )
