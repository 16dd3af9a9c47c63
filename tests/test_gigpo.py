"""Step-relative advantages in hand-computed numbers."""

import torch

from baselines.gigpo import Gigpo, state_groups, step_relative_advantage
from config import Config
from data import Step, Trajectory


def test_state_groups_are_of_one_task():
    assert state_groups(torch.tensor([0, 0, 1, 0]), ["hall", "bed", "hall", "hall"]).tolist() == [0, 1, 2, 0]


def test_step_relative_advantage_by_hand():
    # Two rollouts start in the hall: one wins 10 after 2 more steps, one loses. G = 0.5^2 * 10 = 2.5, and 0 - 1 = -1
    # (an invalid action): mean 0.75, sample std 3.5 / sqrt(2). The step alone in its state has nothing to compare.
    rewards, penalties = torch.tensor([10.0, 10, 10, 0]), torch.tensor([0.0, 0, 0, 1])
    left, states = torch.tensor([2, 1, 0, 0]), torch.tensor([0, 1, 2, 0])
    mean = step_relative_advantage(rewards, penalties, left, states, gamma=0.5, normalize="mean")
    assert mean.tolist() == [1.75, 0, 0, -1.75]
    both = step_relative_advantage(rewards, penalties, left, states, gamma=0.5, normalize="mean_std")
    assert torch.allclose(both, torch.tensor([0.707107, 0, 0, -0.707107]), atol=1e-5)


def played(success: bool, *observations: str, slip: bool = False) -> Trajectory:
    """A trajectory; with `slip` its first action is invalid."""
    steps = [Step((), o, [1], [2], "", "", not (slip and t == 0)) for t, o in enumerate(observations)]
    return Trajectory("task", 0, steps, success)


def test_gigpo_adds_the_step_relative_part_to_the_outcome():
    trajectories = [played(True, "hall", "bed"), played(False, "hall", "desk", slip=True)]
    config = Config(algo="gigpo", normalize="mean", gamma=0.5, state_weight=2.0, invalid_penalty=1.0)
    outcome = torch.tensor([5.25, 5.25, -5.75, -4.75])  # returns 10 10 -1 0, mean 4.75
    both, metrics = Gigpo(config).outcome(outcome, trajectories)
    assert both.tolist() == [5.25 + 2 * 3, 5.25, -5.75 - 2 * 3, -4.75]  # G in the hall: 5 and -1, mean 2
    assert metrics == {"advantage/state_group_size": 4 / 3}
