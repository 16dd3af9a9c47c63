"""Step-relative advantages in hand-computed numbers."""

from types import SimpleNamespace

import torch

from data import Batch, Step, Trajectory
from variants.gigpo import Settings, advantages, state_groups, step_relative_advantage


def test_state_groups_are_of_one_task():
    assert state_groups(torch.tensor([0, 0, 1, 0]), ["hall", "bed", "hall", "hall"]).tolist() == [0, 1, 2, 0]


def test_step_relative_advantage_by_hand():
    # Two rollouts start in the hall: one wins 10 after 2 more steps, one loses. G = 0.5^2 * 10 = 2.5, and 0 - 1 = -1
    # (an invalid action): mean 0.75, sample std 3.5 / sqrt(2). The step alone in its state has nothing to compare.
    returns, states = torch.tensor([2.5, 5, 10, -1]), torch.tensor([0, 1, 2, 0])
    assert step_relative_advantage(returns, states, "mean").tolist() == [1.75, 0, 0, -1.75]
    both = step_relative_advantage(returns, states, "mean_std")
    assert torch.allclose(both, torch.tensor([0.707107, 0, 0, -0.707107]), atol=1e-5)


def played(success: bool, *observations: str, slip: bool = False) -> Trajectory:
    """A trajectory; with `slip` its first action is invalid."""
    steps = [Step((), o, [1], [2], "", "", not (slip and t == 0)) for t, o in enumerate(observations)]
    return Trajectory("task", 0, steps, success)


def test_gigpo_adds_the_step_relative_part_to_the_outcome():
    trajectories = [played(True, "hall", "bed"), played(False, "hall", "desk", slip=True)]
    config = Settings(algo="gigpo", normalize="mean", gamma=0.5, state_weight=2.0, invalid_penalty=1.0)
    run = SimpleNamespace(config=config, metrics={})
    got = advantages(run, Batch(trajectories, [None] * 2, [[(), ()]] * 2, {}, torch.zeros(4, 1), None, {}))
    # A_ep: returns 10 10 -1 0, mean 4.75; G in the hall: 5 and -1, mean 2
    assert got.outcome.tolist() == [5.25 + 2 * 3, 5.25, -5.75 - 2 * 3, -4.75]
    assert got.total[:, 0].tolist() == got.outcome.tolist() and got.skill.isnan().all()
    assert run.metrics == {"advantage/state_group_size": 4 / 3}


def test_a_win_further_off_is_worth_less():
    """The returns of `test_step_relative_advantage_by_hand`, from their trajectories; A_ep: 10 10 10 -1, mean 7.25."""
    trajectories = [played(True, "hall", "bed", "sofa"), played(False, "hall", slip=True)]
    config = Settings(algo="gigpo", normalize="mean", gamma=0.5, invalid_penalty=1.0)
    batch = Batch(trajectories, [None] * 2, [[()] * 3, [()]], {}, torch.zeros(4, 1), None, {})
    got = advantages(SimpleNamespace(config=config, metrics={}), batch)
    assert got.outcome.tolist() == [2.75 + 1.75, 2.75, 2.75, -8.25 - 1.75]
