"""What people do to an optimizer between two steps; each event does it to every side."""

from __future__ import annotations

from . import checkpoints, members, settings, states

#: How often each comes, beside steps.
WEIGHTS = {
    settings.hyperparameter: 3.0,
    settings.fill_lr: 1.0,
    settings.write_betas: 0.3,
    settings.group_setting: 2.0,
    settings.setting: 1.0,
    settings.other_backend: 0.5,
    states.replace_state: 1.0,
    states.write_state: 0.5,
    states.move_state: 1.0,
    states.state_dtype: 0.7,
    states.counter: 1.0,
    states.new_entries: 0.7,
    states.drop_state: 0.7,
    members.add_group: 0.7,
    members.append_param: 0.7,
    members.remove_param: 0.7,
    members.prune: 1.0,
    members.reorder: 0.5,
    members.regroup: 0.7,
    members.move_data: 1.0,
    members.data_dtype: 0.5,
    members.zero_grad: 0.5,
    members.hooks: 0.3,
    checkpoints.reload: 2.0,
    checkpoints.duplicate: 1.0,
    checkpoints.remember: 0.5,
    checkpoints.restore: 0.5,
}
