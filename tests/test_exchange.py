"""Checkpoints go between torch's classes and ours by every road that torch has, both ways.

torch.save, pickle, and torch.distributed.checkpoint in one process: the state dict of the optimizer
as a whole and flattened, and files through the planner that insists on every key.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import (
    ENTRIES,
    TABLE,
    Run,
    assert_close,
    assert_same_bits,
    make_missing_state,
    random,
    richest,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

OURS = pytest.mark.parametrize("entry", **ENTRIES)
DIRECTIONS = ("stock-stock", "stock-ours", "ours-stock", "ours-ours")


class Training:
    """A small model, its optimizer, and seeded gradients."""

    def __init__(self, kind: type, **options) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
        first, second = self.model
        groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.5}]
        self.optimizer = kind(groups, **options)

    def steps(self, *seeds: int) -> Training:
        """Steps with the gradients of the seeds."""
        for seed in seeds:
            for i, param in enumerate(self.model.parameters()):
                param.grad = random(param.shape, 10 * seed + i)
            make_missing_state(self.optimizer)
            self.optimizer.step()
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns parameters and state by name."""
        return Run(list(self.model.parameters()), self.optimizer).tensors()


def plainly(source: Training, target: Training, road: str, folder: str) -> None:
    """Loads what state_dict returned, through a file or through pickle."""
    checkpoint = source.optimizer.state_dict()
    if road == "pickle":
        checkpoint = pickle.loads(pickle.dumps(checkpoint))
    else:
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoint = torch.load(file, weights_only=road == "weights_only")
    target.optimizer.load_state_dict(checkpoint)


def distributed(source: Training, target: Training, road: str, folder: str) -> None:
    """Loads what torch.distributed.checkpoint makes of it."""
    options = StateDictOptions(
        flatten_optimizer_state_dict="flat" in road, full_state_dict="full" in road
    )

    def collect(training: Training) -> dict:
        return get_optimizer_state_dict(training.model, training.optimizer, options=options)

    checkpoint = copy.deepcopy(collect(source))  # It holds the tensors themselves.
    if "files" in road:
        dcp.save({"optimizer": checkpoint}, checkpoint_id=folder, no_dist=True)
        loaded = {"optimizer": collect(target)}
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        checkpoint = loaded["optimizer"]
    set_optimizer_state_dict(target.model, target.optimizer, checkpoint, options=options)


ROADS = {
    **dict.fromkeys(("save", "weights_only", "pickle"), plainly),
    **dict.fromkeys(("nested", "flat", "full", "files", "files_flat"), distributed),
}


def make(entry, which: str, **extras) -> Training:
    """Returns a training with torch's optimizer or with ours."""
    options = richest(entry)
    if which == "stock":
        return Training(entry.stock, **entry.serial, **options)
    return Training(entry.fused, **options, **extras)


