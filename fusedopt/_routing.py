"""Decides which parameters native kernels update and which take the plain rule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Member(NamedTuple):
    """A parameter and where it stands: the index of its group, and of itself among all."""

    group: int
    place: int
    param: Tensor


def members_of(param_groups: Any) -> list[Member]:
    """Returns every parameter, in order.

    Raises:
        TypeError: If ``param_groups`` is no list of dicts.
    """
    if not isinstance(param_groups, (list, tuple)):
        raise TypeError(f"param_groups is {param_groups!r}; expected a list of dicts")
    members: list[Member] = []
    for index, group in enumerate(param_groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, (list, tuple)):
            raise TypeError(
                f"param group {index} is not a dict with a list of parameters at 'params'; add"
                " groups with add_param_group"
            )
        members += [Member(index, len(members) + i, param) for i, param in enumerate(params)]
    return members


def identities(members: Iterable[Member]) -> list[tuple[int, int, type]]:
    """Returns what tells other parameters and groups from these, keeping none of them alive."""
    return [(group, id(param), type(param)) for group, _, param in members]


def not_plain(param: Tensor) -> str | None:
    """Says why ``param`` is not plainly a tensor with memory of its own; None when it is."""
    kind = type(param)
    if kind not in (Tensor, torch.nn.Parameter):
        dispatch = getattr(kind, "__torch_dispatch__", None)
        if dispatch not in (None, torch._C._disabled_torch_dispatch_impl):
            return f"a {kind.__name__} (a tensor subclass with its own dispatch)"
        function = getattr(kind, "__torch_function__", None)
        plain = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
        # Bound to the subclass, the method that it inherits is another object.
        own = getattr(function, "__func__", function)
        if own not in (*plain, getattr(plain[0], "__func__", None)):
            return f"a {kind.__name__} (a tensor subclass with its own operations)"
    if param.device.type == "meta":
        return "a meta tensor"
    return None


def entries_of(state: Any, param: Tensor, name_of: Callable[[], str]) -> Any:
    """Returns what stands in ``optimizer.state`` for a parameter: a dict or another mapping.

    Raises:
        TypeError: If it is none; ``name_of`` returns what the message calls the parameter.
    """
    entries = state.get(param, {})
    if not isinstance(entries, (dict, Mapping)):  # the abstract class takes its time
        raise TypeError(
            f"the state of {name_of()} is {entries!r}; expected a dict. Delete"
            " optimizer.state[parameter] to start it anew"
        )
    return entries


def needs_plain_rule(
    param: Tensor, group: dict[str, Any], entries: Mapping[str, Any], counted: Collection[str]
) -> bool:
    """Whether a plain parameter takes the plain rule under every backend.

    What is ``counted`` in its state has no say: it can be replaced.
    """
    return (
        group.get("differentiable", False)
        or not (_is_read_as_dict(group) and _is_read_as_dict(entries))
        or any(
            tensor.layout != torch.strided
            or tensor.dtype not in _KERNEL_DTYPES
            or tensor.is_neg()
            or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or torch._is_functional_tensor(tensor)
            or tensor.is_inference()
            for name, tensor in [("param", param), *entries.items()]
            if isinstance(tensor, Tensor) and name not in counted
        )
    )


def _is_read_as_dict(mapping: Mapping[str, Any]) -> bool:
    """Whether a mapping returns what a dict of its kind holds, which is what plans read."""
    return getattr(type(mapping), "__getitem__", None) is dict.__getitem__


def refuse_fake_mode(params: Iterable[Tensor]) -> None:
    """Raises RuntimeError for real parameters under FakeTensorMode, which writes nothing real."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = _get_current_dispatch_mode_stack()
    if not any(isinstance(mode, FakeTensorMode) for mode in modes):
        return
    if not all(isinstance(param, FakeTensor) or param.device.type == "meta" for param in params):
        raise RuntimeError(
            "step() of real parameters under FakeTensorMode would change them; make the parameters"
            " under the mode, or step outside of it"
        )


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory, as those of an expanded one do."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_contiguous()
        and any(
            stride == 0 and size > 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    )


def _memory_range(tensor: Tensor) -> tuple[int, int]:
    """Returns the first and one-past-last byte that a tensor of at least one element touches."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def sharing_memory(owners: Iterable[tuple[Tensor, Iterable[Tensor]]]) -> set[Tensor]:
    """Returns the parameters whose memory, or whose state's, overlaps another's or itself.

    Updating those in parallel would race; plain rules take them one after another, as torch does.

    Args:
        owners: Parameters, each with all tensors that a step writes for it.
    """
    ranges = []
    shared = set()
    for param, tensors in owners:
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            ranges.append((*_memory_range(tensor), param))
            if is_expanded(tensor):
                shared.add(param)
    ranges.sort(key=lambda entry: entry[:2])
    reach, reacher = 0, None
    for start, end, param in ranges:
        if start < reach and reacher is not None:
            shared |= {param, reacher}
        if end > reach:
            reach, reacher = end, param
    return shared


def is_shard(param: Tensor) -> bool:
    """Whether this process may hold no more than a shard of a parameter.

    FSDP1 marks its own flat parameters by their type (`isinstance` knows it) and the original ones,
    where it keeps them, by an attribute.
    """
    flat = getattr(sys.modules.get("torch.distributed.fsdp._flat_param"), "FlatParameter", None)
    return (
        _is_dtensor(param)
        or (flat is not None and isinstance(param, flat))
        or getattr(param, "_fsdp_flattened", False)
    )


def _is_dtensor(param: Tensor) -> bool:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(param, kind)


def refusal(params: Iterable[Tensor], wanted: list[str]) -> str:
    """Says why a step that needs all gradients cannot run over shards, and what to do.

    Args:
        params: Of the optimizer, a shard among them.
        wanted: Names of the options that need all gradients, and of the scaler that does.
    """
    shard = next(filter(is_shard, params))
    is_dtensor = _is_dtensor(shard)
    kind = type(shard).__name__ if is_dtensor else "parameter sharded by FullyShardedDataParallel"
    remedies = []
    if options := [name for name in wanted if "GradScaler" not in name]:
        clip = "torch.nn.utils.clip_grad_norm_" if is_dtensor else "FSDP.clip_grad_norm_"
        clips = any("norm" in name for name in options)
        remedies.append(
            f"leave {', '.join(options)} unset" + f" and clip with {clip} before the step" * clips
        )
    if options != wanted:
        scaler = "torch.amp.GradScaler" if is_dtensor else "ShardedGradScaler of torch's FSDP"
        remedies.append(f"use {scaler} instead of fusedopt.GradScaler")
    return (
        f"{', '.join(wanted)} over a {kind} would see only this process's shard of the gradients;"
        f" {' and '.join(remedies)}"
    )
