"""One optimizer's step: validate everything, reduce, settle the step control, apply.

The pipeline owns the plans of the native backends and knows which parameters take the plain rule.
It is built anew whenever the structure of the optimizer changes, and is no part of a pickle or
checkpoint.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _control, _routing, backends
from ._control import describe
from ._counters import StepCounters
from ._routing import Member
from ._settings import Settings
from ._together import Together, labelled
from .backends.interface import Findings, Plan, Slot
from .plain import checks
from .plain.rule import PlainRule, Training


class Pipeline:
    """The step of one optimizer over all its plans.

    Between steps it keeps no parameter, gradient or state alive: whoever drops one frees it.

    Args:
        rule: The algorithm.
    """

    def __init__(self, rule: PlainRule) -> None:
        self._rule = rule
        # Steps from several threads follow one another.
        self._lock = threading.RLock()
        self._stepping = False
        self._plans: dict[torch.device, Plan] | None = None
        # The plan of all parameters, where there is just one and nothing else to ask.
        self._only_plan: Plan | None = None
        # Of every parameter when the plans were made: group, id and type.
        self._built_over: list[tuple[int, int, type]] = []
        # The places of those for the plain rule.
        self._plain_places: set[int] = set()
        # The places of those of them that share memory with others.
        self._shared_places: set[int] = set()
        # Whether a dispatch mode sees to every operation, or forward-mode differentiation, which
        # kernels would hide from it.
        self._observed = False
        # Whether the optimizer has its own way of collecting gradients and states.
        self._collects_itself = False
        self._holds_shards = False
        self.settings = Settings()
        self.counters = StepCounters(rule)
        #: float64[5] in the order of ``StepControl``: what the last step left; None before the
        #: first.
        self.control: Tensor | None = None
        #: Whether the last step had a limit of the global norm, and so knows it.
        self.measured = False

    def reset(self) -> None:
        """Makes the next step build its plans anew."""
        self._plans = self._only_plan = None

    def step(self, training: Training) -> None:
        """Runs one step; raises before anything is changed when something does not fit."""
        with self._lock:
            if self._stepping:
                raise RuntimeError(
                    "step() was called inside of a step() of the same optimizer, by a number or"
                    " tensor of the caller's own type; call it before or after"
                )
            self._stepping = True
            try:
                self._step(training)
            finally:
                self._stepping = False

    def _notice(self, training: Training) -> None:
        """Notices what keeps kernels from a step, whatever the parameters are."""
        observed = torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
        if observed:
            _routing.refuse_fake_mode(
                member.param for member in _routing.members_of(training.param_groups)
            )
        collects_itself = training.init_group is not None
        if observed != self._observed or collects_itself != self._collects_itself:
            self._observed, self._collects_itself = observed, collects_itself
            self.reset()

    def _step(self, training: Training) -> None:
        self._notice(training)
        plan = self._only_plan
        if plan is not None:
            findings = self._step_alone(plan, training)
            if findings is None:
                return
            if findings[0]:
                self.reset()
        try:
            plain = self._begin(training)
            groups = training.param_groups
            if self._holds_shards and (wanted := self.settings.reducing(groups)):
                params = [member.param for member in _routing.members_of(groups)]
                raise NotImplementedError(_routing.refusal(params, wanted))
            if self._only_plan is None or plain:
                self._step_together(plain, training)
                return
        finally:
            self._end()
        if self._step_alone(self._only_plan, training) is not None:
            raise RuntimeError(_CHANGED)

    def _step_alone(self, plan: Plan, training: Training) -> Findings | None:
        """Runs a step that one plan does alone, unless the plan finds something against it."""
        settings = self.settings
        findings = labelled(
            self._rule.kernel,
            plan.step,
            training.param_groups,
            training.state,
            settings.handed.get("grad_scale"),
            settings.handed.get("found_inf"),
            settings.max_grad_norm,
            settings.skips,
        )
        if findings is None:
            self.control = plan.control
            self.measured = settings.max_grad_norm is not None
        return findings

    def _step_together(self, plain: list[Member], training: Training) -> None:
        self.measured = self.settings.max_grad_norm is not None
        self.control = Together(
            self._rule,
            training,
            self.settings,
            self._plans or {},
            [group for _, group in self._subgroups(plain, training)],
            {id(member.param) for member in plain if member.place in self._shared_places},
            self.counters,
        ).step()

    def backend_of(self, param: Tensor, training: Training) -> str:
        """Returns the name of the backend that updates ``param``."""
        with self._lock:
            members = _routing.members_of(training.param_groups)
            place = next((member.place for member in members if member.param is param), None)
            if place is None:
                raise ValueError(
                    f"param is {describe(param)}, which is not in param_groups; expected one of"
                    " this optimizer's parameters: add_param_group takes more"
                )
            self._notice(training)
            try:
                plain = {member.place for member in self._begin(training)}
            finally:
                self._end()
            if place in plain | self._plain_places:
                return "torch"
            backend = backends.for_device(self.settings.backend, param.device)
            assert backend is not None
            return backend.NAME

    def _begin(self, training: Training) -> list[Member]:
        """Brings the plans to the beginning of this step; returns what takes the plain rule."""
        if not isinstance(training.state, dict):
            raise TypeError(
                f"optimizer.state is {training.state!r}; expected a dict. Start over with"
                " optimizer.state = collections.defaultdict(dict)"
            )
        # A first look may find a plan outdated, a second state missing.
        for _ in range(3):
            entries = _routing.members_of(training.param_groups)
            # Every plan looks at all groups, but there may be none.
            if self._plain_places or not self._plans:
                if _routing.identities(entries) != self._built_over:
                    self.reset()
            if self._plans is None:
                self._build(entries, training)
            rebuild, missing, refused = self._ask_plans(training)
            if not rebuild and not missing:
                break
            self._end()
            if missing:
                self._create_state(entries, missing, training)
            self.reset()
        else:
            raise RuntimeError(_CHANGED)
        left = {id(param) for param in refused}
        members = [
            member
            for member in entries
            if id(member.param) in left
            or self._collects_itself
            or (member.place in self._plain_places and member.param.grad is not None)
        ]
        try:
            self._check_plain(members, training)
        except BaseException:
            # What is refused now need not take the plain rule in the next step.
            self._end()
            self.reset()
            raise
        return members

    def _check_plain(self, members: list[Member], training: Training) -> None:
        def name_of(param: Tensor) -> str:
            return next(_name_of(m, training) for m in members if m.param is param)

        for index, group in self._subgroups(members, training):
            for name in ("max_grad_norm_per_param", "max_grad_value"):
                _control.check_limit(name, group.get(name), f"in param group {index}")
            if not self._collects_itself:
                checks.check(self._rule, training, group, name_of)

    def _end(self) -> None:
        """Lets go of what the plans keep alive during a step."""
        for plan in (self._plans or {}).values():
            plan.end()

    def _ask_plans(self, training: Training) -> Findings:
        rebuild, missing, refused = False, [], []
        for plan in (self._plans or {}).values():
            findings = plan.begin(training.param_groups, training.state)
            if findings is not None:
                rebuild |= findings[0]
                missing += findings[1]
                refused += findings[2]
        return rebuild, missing, refused

    def _build(self, entries: list[Member], training: Training) -> None:
        _refuse_while_capturing({member.param.device.type for member in entries})
        self._rule.check_capturable(training.param_groups)
        self._built_over = _routing.identities(entries)
        self._holds_shards = any(_routing.is_shard(member.param) for member in entries)
        is_listed_twice = len({id(member.param) for member in entries}) != len(entries)
        # torch updates a parameter that is listed twice twice, and has warned about it.
        if is_listed_twice or self._collects_itself:
            native: dict[torch.device, list[Member]] = {}
            self._shared_places = set()
        else:
            native = self._route(entries, training)
        served = {member.place for members in native.values() for member in members}
        self._plain_places = {member.place for member in entries} - served
        params = [member.param for members in native.values() for member in members]
        counters = self.counters.hand_out(params, training.state)
        plans = {}
        for device, members in native.items():
            backend = backends.for_device(self.settings.backend, device)
            assert backend is not None
            slots: list[Slot] = [(m.group, m.param, counters[m.param]) for m in members]
            plans[device] = backend.make_plan(
                self._rule.kernel, device, slots, training.param_groups, training.state
            )
        self._plans = plans
        if len(plans) == 1 and not self._plain_places and not self._holds_shards:
            (self._only_plan,) = plans.values()

    def _route(self, members: list[Member], training: Training) -> dict[torch.device, list[Member]]:
        """Returns the parameters that native kernels update, by device."""
        native = []
        for member in members:
            param = member.param
            name_of = functools.partial(_name_of, member, training)
            entries = _routing.entries_of(training.state, param, name_of)
            odd = _routing.not_plain(param)
            if odd is not None and self.settings.backend not in ("auto", "torch"):
                raise ValueError(
                    f"{name_of()} is {odd}, which"
                    f" backend={self.settings.backend!r} cannot read; use backend='auto' or 'torch'"
                )
            group = training.param_groups[member.group]
            if (
                odd is None
                and not self._observed
                and not _routing.needs_plain_rule(param, group, entries, self._rule.counted)
                and backends.for_device(self.settings.backend, param.device) is not None
            ):
                native.append(member)
        shared = _routing.sharing_memory(
            (member.param, self._written(member.param, training.state)) for member in native
        )
        self._shared_places = {member.place for member in native if member.param in shared}
        by_device = defaultdict(list)
        for member in native:
            if member.place not in self._shared_places:
                by_device[member.param.device].append(member)
        return dict(by_device)

    def _written(self, param: Tensor, state: Any) -> list[Tensor]:
        """Returns what a step writes for a parameter, besides its counter and scalars."""
        counted = self._rule.counted
        return [param] + [
            value
            for name, value in state.get(param, {}).items()
            if isinstance(value, Tensor) and name not in counted
        ]

    def _create_state(
        self, entries: list[Member], params: list[Tensor], training: Training
    ) -> None:
        wanted = {id(param) for param in params}
        members = [member for member in entries if id(member.param) in wanted]
        for member in members:
            self._check_given(member, training)
        if self._rule.starts_unset:
            self.counters.create_unset(params, training.state)
            return
        for index, group in self._subgroups(members, training):
            try:
                # torch makes counters on the default device, which may be one without memory.
                with torch.device("cpu"):
                    self._rule.collect(group, training.state, training.defaults)
            except KeyError as error:
                (name,) = error.args
                raise KeyError(
                    f"the state of a parameter of param group {index} has no {name!r}; load a whole"
                    " checkpoint, or delete optimizer.state[parameter] to start it anew"
                ) from error

    def _check_given(self, member: Member, training: Training) -> None:
        """Raises ValueError for what stands in a parameter's state and is no tensor."""
        entries = training.state.get(member.param) or {}
        for name in self._rule.states:
            value = entries.get(name, member.param)
            # None is torch's word for a momentum that is yet to come.
            if isinstance(value, Tensor) or (value is None and name == self._rule.starts_unset):
                continue
            raise ValueError(
                f"state {name!r} of {_name_of(member, training)} is {value!r};"
                f" expected a tensor like the parameter, {describe(member.param)}. Load a matching"
                " checkpoint, or delete optimizer.state[parameter]"
            )

    def _subgroups(
        self, members: list[Member], training: Training
    ) -> list[tuple[int, dict[str, Any]]]:
        """Returns the groups of these parameters, with no others, and their indices."""
        by_group = defaultdict(list)
        for index, _, param in members:
            by_group[index].append(param)
        groups = []
        for index, params in by_group.items():
            if self._collects_itself:
                groups.append((index, training.param_groups[index]))
                continue
            whole = training.param_groups[index]
            # One by one: what a type of the user's own returns need not be what it holds.
            group = {**{name: whole[name] for name in whole}, "params": params}
            # What kernels leave to torch may share memory: one after another, as on the CPU. On a
            # GPU torch would by itself take them side by side, as it may what no kernel serves.
            choice = self.settings.backend
            served = choice != "torch" and (
                choice != "auto" or backends.for_device(choice, params[0].device) is not None
            )
            if served and all(_routing.not_plain(param) is None for param in params):
                group["foreach"] = False
            groups.append((index, group))
        return groups


_CHANGED = (
    "param_groups or state change while a step is being prepared; do not write to them from another"
    " thread, and keep tensors under torch's names in optimizer.state"
)


def _name_of(member: Member, training: Training) -> str:
    before = training.param_groups[: member.group]
    position = member.place - sum(len(other["params"]) for other in before)
    return f"parameter {position} of param group {member.group}"


def _refuse_while_capturing(device_types: set[str]) -> None:
    """Raises RuntimeError under graph capture: state and tables are made outside of it."""
    # Not torch.accelerator.current_stream(), which in torch 2.11 cannot say it.
    graphs = device_types & {"cuda", "xpu"}
    if any(getattr(torch, kind).is_current_stream_capturing() for kind in graphs):
        raise RuntimeError(
            "step() is captured in a graph before its state and tables exist, or after the"
            " parameters or groups changed; run one warm-up step outside of the capture"
        )
