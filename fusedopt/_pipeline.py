"""One optimizer's step: validate everything, reduce, settle the step control, apply.

The pipeline owns the plans of the native backends and the parameters that take torch's rules. It is
built anew whenever the structure of the optimizer changes, and is no part of a pickle or
checkpoint.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _control, _routing, backends
from ._control import GradTransform, describe
from ._counters import StepCounters
from ._routing import Member
from ._settings import Settings

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer


class Pipeline:
    """The step of one optimizer over all its plans.

    Between steps it keeps no parameter, gradient or state alive: whoever drops one frees it.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        # Weak, or a cycle would keep parameters and state alive until the collector runs.
        self._reference = weakref.ref(optimizer)
        # Steps from several threads follow one another.
        self._lock = threading.RLock()
        self._stepping = False
        self._plans: dict[torch.device, Any] | None = None
        # The plan of all parameters, where there is just one and nothing else to ask.
        self._only_plan: Any = None
        # Of every parameter when the plans were made: group, id and type.
        self._built_over: list[tuple[int, int, type]] = []
        # The places of those for torch's rules.
        self._torch_places: set[int] = set()
        # The places of those of them that share memory with others.
        self._shared_places: set[int] = set()
        # Whether a dispatch mode sees to every operation, which kernels would hide from it.
        self._observed = False
        self._holds_shards = False
        self.settings = Settings()
        self.counters = StepCounters(optimizer._has_step)
        #: float64[5] in the order of ``StepControl``: what the last step left; None before the
        #: first.
        self.control: Tensor | None = None

    @property
    def _optimizer(self) -> FusedOptimizer:
        optimizer = self._reference()
        assert optimizer is not None
        return optimizer

    def reset(self) -> None:
        """Makes the next step build its plans anew."""
        self._plans = self._only_plan = None

    def step(self, skip_nonfinite: bool) -> None:
        """Runs one step; raises before anything is changed when something does not fit."""
        with self._lock:
            if self._stepping:
                raise RuntimeError(
                    "step() was called inside of a step() of the same optimizer, by a number or"
                    " tensor of the caller's own type; call it before or after"
                )
            self._stepping = True
            try:
                self._step(skip_nonfinite)
            finally:
                self._stepping = False

    def _step(self, skip_nonfinite: bool) -> None:
        observed = torch._C._len_torch_dispatch_stack() > 0
        if observed:
            _routing.refuse_fake_mode(
                member.param for member in _routing.members_of(self._optimizer.param_groups)
            )
        if observed != self._observed:
            self._observed = observed
            self.reset()
        plan = self._only_plan
        if plan is not None:
            attention = self._step_alone(plan, skip_nonfinite)
            if attention is None:
                return
            if attention[0]:
                self.reset()
        try:
            foreign = self._begin()
            groups = self._optimizer.param_groups
            if self._holds_shards and (wanted := self.settings.reducing(groups)):
                params = [member.param for member in _routing.members_of(groups)]
                raise NotImplementedError(_routing.refusal(params, wanted))
            if self._only_plan is None or foreign:
                self._step_together(foreign, skip_nonfinite)
                return
        finally:
            self._end()
        if self._step_alone(self._only_plan, skip_nonfinite) is not None:
            raise RuntimeError(_CHANGED)

    def _step_alone(self, plan: Any, skip_nonfinite: bool) -> Any:
        """Runs a step that one plan does alone, unless the plan asks for attention."""
        optimizer = self._optimizer
        attention = _labelled(
            optimizer._rule,
            plan.step,
            optimizer.param_groups,
            optimizer.state,
            self.settings.handed.get("grad_scale"),
            self.settings.handed.get("found_inf"),
            self.settings.max_grad_norm,
            skip_nonfinite,
        )
        if attention is None:
            self.control = plan.control
        return attention

    def backend_of(self, param: Tensor) -> str:
        """Returns the name of the backend that updates ``param``."""
        with self._lock:
            try:
                self._begin()
            finally:
                self._end()
            by_torch = {
                id(m.param)
                for m in _routing.members_of(self._optimizer.param_groups)
                if m.place in self._torch_places
            }
            if id(param) in by_torch or param.device not in (self._plans or {}):
                return "torch"
            backend = backends.for_device(self.settings.backend, param.device)
            return "torch" if backend is None else backend.NAME

    def _begin(self) -> list[Member]:
        """Brings the plans to the beginning of this step; returns what is left to torch's rules."""
        if not isinstance(self._optimizer.state, dict):
            raise TypeError(
                f"optimizer.state is {self._optimizer.state!r}; expected a dict. Start over with"
                " optimizer.state = collections.defaultdict(dict)"
            )
        # A first look may find a plan outdated, a second state missing.
        for _ in range(3):
            entries = _routing.members_of(self._optimizer.param_groups)
            # Every plan looks at all groups, but there may be none.
            if self._torch_places or not self._plans:
                if _routing.identities(entries) != self._built_over:
                    self.reset()
            if self._plans is None:
                self._build(entries)
            rebuild, missing, foreign = self._ask_plans()
            if not rebuild and not missing:
                break
            self._end()
            if missing:
                self._create_state(entries, missing)
            self.reset()
        else:
            raise RuntimeError(_CHANGED)
        left = {id(param) for param in foreign}
        members = [
            member
            for member in entries
            if id(member.param) in left
            or (member.place in self._torch_places and member.param.grad is not None)
        ]

        def name_of(param: Tensor) -> str:
            return next(self._name_of(m.group, m.place) for m in members if m.param is param)

        for index, group in self._subgroups(members):
            for name in ("max_grad_norm_per_param", "max_grad_value"):
                _control.check_limit(name, group.get(name), f"in param group {index}")
            self._optimizer._check_for_torch(group, name_of)
        return members

    def _end(self) -> None:
        """Lets go of what the plans keep alive during a step."""
        for plan in (self._plans or {}).values():
            plan.end()

    def _name_of(self, group: int, place: int) -> str:
        before = self._optimizer.param_groups[:group]
        position = place - sum(len(other["params"]) for other in before)
        return f"parameter {position} of param group {group}"

    def _ask_plans(self) -> tuple[bool, list[Tensor], list[Tensor]]:
        optimizer = self._optimizer
        rebuild, missing, foreign = False, [], []
        for plan in (self._plans or {}).values():
            attention = plan.begin(optimizer.param_groups, optimizer.state)
            if attention is not None:
                rebuild |= attention[0]
                missing += attention[1]
                foreign += attention[2]
        return rebuild, missing, foreign

    def _build(self, entries: list[Member]) -> None:
        optimizer = self._optimizer
        _refuse_while_capturing({member.param.device.type for member in entries})
        optimizer._check_capturable()
        self._built_over = _routing.identities(entries)
        self._holds_shards = any(_routing.is_shard(member.param) for member in entries)
        is_listed_twice = len({id(member.param) for member in entries}) != len(entries)
        # torch updates a parameter that is listed twice twice, and has warned about it.
        if is_listed_twice or optimizer._has_own_init_group():
            native: dict[torch.device, list[Member]] = {}
            self._shared_places = set()
        else:
            native = self._route(entries)
        served = {member.place for members in native.values() for member in members}
        self._torch_places = {member.place for member in entries} - served
        params = [member.param for members in native.values() for member in members]
        counters = self.counters.hand_out(params, optimizer.state)
        plans = {}
        for device, members in native.items():
            backend = backends.for_device(self.settings.backend, device)
            assert backend is not None
            slots = [(m.group, m.param, counters[m.param]) for m in members]
            plans[device] = backend.make_plan(
                optimizer._rule, device, slots, optimizer.param_groups, optimizer.state
            )
        self._plans = plans
        if len(plans) == 1 and not self._torch_places and not self._holds_shards:
            (self._only_plan,) = plans.values()

    def _route(self, members: list[Member]) -> dict[torch.device, list[Member]]:
        """Returns the parameters that native kernels update, by device."""
        optimizer = self._optimizer
        native = []
        for member in members:
            param = member.param
            name_of = functools.partial(self._name_of, member.group, member.place)
            entries = _routing.entries_of(optimizer.state, param, name_of)
            odd = _routing.not_plain(param)
            if odd is not None and self.settings.backend not in ("auto", "torch"):
                raise ValueError(
                    f"{name_of()} is {odd}, which"
                    f" backend={self.settings.backend!r} cannot read; use backend='auto' or 'torch'"
                )
            group = optimizer.param_groups[member.group]
            if (
                odd is None
                and not self._observed
                and not _routing.needs_torch_rule(param, group, entries)
                and backends.for_device(self.settings.backend, param.device) is not None
            ):
                native.append(member)
        shared = _routing.sharing_memory(
            (member.param, [tensor for _, tensor in self._own_tensors(member.param)])
            for member in native
        )
        self._shared_places = {member.place for member in native if member.param in shared}
        by_device = defaultdict(list)
        for member in native:
            if member.place not in self._shared_places:
                by_device[member.param.device].append(member)
        return dict(by_device)

    def _own_tensors(self, param: Tensor) -> list[tuple[str, Tensor]]:
        """Returns what a step writes for a parameter, by name; without its counter."""
        entries = self._optimizer.state.get(param, {})
        states = [
            (f"state {name!r}", value)
            for name, value in entries.items()
            if isinstance(value, Tensor) and name != "step"
        ]
        return [("the memory", param), *states]

    def _create_state(self, entries: list[Member], params: list[Tensor]) -> None:
        wanted = {id(param) for param in params}
        by_group = defaultdict(list)
        for member in entries:
            if id(member.param) in wanted:
                self._check_given(member)
                by_group[member.group].append(member.param)
        for index, members in by_group.items():
            try:
                # torch makes counters on the default device, which may be one without memory.
                with torch.device("cpu"):
                    self._optimizer._create_state(self._subgroup(index, members))
            except KeyError as error:
                (name,) = error.args
                raise KeyError(
                    f"the state of a parameter of param group {index} has no {name!r}; load a whole"
                    " checkpoint, or delete optimizer.state[parameter] to start it anew"
                ) from error

    def _check_given(self, member: Member) -> None:
        """Raises ValueError for what stands in a parameter's state and is no tensor."""
        entries = self._optimizer.state.get(member.param) or {}
        for name in self._optimizer._states:
            value = entries.get(name, member.param)
            # None is torch's word for a momentum that is yet to come.
            if isinstance(value, Tensor) or (value is None and not self._optimizer._has_step):
                continue
            raise ValueError(
                f"state {name!r} of {self._name_of(member.group, member.place)} is {value!r};"
                f" expected a tensor like the parameter, {describe(member.param)}. Load a matching"
                " checkpoint, or delete optimizer.state[parameter]"
            )

    def _step_together(self, foreign: list[Member], skip_nonfinite: bool) -> None:
        """Runs a step over several plans or with torch's rules, under one norm and skip flag."""
        plans = self._plans or {}
        grad_scale = self.settings.handed.get("grad_scale")
        found_inf = self.settings.handed.get("found_inf")
        limit = self.settings.max_grad_norm
        homes = (member.param.device for member in foreign if member.param.device.type != "meta")
        home = next(chain(plans, homes), torch.device("cpu"))
        reduces = bool(self.settings.reducing(self._optimizer.param_groups))
        is_plain = grad_scale is None and found_inf is None and not reduces
        unscale: Any = None if is_plain else _control.unscale_factor(grad_scale, home)
        # Torch's rules take numbers of the host: with them, a step may synchronise.
        factor = unscale.item() if foreign and grad_scale is not None else 1.0
        groups = self._subgroups(foreign)
        transforms = {
            param: GradTransform(param, group, factor)
            for _, group in groups
            for everything in [reduces or factor != 1.0 or _control.limits(group)]
            for param in group["params"]
            if everything or _grad(param).is_conj()
        }
        if is_plain:
            self.control = _control.nothing(home)
        else:
            totals = []
            if reduces:
                totals = [
                    _labelled("reduce", plan.reduce, unscale.to(device))
                    for device, plan in plans.items()
                ]
                totals += [transform.reduce(_grad(p)) for p, transform in transforms.items()]
            self.control = _control.settle(totals, unscale, found_inf, limit, skip_nonfinite)
        may_skip = found_inf is not None or skip_nonfinite
        if foreign and not (may_skip and self.control[_control.SKIP].item() != 0):
            clip = 1.0 if limit is None else self.control[_control.CLIP].item()
            shared = {id(m.param) for m in foreign if m.place in self._shared_places}
            for _, group in groups:
                self._apply_torch_rule(group, transforms, clip, shared)
        for device, plan in plans.items():
            _labelled(self._optimizer._rule, plan.apply, self.control.to(device))

    def _apply_torch_rule(
        self,
        group: dict[str, Any],
        transforms: dict[Tensor, GradTransform],
        clip: float,
        shared: set[int],
    ) -> None:
        """Lets torch update a group: whole, or one by one what shares memory or is transformed.

        No more than one gradient is copied at a time.
        """
        apply = self._optimizer._apply_torch_rule
        single = []
        if transforms or shared:
            single = [
                param
                for param in group["params"]
                if id(param) in shared
                or (param in transforms and not (clip == 1.0 and transforms[param].is_identity))
            ]
        alone = set(map(id, single))
        if whole := [param for param in group["params"] if id(param) not in alone]:
            apply({**group, "params": whole}, None)
        for param in single:
            grads = [transforms[param].apply(_grad(param), clip)] if param in transforms else None
            apply({**group, "params": [param]}, grads)

    def _subgroups(self, members: list[Member]) -> list[tuple[int, dict[str, Any]]]:
        """Returns the groups of these parameters, with no others, and their indices."""
        by_group = defaultdict(list)
        for index, _, param in members:
            by_group[index].append(param)
        return [(index, self._subgroup(index, params)) for index, params in by_group.items()]

    def _subgroup(self, index: int, params: list[Tensor]) -> dict[str, Any]:
        whole = self._optimizer.param_groups[index]
        # One by one: what a type of the user's own returns need not be what it holds.
        group = {**{name: whole[name] for name in whole}, "params": params}
        # What kernels leave to torch may share memory: one after another, as on the CPU. On a GPU
        # torch would by itself take them side by side, as it may what no kernel serves (DTensor).
        choice = self.settings.backend
        served = choice != "torch" and (
            choice != "auto" or backends.for_device(choice, params[0].device) is not None
        )
        if served and all(_routing.not_plain(param) is None for param in params):
            group["foreach"] = False
        return group


_CHANGED = (
    "param_groups or state change while a step is being prepared; do not write to them from another"
    " thread, and keep tensors under torch's names in optimizer.state"
)


def _labelled(name: str, run: Callable[..., Any], *args: Any) -> Any:
    """Calls ``run`` and, for a profiler that looks on, names what it does."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return run(*args)
    with torch.profiler.record_function(f"fusedopt::{name}"):
        return run(*args)


def _refuse_while_capturing(device_types: set[str]) -> None:
    """Raises RuntimeError under graph capture: state and tables are made outside of it."""
    # Not torch.accelerator.current_stream(), which in torch 2.11 cannot say it.
    graphs = device_types & {"cuda", "xpu"}
    if any(getattr(torch, kind).is_current_stream_capturing() for kind in graphs):
        raise RuntimeError(
            "step() is captured in a graph before its state and tables exist, or after the"
            " parameters or groups changed; run one warm-up step outside of the capture"
        )


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
