"""Parameters that take torch's own rule: what is checked beforehand, and the call.

Everything that torch's rule would refuse half-way is refused here, before anything is changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._control import describe
from ._routing import entries_of, is_expanded, not_plain
from ._settings import GROUP_KEYS


class _Scratch(dict[Tensor, Any]):
    """Stands for ``optimizer.state``: what is created stays here."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._live = state

    def __missing__(self, param: Tensor) -> Any:
        return self._live.get(param) or self.setdefault(param, {})


class TorchRule:
    """The part of an optimizer that hands parameters over to torch's functions."""

    #: Whether the state counts a parameter's steps.
    _has_step: ClassVar[bool] = True
    #: Names in ``optimizer.state[parameter]``, besides ``step``, that some variant has.
    _states: ClassVar[tuple[str, ...]]
    #: Whether torch's own rule knows decoupled weight decay.
    _torch_decouples: ClassVar[bool] = False
    #: Whether torch's own rule looks at complex tensors through ``view_as_real``.
    _views_as_real: ClassVar[bool] = True

    #: Whether torch's fused kernel takes tensor subclasses (DTensor), too.
    _fuses_subclasses: ClassVar[bool] = False

    state: Any
    defaults: dict[str, Any]
    _init_group: Any

    def _apply_torch_rule(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        """Lets torch's rule update the parameters of ``group`` that have a gradient.

        Args:
            group: A param group, or a part of one.
            grads: What to use instead of the parameters' own gradients; None for those.
        """
        if group.get("decoupled_weight_decay") and not self._torch_decouples:
            shrink = 1 - group["lr"] * group["weight_decay"]
            if isinstance(shrink, Tensor):
                shrink = shrink.reshape(())
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(shrink)
            group = {**group, "weight_decay": 0}
        if grads is None or not self._has_own_init_group():
            self._update_with_torch(group, grads)
            return
        # It reads them itself.
        params = [param for param in group["params"] if param.grad is not None]
        given = [param.grad for param in params]
        try:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            self._update_with_torch(group, None)
        finally:
            for param, grad in zip(params, given, strict=True):
                param.grad = grad

    def _update_with_torch(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        raise NotImplementedError

    def _lerped(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the states that torch mixes with the gradient by `lerp_`, of the same type."""
        return ()

    def _create_state(self, group: dict[str, Any]) -> None:
        """Creates the state of the parameters in ``group`` that have a gradient, as torch does."""
        self._collect(group)

    def _collect(self, group: dict[str, Any], state: Any = None) -> tuple[list[list[Any]], Any]:
        """Returns torch's lists for ``group`` (parameters, gradients, states) and its flags.

        Args:
            group: A param group, or a part of one.
            state: Where state is looked up and created; None for the optimizer's own.
        """
        kind = torch_class(type(self))
        lists: list[list[Any]] = [[] for _ in range(_list_count(kind))]
        if state is None:
            return lists, self._init_group(group, *lists)
        reader: Any = object.__new__(kind)
        reader.__dict__.update(state=state, defaults=self.defaults)
        return lists, kind._init_group(reader, group, *lists)

    def _has_own_init_group(self) -> bool:
        """Whether a subclass collects states and gradients in its own way, which kernels do not."""
        own = getattr(self._init_group, "__func__", self._init_group)
        return own is not torch_class(type(self))._init_group

    def _fuses(self, group: dict[str, Any], lists: list[list[Any]]) -> bool | None:
        """Returns what to tell torch's function for ``fused``.

        True only where its fused kernels are right: they take tensors for dense and of one type
        and layout, and momentum buffers for there or not there all together; SGD's on the CPU is
        wrong in half types from 16 elements on (torch 2.13).
        """
        if not group.get("fused"):
            return group.get("fused")
        params, *others = filter(None, lists)
        if any(len({value is None for value in values}) > 1 for values in others):
            return None
        for param, *values in zip(params, *others, strict=True):
            if not self._fuses_subclasses and not_plain(param) is not None:
                return None
            for value in (param, *values):
                if value is None or (value.dim() == 0 and param.dim() != 0):
                    continue
                if (
                    value.layout != torch.strided
                    or not value.is_contiguous()
                    or not value.is_floating_point()
                    or (value.element_size() == 2 and value.device.type == "cpu")
                    or value.dtype != param.dtype
                ):
                    return None
        return True

    def _check_for_torch(self, group: dict[str, Any], name_of: Callable[[Tensor], str]) -> None:
        """Raises for what torch's rule will refuse; changes nothing.

        Args:
            group: A param group, or a part of one, whose parameters have gradients.
            name_of: What messages call a parameter.
        """
        self._check_keys(group, name_of(group["params"][0]).rpartition(" of ")[2])
        in_graph = self.defaults["differentiable"]
        may_write_inference = torch.is_inference_mode_enabled()
        for param in group["params"]:
            entries = entries_of(self.state, param, functools.partial(name_of, param))
            if not may_write_inference and any(map(_is_inference, (param, *entries.values()))):
                self._refuse_inference(param, entries, name_of)
            # Of an ordinary parameter with an ordinary gradient there is no more to ask.
            if not _is_alike(param.grad, param) or param.is_complex():
                self._check_param(group, param, name_of)
            if in_graph and param.requires_grad and param.is_leaf:
                raise RuntimeError(
                    f"{name_of(param)} is a leaf that requires grad, which a differentiable step"
                    " cannot update in place; optimize parameter.clone() instead"
                )
            self._check_state(group, param, entries, name_of)
        if self._has_own_init_group():
            return
        try:
            self._collect(group, _Scratch(self.state))
        except KeyError as error:
            raise KeyError(
                f"{name_of(group['params'][0])}, or another of the same group, has no {error} in"
                " its state; load a matching checkpoint, or delete optimizer.state[parameter]"
            ) from None

    def _check_keys(self, group: dict[str, Any], where: str) -> None:
        for name, default in self.defaults.items():
            if name not in group and name not in GROUP_KEYS:
                raise KeyError(
                    f"{where} has no {name!r}; add groups with add_param_group, which fills in the"
                    " defaults"
                )
            several = isinstance(default, tuple)
            if name in GROUP_KEYS or not (several or _is_number(default)):
                continue
            try:
                values = tuple(group[name]) if several else (group[name],)
            except TypeError:
                values = ()
            fits = len(values) == (len(default) if several else 1)
            if not fits or not all(map(_is_number, values)):
                raise TypeError(
                    f"{name!r} of {where} is {group[name]!r}; expected"
                    + (
                        f" {len(default)} numbers"
                        if several
                        else " a number or a tensor of one element"
                    )
                )

    def _refuse_inference(
        self, param: Tensor, entries: dict[str, Any], name_of: Callable[[Tensor], str]
    ) -> None:
        states = {f"state {name!r}": entries.get(name) for name in self._states}
        for what, tensor in {"the memory": param, **states}.items():
            if _is_inference(tensor):
                raise RuntimeError(
                    f"{what} of {name_of(param)} is an inference tensor, which only"
                    " torch.inference_mode() may write; step there, or put a clone in its place"
                )

    def _check_param(
        self, group: dict[str, Any], param: Tensor, name_of: Callable[[Tensor], str]
    ) -> None:
        """The part of `_check_for_torch` that looks at one parameter and its gradient."""
        grad = param.grad
        assert grad is not None
        fits = grad.is_complex() if param.is_complex() else grad.is_floating_point()
        if not fits or grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"the gradient of {name_of(param)} is {describe(grad)};"
                " expected a floating-point tensor shaped like the parameter,"
                f" {describe(param)}. Set parameter.grad = None and run backward again"
            )
        if is_expanded(param):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a"
                " single memory location. Please clone() the tensor before performing the"
                f" operation. It is {name_of(param)}, {describe(param)}"
            )
        if self._views_as_real and param.is_conj():
            raise RuntimeError(
                f"{name_of(param)} is a conjugated view, which torch's rule cannot update in place;"
                " optimize parameter.resolve_conj()"
            )
        if grad.is_sparse and _decays(group):
            raise RuntimeError(
                "weight_decay option is not compatible with sparse gradients, and it is"
                f" {group['weight_decay']} for {name_of(param)}; set it to 0, or"
                " decoupled_weight_decay=True"
            )

    def _check_state(
        self,
        group: dict[str, Any],
        param: Tensor,
        entries: dict[str, Any],
        name_of: Callable[[Tensor], str],
    ) -> None:
        """The part of `_check_for_torch` that looks at one parameter's state."""
        if not isinstance(entries.get("step", param), Tensor):
            raise TypeError(
                f"'step' in the state of {name_of(param)} is {entries['step']!r}; expected a 0-dim"
                " tensor"
            )
        assert param.grad is not None
        same_type = param.grad.dtype is param.dtype
        for name in self._states:
            # What is not there yet will be like the parameter.
            value = entries.get(name, param)
            if value is None and not self._has_step:
                continue  # The momentum starts from this gradient.
            if same_type and (value is param or _is_alike(value, param)):
                continue
            if problem := self._misfit(name, value, param, group):
                raise ValueError(f"state {name!r} of {name_of(param)} {problem}")

    def _misfit(self, name: str, value: Any, param: Tensor, group: dict[str, Any]) -> str | None:
        """Says why torch's rule cannot use a state; None when it can."""
        grad = param.grad
        assert grad is not None
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
            # A sparse first gradient makes a sparse momentum buffer of SGD, and more of them fit.
            if name != "momentum_buffer" or not grad.is_sparse:
                return f"is sparse beside a gradient that is not; {like}"
        elif is_expanded(value) or (self._views_as_real and value.is_conj()):
            return f"is a view whose elements share memory or are conjugated; {like}"
        seen = torch.result_type(grad, param) if _decays(group) else grad.dtype
        if name in self._lerped(group) and value.dtype != seen:
            return (
                f"is {describe(value)}, which torch's rule cannot mix with a gradient of"
                f" {describe(grad)}; give both the same dtype"
            )
        return None


def torch_class(cls: type) -> Any:
    """Returns torch's own class behind one of ours."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))


@functools.cache
def _list_count(kind: Any) -> int:
    """Returns how many lists torch's `_init_group` fills, besides reading the group."""
    return len(inspect.signature(kind._init_group).parameters) - 2


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


def _decays(group: dict[str, Any]) -> bool:
    """Whether torch's rule adds the decayed parameter to the gradient."""
    decay = group["weight_decay"]
    return not group.get("decoupled_weight_decay") and (isinstance(decay, Tensor) or decay != 0)
