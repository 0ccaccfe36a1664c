"""The tables in device memory and the launches that read them.

A host plan (host_plan.py) describes the step as rows of addresses and numbers; nothing here knows
parameters, groups or state dicts.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from array import array
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from fusedopt.kernels import table
from fusedopt.kernels.apply import apply_kernel
from fusedopt.kernels.pieces import (
    BLOCK,
    EDGE,
    MAX_PIECE,
    PAIRS,
    REDUCE_BLOCK,
    REDUCE_EDGE,
    THREADS,
    Launch,
    cut,
    merge_for_reduce,
    piece_length,
)
from fusedopt.kernels.reduce import reduce_kernel
from fusedopt.kernels.rows import Row, variant_of

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

_GROUP_WORDS = table.GROUP_WORDS.value
_SETTINGS_WORDS = table.SETTINGS_WORDS.value

# What captured graphs read and write, host copies included. A graph may outlive the optimizer and
# nothing tells when it is gone, so these are never freed; a capture adds a few hundred bytes for
# each parameter.
_captured: list[Tables] = []


def load_rule(name: str) -> ModuleType:
    """The module of a rule: HYPER, VARIANTS, STATES, constants, update; maybe SCALARS, advance."""
    return importlib.import_module(f"fusedopt.kernels.{name}")


def state_names(rule: ModuleType, variant: int) -> tuple[str, ...]:
    """The states that a variant of a rule has, in order."""
    return tuple(name for name, bit in rule.STATES if bit & variant == bit)


def scalar_names(rule: ModuleType) -> tuple[str, ...]:
    """The scalars that a rule has, in order."""
    names: tuple[str, ...] = getattr(rule, "SCALARS", ())
    return names


def rule_constants(rule: ModuleType) -> dict[str, Any]:
    """What of a rule is compiled into the apply kernel, whatever the variant."""
    return {
        "CONSTANTS": rule.constants,
        "UPDATE": rule.update,
        "ADVANCE": getattr(rule, "advance", None),
        "HYPERS": len(rule.HYPER),
        "SCALARS": len(scalar_names(rule)),
    }


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def _warps(device: torch.device) -> int:
    """How many warps make THREADS: 4 of NVIDIA's, 2 of most of AMD's."""
    if device.type == "cuda":
        return THREADS // torch.cuda.get_device_properties(device).warp_size
    return 1


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes ``device`` current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Tables:
    """One plan's rows, groups and gradients on the device, and the launches over them.

    Rows are fixed; groups, gradient pointers and settings are set on the host and sent by
    ``upload``, all that changed in one copy. The copy's source is never written again, so it cannot
    race with a launch or a copy in flight.

    Args:
        rule: the rule's module.
        device: where everything is.
        host: the host plan, which has begun a step.
        group_count: how many groups it has.
        control: the plan's control block, kept as long as the tables: captured graphs write to it.
    """

    def __init__(
        self,
        rule: ModuleType,
        device: torch.device,
        host: Any,
        group_count: int,
        control: torch.Tensor,
    ) -> None:
        self._rule = rule
        self._device = device
        self._warps = _warps(device)
        self.control = control
        self.captured = capturing(device)
        self._known_stream = _stream(device)
        self._staged: list[torch.Tensor] = []
        self._memory = [control]
        if self.captured:
            _captured.append(self)

        packed = host.rows(self._place(host.layouts()).data_ptr())
        rows = list(Row.unpack(packed))
        self._row_count = len(rows)
        # Groups, gradients, settings: what changes between steps, in this order.
        self._grads_at = group_count * _GROUP_WORDS
        # At a multiple of 16 bytes: Triton compiles once more for a pointer that is not.
        self._settings_at = self._grads_at + len(rows) + len(rows) % 2
        count = self._settings_at + _SETTINGS_WORDS
        self._words = array("q", bytes(8 * count))
        self._host = torch.frombuffer(self._words, dtype=torch.int64)
        self._changed = (0, count)
        self.take(host)
        self._limits = (math.inf, False)
        self._write_limits()
        self._current = self._zeros(count, torch.int64)
        self._settings = self._current[self._settings_at :].view(torch.float64)

        variants = [variant_of(self._words, group) for group in range(group_count)]
        operands = [2 + len(state_names(rule, variant)) for variant in variants]
        pieces, spans, launches = cut(
            [row._replace(types=row.types[: operands[row.group]]) for row in rows],
            variants,
            piece_length(sum(row.numel for row in rows if row.step), _processors(device)),
        )
        self._apply_launches = [(each, self._apply_constants(each)) for each in launches]
        self._reduce_launches = [
            (each, self._reduce_constants(each)) for each in merge_for_reduce(launches)
        ]
        self._filled_count = sum(count > 0 for count in spans[1::2])
        # What both kernels read.
        self._table = (
            *map(self._place, (pieces, spans.tobytes(), packed)),
            self._current,
            self._current[self._grads_at :],
        )

        self.sums = self._zeros(2, torch.float64)
        self._tickets = self._zeros(1 + len(rows), torch.int32)
        self._coefs = self._zeros(len(rows), torch.float64)
        self._piece_pairs = self._zeros(2 * sum(each.count for each in launches), torch.float64)
        self._tensor_pairs = self._zeros(2 * len(rows), torch.float64)

    def _apply_constants(self, launch: Launch) -> dict[str, Any]:
        return {
            **rule_constants(self._rule),
            "VARIANT": launch.variant,
            "TYPES": tuple(TYPES[dtype] for dtype in launch.types),
            "T": TYPES[launch.compute_type],
            "BLOCK": BLOCK,
            "EDGE": EDGE,
            "num_warps": self._warps,
            "enable_fp_fusion": False,
        }

    def _reduce_constants(self, launch: Launch) -> dict[str, Any]:
        return {
            "TYPE": TYPES[launch.types[1]],
            "T": TYPES[launch.compute_type],
            "BLOCK": REDUCE_BLOCK,
            "EDGE": REDUCE_EDGE,
            "MAX_PIECE": MAX_PIECE,
            "PAIRS": PAIRS,
            "num_warps": max(self._warps // (1 if launch.types[1].itemsize > 2 else 2), 1),
            "enable_fp_fusion": False,
        }

    def _zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        self._memory.append(torch.zeros(count, dtype=dtype, device=self._device))
        return self._memory[-1]

    def _place(self, packed: bytes) -> torch.Tensor:
        """A copy of structs on the device, as words."""
        memory = self._zeros(len(packed) // 8, torch.int64)
        if packed:
            self._send(memory, torch.frombuffer(bytearray(packed), dtype=torch.int64))
        return memory

    def _send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies ``source`` to the device without waiting for it."""
        if self._device.type == "cpu":
            target.copy_(source)
            return
        # Pinned memory of its own for every copy: the allocator reuses it only after the copy is
        # done.
        staged = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source)
        target.copy_(staged, non_blocking=True)
        if self.captured:
            self._staged.append(staged)

    def _note_stream(self) -> None:
        """Makes sure that memory which the current stream uses is not given to others meanwhile.

        Once these tables are replaced, the allocator knows only the stream that they were made on.
        """
        stream = _stream(self._device)
        if stream is None or stream == self._known_stream:
            return
        self._known_stream = stream
        for memory in self._memory:
            memory.record_stream(stream)

    def _mark(self, begin: int, end: int) -> None:
        first, last = self._changed
        if first < last and begin < end:
            begin, end = min(first, begin), max(last, end)
        if begin < end:
            self._changed = (begin, end)

    @property
    def empty(self) -> bool:
        """Whether no row has state: no pass would launch anything."""
        return not self._apply_launches

    def take(self, host: Any) -> None:
        """Lets the host plan bring groups and gradients up to the step that has begun."""
        self._mark(*host.write(self._words))

    def set_settings(self, max_grad_norm: float, skip_nonfinite: bool) -> None:
        """Writes the global norm's limit (infinity: none) and whether to skip bad steps."""
        if self._limits != (max_grad_norm, skip_nonfinite):
            self._limits = (max_grad_norm, skip_nonfinite)
            self._write_limits()
            self._mark(self._settings_at, self._settings_at + _SETTINGS_WORDS)

    def _write_limits(self) -> None:
        self._words[self._settings_at :] = array("q", array("d", self._limits).tobytes())

    def upload(self) -> None:
        """Sends what changed since the last time; nothing when nothing did."""
        self._note_stream()
        begin, end = self._changed
        if begin < end:
            self._send(self._current[begin:end], self._host[begin:end])
            self._changed = (0, 0)

    def reduce(
        self,
        *,
        unscale: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
    ) -> None:
        """The reduce pass.

        ``sums``, the clip coefficients and, where ``control`` is given, the control block.
        """
        self.upload()
        with _on(self._device):
            for launch, constants in self._reduce_launches:
                reduce_kernel[(launch.count,)](
                    *self._table,
                    self._settings,
                    self._tickets,
                    self._piece_pairs,
                    self._tensor_pairs,
                    self._coefs,
                    self.sums,
                    control,
                    unscale,
                    grad_scale,
                    found_inf,
                    launch.first,
                    self._row_count,
                    self._filled_count,
                    **constants,
                )

    def apply(
        self,
        control: torch.Tensor,
        *,
        controlled: bool,
        clip_per_param: bool = False,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """The apply pass: under ``control`` as it stands, if ``controlled``.

        Else the control block is written too, from the scaler's tensors.
        """
        self.upload()
        with _on(self._device):
            # Like the kernel the pieces, backwards after a reduce pass.
            step = -1 if controlled else 1
            for launch, constants in self._apply_launches[::step]:
                apply_kernel[(launch.count,)](
                    *self._table,
                    self._tickets,
                    control,
                    self._coefs if clip_per_param else None,
                    grad_scale,
                    found_inf,
                    launch.first,
                    CONTROLLED=controlled,
                    **constants,
                )
