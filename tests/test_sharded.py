"""Parameters of which a process holds a shard: a norm over them is refused, never silently local.

One process with a group of its own stands for many: what marks a shard is the same.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import ENTRIES, TABLE, assert_close, random
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import fusedopt

OURS = pytest.mark.parametrize("entry", **ENTRIES)
OPTIONS = {
    "max_grad_norm": {"max_grad_norm": 1.0},
    "max_grad_norm_per_param": {"max_grad_norm_per_param": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """One process that talks to itself."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flat(original: bool):
    """Returns what makes FSDP1's parameters: flat ones, or the originals as views of them."""

    def shard(model: torch.nn.Module) -> torch.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(
                model, use_orig_params=original, device_id=torch.device("cpu")
            )

    return shard


def dtensors(model: torch.nn.Module) -> torch.nn.Module:
    """Makes the parameters DTensors, as FSDP2 does."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


KINDS = {"flat": flat(False), "original": flat(True), "DTensor": dtensors}
SHARDED = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Returns a sharded model with gradients, and its parameters."""
    torch.manual_seed(0)
    model = KINDS[kind](torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    model(random((5, 4), 1)).square().sum().backward()
    return model, list(model.parameters())


@SHARDED
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_refused_by_name(kind, options):
    """Only what was set is named, with what to do; nothing has been changed."""
    _, params = trained(kind)
    before = [param.detach().clone() for param in params]
    optimizer = fusedopt.AdamW(params, **options)
    for _ in range(2):
        with pytest.raises(NotImplementedError) as caught:
            optimizer.step()
    text = str(caught.value)
    assert set(re.findall("max_grad_norm_per_param|max_grad_norm|skip_nonfinite", text)) == set(
        options
    )
    assert "GradScaler" not in text
    assert f"leave {next(iter(options))} unset" in text
    clip = "torch.nn.utils.clip_grad_norm_" if kind == "DTensor" else "FSDP.clip_grad_norm_"
    assert (clip in text) == ("skip_nonfinite" not in options)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@SHARDED
def test_our_scaler_names_torchs(kind):
    """The text is about the scaler, for no option was set; torch's scaler does."""
    _, params = trained(kind)
    optimizer = fusedopt.AdamW(params)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    instead = "torch.amp.GradScaler" if kind == "DTensor" else "ShardedGradScaler"
    with pytest.raises(NotImplementedError) as caught:
        scaler.step(optimizer)
    text = str(caught.value)
    assert f"use {instead}" in text
    assert not set(OPTIONS) & set(re.findall(r"\w+", text))
    theirs = torch.amp.GradScaler("cpu", init_scale=1.0)
    theirs.scale(torch.ones(()))
    theirs.step(optimizer)
    theirs.update()


@SHARDED
@OURS
def test_without_a_norm_they_are_updated(entry, kind):
    """As by torch, also element-wise limited."""
    finished = []
    for make in (entry.stock, entry.fused):
        _, params = trained(kind)
        optimizer = make(params, lr=0.1)
        for param in params:
            if make is entry.stock:
                param.grad.clamp_(-0.5, 0.5)
        if make is entry.fused:
            optimizer.param_groups[0]["max_grad_value"] = 0.5
        step_as_torch(optimizer, make is entry.stock)
        values = (getattr(p, "full_tensor", p.detach)().detach().clone() for p in params)
        finished.append({str(i): value for i, value in enumerate(values)})
    assert_close(*finished)


def step_as_torch(optimizer, is_stock) -> None:
    """Takes a step; what torch's own class cannot do with shards is left out."""
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        if not is_stock:
            raise
        pytest.skip(f"torch's class refuses: {str(error).splitlines()[0][:80]}")


@OURS
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
def test_dtensors_cost_what_they_cost_torch(entry, options):
    """The same operations, whole groups at once."""
    if "foreach" in options and not entry.takes("foreach"):
        pytest.skip("the plain class has no such form")
    counts = []
    for make in (entry.stock, entry.fused):
        _, params = trained("DTensor")
        # Where torch has no fused form for DTensors, we do as without it.
        lacks = make is entry.stock and "fused" in options and not entry.rule.fuses_subclasses
        optimizer = make(params, **({} if lacks else options))
        step_as_torch(optimizer, make is entry.stock)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        counts.append(sum(e.count for e in profile.key_averages() if e.key.startswith("aten::")))
    # Ours notes what the step left, with a handful of operations.
    assert counts[1] <= counts[0] + 12


def test_zero_redundancy_optimizer():
    """Its arguments end in groups; the error says why and gives no advice that would be local."""
    params = [torch.nn.Parameter(torch.ones(3))]
    for options in OPTIONS.values():
        if "max_grad_norm_per_param" in options:
            continue
        with pytest.raises(ValueError) as caught:
            ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.AdamW, **options)
        (name,) = options
        text = str(caught.value)
        assert text.startswith(f"{name} is {options[name]!r}")
        assert "ZeroRedundancyOptimizer, cannot have it" in text
    zero = ZeroRedundancyOptimizer(
        params, optimizer_class=fusedopt.AdamW, max_grad_norm_per_param=0.5
    )
    params[0].grad = torch.ones(3)
    zero.step()
    assert not bool((params[0] == 1).any())
    assert TABLE["AdamW"].fused is type(zero.optim)