@OURS
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("road", ROADS)
def test_training_goes_on(entry, direction, road, tmp_path):
    """As without the interruption; and what state_dict returns has torch's keys, no more."""
    source_kind, target_kind = direction.split("-")
    source = make(entry, source_kind).steps(1, 2)
    target = make(entry, target_kind)
    target.model.load_state_dict(source.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ROADS[road](source, target, road, str(tmp_path))
    straight = make(entry, "stock").steps(1, 2, 3)
    assert_close(target.steps(3).tensors(), straight.tensors(), 2.0)
    ours, stock = target.optimizer.state_dict(), straight.optimizer.state_dict()
    assert [g.keys() for g in ours["param_groups"]] == [g.keys() for g in stock["param_groups"]]
    for key, entries in ours["state"].items():
        assert entries.keys() == {k for k, v in stock["state"][key].items() if v is not None}


@OURS
@pytest.mark.parametrize("road", ROADS)
def test_our_keys_stay(entry, road, tmp_path):
    """Those of the checkpoint where it has them, else the live group's; the bits go on."""
    source = make(entry, "ours").steps(1, 2)
    target = make(entry, "ours", max_grad_norm=1.0)
    for training in (source, target):
        training.optimizer.param_groups[1]["max_grad_value"] = 0.25
    target.optimizer.param_groups[0]["max_grad_norm_per_param"] = 0.5
    target.model.load_state_dict(source.model.state_dict())
    if "files" in road or "flat" in road:
        # Torch itself refuses a checkpoint that lacks a key then.
        source.optimizer.param_groups[0]["max_grad_norm_per_param"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ROADS[road](source, target, road, str(tmp_path))
    first, second = target.optimizer.param_groups
    assert first["max_grad_norm_per_param"] == 0.5
    assert second["max_grad_value"] == 0.25
    assert "max_grad_value" not in first
    assert target.optimizer.max_grad_norm == 1.0
    source.optimizer.max_grad_norm = 1.0
    first_of_source = source.optimizer.param_groups[0]
    first_of_source["max_grad_norm_per_param"] = 0.5
    assert_same_bits(target.steps(3).tensors(), source.steps(3).tensors())


def test_missing_keys_of_torch_are_torchs_business():
    """An old checkpoint gets its defaults, not the live values; Adam's decay flag is torch's."""
    options = {"maximize": True, "decoupled_weight_decay": True}
    trainings = [Training(TABLE["Adam"].stock, **options), Training(TABLE["Adam"].fused, **options)]
    for training in trainings:
        checkpoint = copy.deepcopy(training.steps(1).optimizer.state_dict())
        for group in checkpoint["param_groups"]:
            for name in ("maximize", "foreach", "capturable", "fused", *options):
                group.pop(name, None)
        training.optimizer.load_state_dict(checkpoint)
    stock, ours = (training.optimizer.param_groups for training in trainings)
    assert [{**g, "params": 0} for g in ours] == [{**g, "params": 0} for g in stock]
    assert ours[0]["maximize"] is False


def test_a_checkpoint_of_the_older_version():
    """Its groups carry every key of ours, None where it was not set, and that is what it means."""
    training = make(TABLE["SGD"], "ours", max_grad_value=2.0).steps(1)
    checkpoint = training.optimizer.state_dict()
    checkpoint["param_groups"][0].update(
        max_grad_value=None, max_grad_norm_per_param=None, decoupled_weight_decay=False
    )
    training.optimizer.load_state_dict(checkpoint)
    first, second = training.optimizer.param_groups
    assert [first[name] for name in ("max_grad_value", "max_grad_norm_per_param")] == [None, None]
    assert second["max_grad_value"] == 2.0
    training.steps(2)


@OURS
def test_pickles_of_older_versions(entry):
    """Settings under their older names, and groups and defaults with every key of ours."""
    ours = {"max_grad_norm_per_param": None, "max_grad_value": None}
    training = make(entry, "ours").steps(1)
    state = training.optimizer.__getstate__()
    for name in ("max_grad_norm", "skip_nonfinite", "backend", "fused"):
        del state[name]
    state |= {"_max_grad_norm": 3.0, "_backend": "torch", "skip_nonfinite": True}
    state["defaults"] = {**state["defaults"], **ours}
    for group in state["param_groups"]:
        group.update(ours)
    loaded = object.__new__(entry.fused)
    loaded.__setstate__(state)
    assert (loaded.max_grad_norm, loaded.backend, loaded.skip_nonfinite) == (3.0, "torch", True)
    training.optimizer = loaded
    training.steps(2)


@OURS
@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_setstate_with_the_state_alone_resets_it(entry, kind):
    """As some do to begin anew; groups and settings stay."""
    extras = {"max_grad_norm": 0.5} if kind == "fused" else {}
    training = Training(getattr(entry, kind), **richest(entry), **extras).steps(1, 2)
    fresh = Training(getattr(entry, kind), **richest(entry), **extras)
    fresh.model.load_state_dict(training.model.state_dict())
    training.optimizer.__setstate__({"state": defaultdict(dict)})
    if extras:
        assert training.optimizer.max_grad_norm == 0.5
    assert_same_bits(training.steps(3).tensors(), fresh.steps(3).tensors())
