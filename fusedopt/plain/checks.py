"""What a plain rule would refuse half-way, refused before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._control import describe
from .._routing import entries_of, is_expanded
from .._settings import GROUP_KEYS
from .rule import PlainRule, Training


class _Scratch(dict[Tensor, Any]):
    """Stands for ``optimizer.state``: what is created stays here."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._live = state

    def __missing__(self, param: Tensor) -> Any:
        return self._live.get(param) or self.setdefault(param, {})


def check(
    rule: PlainRule,
    training: Training,
    group: dict[str, Any],
    name_of: Callable[[Tensor], str],
) -> None:
    """Raises for what the plain rule will refuse; changes nothing.

    Args:
        rule: The algorithm.
        training: Where the group belongs.
        group: A param group, or a part of one, whose parameters have gradients.
        name_of: What messages call a parameter.
    """
    first = name_of(group["params"][0])
    _check_keys(group, training.defaults, first.rpartition(" of ")[2])
    in_graph = group["differentiable"]
    may_write_inference = torch.is_inference_mode_enabled()
    for param in group["params"]:
        entries = entries_of(training.state, param, functools.partial(name_of, param))
        one = _Checked(rule, training, group, param, entries, name_of)
        if not may_write_inference and any(map(_is_inference, (param, *entries.values()))):
            one.refuse_inference()
        # Of an ordinary parameter with an ordinary gradient there is no more to ask.
        if not _is_alike(param.grad, param) or param.is_complex():
            one.check_param()
        if in_graph and param.requires_grad and param.is_leaf:
            raise RuntimeError(
                f"{name_of(param)} is a leaf that requires grad, which a differentiable step"
                " cannot update in place; optimize parameter.clone() instead"
            )
        one.check_state()
    try:
        rule.collect(group, _Scratch(training.state), training.defaults)
    except KeyError as error:
        raise KeyError(
            f"{first}, or another of the same group, has no {error} in its state; load a matching"
            " checkpoint, or delete optimizer.state[parameter]"
        ) from None


def _check_keys(group: dict[str, Any], defaults: dict[str, Any], where: str) -> None:
    for name, default in defaults.items():
        if name not in group and name not in GROUP_KEYS:
            raise KeyError(
                f"{where} has no {name!r}; add groups with add_param_group, which fills in the"
                " defaults"
            )
        several = isinstance(default, tuple)
        if name in GROUP_KEYS or not (several or _is_number(default)):
            continue
        count = len(default) if several else 1
        try:
            values = tuple(group[name]) if several else (group[name],)
        except TypeError:
            values = ()
        if len(values) != count or not all(map(_is_number, values)):
            raise TypeError(
                f"{name!r} of {where} is {group[name]!r}; expected"
                + (f" {count} numbers" if several else " a number or a tensor of one element")
            )


class _Checked(NamedTuple):
    """One parameter, with what is asked about it."""

    rule: PlainRule
    training: Training
    group: dict[str, Any]
    param: Tensor
    entries: dict[str, Any]
    name_of: Callable[[Tensor], str]

    @property
    def name(self) -> str:
        return self.name_of(self.param)

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad

    @property
    def decays(self) -> bool:
        """Whether the plain rule adds the decayed parameter to the gradient."""
        if not self.rule.decays:
            return False
        decay = self.group["weight_decay"]
        decoupled = self.rule.always_decouples or self.group.get("decoupled_weight_decay")
        return not decoupled and (isinstance(decay, Tensor) or decay != 0)

    def refuse_inference(self) -> None:
        states = {f"state {name!r}": self.entries.get(name) for name in self.rule.states}
        for what, tensor in {"the memory": self.param, **states}.items():
            if _is_inference(tensor):
                raise RuntimeError(
                    f"{what} of {self.name} is an inference tensor, which only"
                    " torch.inference_mode() may write; step there, or put a clone in its place"
                )

    def check_param(self) -> None:
        """Looks at the parameter and its gradient."""
        param, grad = self.param, self.grad
        fits = grad.is_complex() if param.is_complex() else grad.is_floating_point()
        if not fits or grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"the gradient of {self.name} is {describe(grad)};"
                " expected a floating-point tensor shaped like the parameter,"
                f" {describe(param)}. Set parameter.grad = None and run backward again"
            )
        if is_expanded(param):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a"
                " single memory location. Please clone() the tensor before performing the"
                f" operation. It is {self.name}, {describe(param)}"
            )
        if self.rule.views_as_real and param.is_conj():
            raise RuntimeError(
                f"{self.name} is a conjugated view, which torch's rule cannot update in place;"
                " optimize parameter.resolve_conj()"
            )
        if grad.is_sparse and self.decays:
            raise RuntimeError(
                "weight_decay option is not compatible with sparse gradients, and it is"
                f" {self.group['weight_decay']} for {self.name}; set it to 0, or"
                " decoupled_weight_decay=True"
            )

    def check_state(self) -> None:
        for name in self.rule.counted:
            if not isinstance(self.entries.get(name, self.param), Tensor):
                raise TypeError(
                    f"{name!r} in the state of {self.name} is {self.entries[name]!r}; expected a"
                    " 0-dim tensor"
                )
        same_type = self.grad.dtype is self.param.dtype
        for name in self.rule.states:
            # What is not there yet will be like the parameter.
            value = self.entries.get(name, self.param)
            if value is None and name == self.rule.starts_unset:
                continue
            if same_type and (value is self.param or _is_alike(value, self.param)):
                continue
            if problem := self._misfit(name, value):
                raise ValueError(f"state {name!r} of {self.name} {problem}")

    def _misfit(self, name: str, value: Any) -> str | None:
        """Says why the plain rule cannot use a state; None when it can."""
        param, grad = self.param, self.grad
        like = (
            f"expected a tensor like the parameter, {describe(param)}. Load a matching checkpoint,"
            " or delete optimizer.state[parameter]"
        )
        if not isinstance(value, Tensor):
            return f"is {value!r}; {like}"
        fits = value.is_complex() if param.is_complex() else value.is_floating_point()
        if value.shape != param.shape or value.device != param.device or not fits:
            return f"is {describe(value)}; {like}"
        if value.layout != torch.strided:
            # Where a state starts from the first gradient, a sparse one makes it sparse.
            if name != self.rule.starts_unset or not grad.is_sparse:
                return f"is sparse beside a gradient that is not; {like}"
        elif is_expanded(value) or (self.rule.views_as_real and value.is_conj()):
            return f"is a view whose elements share memory or are conjugated; {like}"
        seen = torch.result_type(grad, param) if self.decays else grad.dtype
        if name in self.rule.lerped and value.dtype != seen and name in self._needed:
            return (
                f"is {describe(value)}, which torch's rule cannot mix with a gradient of"
                f" {describe(grad)}; give both the same dtype"
            )
        return None

    @property
    def _needed(self) -> set[str]:
        return self.rule.needed_state(self.group, self.training.defaults)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()


def _is_alike(value: Any, param: Tensor) -> bool:
    """Whether a gradient or state is the most ordinary one for a parameter as ordinary."""
    return (
        isinstance(value, Tensor)
        and value.dtype is param.dtype
        and value.layout is torch.strided
        and value.shape == param.shape
        and value.device == param.device
        and value.is_contiguous()
        and param.is_contiguous()
        and not (value.is_complex() and value.is_conj())
    )
