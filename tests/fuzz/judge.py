"""Compares what a step made of the parameters and states, by bits and against float64."""

from __future__ import annotations

from collections import defaultdict

import torch
from compare import same_bits
from torch import Tensor

#: More roundings than any rule has on the way to one number, half an eps each.
ROUNDINGS = 16
HALVES = (torch.float16, torch.bfloat16)


def bits(value: Tensor) -> Tensor:
    """Returns a dense real tensor with the same numbers, for comparisons."""
    value = value.detach().cpu()
    if value.is_sparse:
        value = value.to_dense()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str = "unlike its twin"
) -> None:
    """Every tensor has the same bits; any NaN equals any other."""
    assert ours.keys() == theirs.keys(), f"{what}: {sorted(ours.keys() ^ theirs.keys())}"
    for name, value in ours.items():
        assert same_bits(bits(value), bits(theirs[name])), (
            f"{name} is {what}:\n{value}\n{theirs[name]}"
        )


def outside(tensor: Tensor) -> Tensor:
    """Returns the elements of a tensor's memory that are not its own: nobody may write them."""
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        tensor.detach().untyped_storage()
    )
    own = torch.zeros(memory.numel(), dtype=torch.bool, device=tensor.device)
    own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return memory[~own]


class InaccurateError(AssertionError):
    """An error is too large, unless the problem is that sensitive."""


class Judge:
    """Collects the errors of one step, in units of eps, and holds ours against torch's.

    An error is relative to the larger of an element's old and new value, since that much is what
    the update is added to, and at least to the tensor's mean square: gradient and decay may cancel
    in an element. What it becomes of shaking the step's inputs by an eps, if known, is no error. It
    may be at most twice torch's worst on tensors of the
    same role and type, plus one; or what the roundings of a rule come to, since torch can be exact
    by luck where there are few elements. A native step rounds once to half types: there it may be
    one eps, whatever torch's is.

    Args:
        terms: How many squares a norm adds up that clips; 0 without such a norm.
        narrow: Whether what float64 parameters are clipped by comes from float32 as well.
    """

    def __init__(self, terms: int, narrow: bool) -> None:
        self._terms, self._narrow = terms, narrow
        self._found: dict[tuple[str, torch.dtype, bool], list[tuple[str, float, float]]] = (
            defaultdict(list)
        )

    def add(
        self,
        name: str,
        before: Tensor,
        ours: Tensor,
        stock: Tensor,
        truth: Tensor,
        shaken: list[Tensor],
        native: bool,
    ) -> None:
        """Takes in one tensor; `native`: whether a kernel of ours computed it."""
        assert ours.shape == stock.shape, f"{name} has shape {list(ours.shape)}"
        before, ours, stock, truth = (bits(value) for value in (before, ours, stock, truth))
        finite = stock.isfinite() & truth.isfinite()
        assert bool(ours[finite].isfinite().all()), (
            f"{name} has inf or nan of its own:\n{ours}\n{stock}"
        )
        lost = ~truth.isfinite() & ~stock.isfinite()
        assert not bool(ours[lost].isfinite().any()), f"{name} lost inf or nan:\n{ours}\n{truth}"
        if not finite.any():
            return
        info = torch.finfo(ours.dtype)
        # What was computed in float32 and stored in float64 is float32.
        wide = torch.float64 if stock.dtype == torch.float64 and not self._narrow else torch.float32
        size = truth[finite].square().mean().sqrt()
        scale = torch.maximum(before.double().abs().nan_to_num(), truth.abs()).clamp(min=size)
        unit = max(info.eps, torch.finfo(wide).eps) * (scale + info.tiny)
        for other in shaken:
            unit = torch.maximum(unit, (bits(other) - truth).abs().nan_to_num())
        error, torchs = (
            ((value.double() - truth).abs() / unit)[finite].max().item() for value in (ours, stock)
        )
        self._found[name.split()[0], ours.dtype, native].append((name, error, torchs))

    def decide(self) -> None:
        """Raises AssertionError when an error is too large."""
        for (role, dtype, native), found in self._found.items():
            torchs = max(torchs for _, _, torchs in found)
            allowed = max(2 * torchs + 1, ROUNDINGS / 2)
            if dtype == torch.float64:
                # The truth has as many roundings as ours, and some in the sum of a norm.
                allowed = max(allowed, ROUNDINGS + self._terms)
            if native and dtype in HALVES:
                allowed = 1
            name, error, _ = max(found, key=lambda entry: entry[1])
            if error > allowed:
                raise InaccurateError(
                    f"{name}, a {role} in {dtype}: error of {error:.3g} eps, at most"
                    f" {allowed:.3g} allowed (torch's is {torchs:.3g})"
                )
