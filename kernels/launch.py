"""The tables in device memory and the launches that read them.

Everything between a plan's bookkeeping and the kernels. A plan describes the step as rows of
addresses and numbers; nothing here knows parameters, groups or state dicts.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import math
from collections.abc import Sequence
from types import ModuleType

import torch
import triton.language as tl
from fusedopt.kernels import table
from fusedopt.kernels.apply import apply_kernel
from fusedopt.kernels.groups import GroupRow
from fusedopt.kernels.pieces import (
    BLOCK,
    EDGE,
    REDUCE_BLOCK,
    THREADS,
    Row,
    describe,
    merge_for_reduce,
    piece_length,
)
from fusedopt.kernels.reduce import reduce_kernel

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_LR_TYPE = {dtype: table.LR_TYPES.index(str(dtype).removeprefix("torch.")) for dtype in TYPES}

_TENSOR_WORDS = table.TENSOR_WORDS.value
_GROUP_WORDS = table.GROUP_WORDS.value
_SETTINGS_WORDS = table.SETTINGS_WORDS.value

# What captured graphs read and write, host copies included. A graph may outlive the optimizer and
# nothing tells when it is gone, so these are never freed; a capture adds a few hundred bytes for
# each parameter.
_captured: list[Tables] = []


def load_rule(name: str) -> ModuleType:
    """The module of a rule: HYPER, VARIANTS, STATES, constants, update."""
    return importlib.import_module(f"fusedopt.kernels.{name}")


def state_names(rule: ModuleType, variant: int) -> tuple[str, ...]:
    """The states that a variant of a rule has, in order."""
    return tuple(name for name, bit in rule.STATES if bit & variant == bit)


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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

    Rows are fixed; groups, settings and gradient pointers are set on the host and sent by
    ``upload``, all that changed in one copy. The copy's source is never written again, so it cannot
    race with a launch or a copy in flight.
    """

    def __init__(
        self, rule: ModuleType, device: torch.device, rows: Sequence[Row], group_count: int
    ) -> None:
        self._rule = rule
        self._device = device
        self._warps = _warps(device)
        self._row_count = len(rows)
        self.captured = capturing(device)
        self._staged: list[torch.Tensor] = []
        if self.captured:
            _captured.append(self)

        words, launches, piece_count = describe(
            rows, piece_length(sum(r.numel for r in rows), _processors(device))
        )
        self._apply_launches = launches
        self._reduce_launches = merge_for_reduce(launches)
        layouts = [word for row in rows for word in row.layout]
        fixed = self._empty(len(words) + len(layouts), torch.int64)
        # Layouts stand behind the rows and pieces; only now is it known where.
        address = fixed.data_ptr() + 8 * len(words)
        for index, row in enumerate(rows):
            if row.layout:
                words[index * _TENSOR_WORDS + table.LAYOUT.value] = address
                address += 8 * len(row.layout)
        self._send(fixed, _int64(words + layouts))
        self._tensors = fixed
        self._pieces = fixed[len(rows) * _TENSOR_WORDS :]

        self._host = torch.zeros(
            _SETTINGS_WORDS + group_count * _GROUP_WORDS + len(rows), dtype=torch.int64
        )
        self._host_doubles = self._host.view(torch.float64)
        self._host_doubles[table.MAX_GRAD_NORM.value] = math.inf
        self._host_grads = self._host[_SETTINGS_WORDS + group_count * _GROUP_WORDS :]
        self._grads_at = len(self._host) - len(rows)
        self._changed = (0, len(self._host))
        self._current = self._empty(len(self._host), torch.int64)
        self._settings = self._current[:_SETTINGS_WORDS].view(torch.float64)
        self._groups = self._current[_SETTINGS_WORDS:]
        self._grads = self._current[self._grads_at :]

        self.control = self._zeros(5, torch.float64)
        self.sums = self._zeros(2, torch.float64)
        self._tickets = self._zeros(1 + len(rows), torch.int32)
        self._coefs = self._zeros(len(rows), torch.float64)
        self._piece_pairs = self._zeros(2 * piece_count, torch.float64)
        self._tensor_pairs = self._zeros(2 * len(rows), torch.float64)

    def _empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=self._device)

    def _zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=self._device)

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

    def _mark(self, begin: int, end: int) -> None:
        first, last = self._changed
        self._changed = (min(first, begin), max(last, end)) if last > first else (begin, end)

    def set_group(self, index: int, group: GroupRow) -> None:
        """Writes one group's row."""
        begin = _SETTINGS_WORDS + index * _GROUP_WORDS
        row = self._host[begin : begin + _GROUP_WORDS]
        doubles = row.view(torch.float64)
        doubles[: len(group.hyper)] = torch.tensor(group.hyper, dtype=torch.float64)
        doubles[table.MAX_GRAD_VALUE.value] = group.max_grad_value
        doubles[table.MAX_GRAD_NORM_PER_PARAM.value] = group.max_grad_norm_per_param
        if group.lr is not None:
            address, dtype = group.lr
            row[table.LR.value] = address
            row[table.LR_TYPE.value] = _LR_TYPE[dtype]
        else:
            row[table.LR.value] = 0
        self._mark(begin, begin + _GROUP_WORDS)

    def set_settings(self, max_grad_norm: float, skip_nonfinite: bool) -> None:
        """Writes the global norm's limit (infinity: none) and whether to skip bad steps."""
        settings = torch.tensor([max_grad_norm, skip_nonfinite], dtype=torch.float64)
        if not torch.equal(settings, self._host_doubles[:_SETTINGS_WORDS]):
            self._host_doubles[:_SETTINGS_WORDS] = settings
            self._mark(0, _SETTINGS_WORDS)

    def set_grads(self, addresses: Sequence[int]) -> None:
        """Writes the gradients' addresses, one a row; 0 where a row takes no part in the step."""
        fresh = _int64(addresses)
        changed = (fresh != self._host_grads).nonzero()
        if len(changed):
            self._host_grads.copy_(fresh)
            self._mark(self._grads_at + int(changed[0]), self._grads_at + int(changed[-1]) + 1)

    def upload(self) -> None:
        """Sends what changed since the last time; nothing when nothing did."""
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
            for launch in self._reduce_launches:
                reduce_kernel[(launch.count,)](
                    self._pieces,
                    self._tensors,
                    self._groups,
                    self._grads,
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
                    TYPE=TYPES[launch.types[1]],
                    T=TYPES[launch.compute_type],
                    BLOCK=REDUCE_BLOCK,
                    EDGE=EDGE,
                    num_warps=self._warps,
                    enable_fp_fusion=False,
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
            for launch in self._apply_launches:
                apply_kernel[(launch.count,)](
                    self._pieces,
                    self._tensors,
                    self._groups,
                    self._grads,
                    self._tickets,
                    control,
                    self._coefs if clip_per_param else None,
                    grad_scale,
                    found_inf,
                    launch.first,
                    CONTROLLED=controlled,
                    CONSTANTS=self._rule.constants,
                    UPDATE=self._rule.update,
                    HYPERS=len(self._rule.HYPER),
                    VARIANT=launch.variant,
                    TYPES=tuple(TYPES[dtype] for dtype in launch.types),
                    T=TYPES[launch.compute_type],
                    BLOCK=BLOCK,
                    EDGE=EDGE,
                    num_warps=self._warps,
                    enable_fp_fusion=False,
                )


def _int64(words: Sequence[int]) -> torch.Tensor:
    """The words as a tensor, several times faster than torch.tensor reads a list."""
    if not words:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)
