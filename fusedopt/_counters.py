"""The counters of applied steps: a 0-dim tensor for each parameter, which the kernels advance.

So they do with a rule's further scalars.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .plain.rule import PlainRule


class StepCounters:
    """Finds every parameter's counter.

    Where the state has ``step``, that tensor is the counter. Where it has not, but a buffer that
    the first step sets (SGD's momentum), a hidden one says whether it has been set: zero means not
    yet, as after a first step that was skipped. Otherwise there is nothing to say, and all
    parameters share a counter that nobody reads. The rule's scalars are always the state's own.

    Args:
        rule: Says which of them it is.
    """

    def __init__(self, rule: PlainRule) -> None:
        self._in_state = rule.has_step
        self._names = rule.counted
        self._buffer_name = rule.starts_unset
        # By the id of a buffer that is alive.
        self._of_buffer: dict[int, Tensor] = {}
        self._maybe_unset: set[int] = set()

    def hand_out(
        self, params: Iterable[Tensor], state: dict[Tensor, Any]
    ) -> dict[Tensor, Tensor | None]:
        """Returns the counters of ``params``; None where the state of a parameter lacks its own.

        A ``step`` or a scalar that is on another device, of a type that kernels do not count in, or
        another parameter's too, is replaced by a copy that fits.
        """
        counters: dict[Tensor, Tensor | None] = {}
        if not self._in_state:
            unread: dict[torch.device, Tensor] = {}
            for param in params:
                buffer = state.get(param, {}).get(self._buffer_name)
                if isinstance(buffer, Tensor):
                    counters[param] = self._hidden(buffer)
                    continue
                if param.device not in unread:
                    unread[param.device] = _new_counter(0.0, param)
                counters[param] = unread[param.device]
            return counters
        seen: set[int] = set()
        for param in params:
            entries = state.get(param, {})
            for name in self._names:
                scalar = entries.get(name)
                if scalar is None:
                    continue
                if not _counts(scalar, param.device) or scalar.data_ptr() in seen:
                    scalar = entries[name] = _counter_like(scalar, param.device)
                seen.add(scalar.data_ptr())
            counters[param] = entries.get("step")
        return counters

    def on_host(
        self, state: dict[Tensor, Any], params: Iterable[Tensor]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Returns what torch keeps of these parameters in the CPU's memory, by one copy a type.

        That is ``step`` and the scalars; those that are there already, or no tensors, are left out.
        """
        by_type: dict[torch.dtype, list[tuple[Tensor, str]]] = defaultdict(list)
        for param in params:
            entries = state.get(param, {})
            for name in self._names:
                scalar = entries.get(name)
                if isinstance(scalar, Tensor) and scalar.device.type != "cpu":
                    by_type[scalar.dtype].append((param, name))
        found: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for places in by_type.values():
            copy = torch.stack([state[param][name].reshape(()) for param, name in places]).cpu()
            # Each in memory of its own, or one that is saved alone would take all others along.
            for i, (param, name) in enumerate(places):
                found[param][name] = copy[i].clone()
        return found

    def create_unset(self, params: Iterable[Tensor], state: dict[Tensor, Any]) -> None:
        """Gives parameters memory for the buffer that the first step sets."""
        for param in params:
            buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
            state[param][self._buffer_name] = buffer
            self._hidden(buffer).zero_()
            self._maybe_unset.add(id(buffer))

    def drop_unset(self, params: Iterable[Tensor], state: dict[Tensor, Any]) -> None:
        """Takes away what `create_unset` gave, from those that no step has set."""
        for param in set(self.unset_buffers(state)).intersection(params):
            del state[param][self._buffer_name]

    def unset_buffers(self, state: dict[Tensor, Any]) -> list[Tensor]:
        """Returns the parameters whose buffer no step has set yet; may synchronise."""
        if not self._maybe_unset:
            return []
        asked = {
            param: key
            for param, entries in state.items()
            if isinstance(entries, dict)
            and (key := id(entries.get(self._buffer_name))) in self._maybe_unset
        }
        self._maybe_unset = {key for key in self._maybe_unset if self._of_buffer[key].item() == 0.0}
        return [param for param, key in asked.items() if key in self._maybe_unset]

    def _hidden(self, buffer: Tensor) -> Tensor:
        """The counter of a buffer; of one that is new here, as if it had been set."""
        key = id(buffer)
        counter = self._of_buffer.get(key)
        if counter is None:
            counter = self._of_buffer[key] = _new_counter(1.0, buffer)
            weakref.finalize(buffer, self._forget, key).atexit = False
        return counter

    def _forget(self, key: int) -> None:
        # What a plan takes for the same buffer, because it came to live in the same place, is not
        # the one that no step had set.
        self._of_buffer.pop(key).fill_(1.0)
        self._maybe_unset.discard(key)


def _counts(step: Any, device: torch.device) -> bool:
    """Whether kernels on ``device`` can advance ``step`` where it is."""
    return (
        isinstance(step, Tensor)
        and step.dim() == 0
        and step.dtype in (torch.float32, torch.float64)
        and step.device == device
        and step.layout == torch.strided
        and not step.requires_grad
        and not step.is_inference()
    )


def _counter_like(step: Any, device: torch.device) -> Tensor:
    """A counter on ``device`` that starts from ``step``, a number or a tensor of one element."""
    value = torch.as_tensor(step, device=device).detach().reshape(())
    narrow = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(torch.float32 if narrow else torch.float64, copy=True)


def _new_counter(value: float, neighbour: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=neighbour.device)
