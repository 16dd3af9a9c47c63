"""GiGPO: A_ep gets a step-relative part, among the steps of a task that start from the same observation.

Paper: GiGPO, arXiv 2505.10978, eq. 5-7; both authors' releases: gigpo/core_gigpo.py,
compute_step_discounted_returns and step_norm_reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advantage import outcome_advantage
from baselines.method import Grpo
from data import Trajectory


class Gigpo(Grpo):
    def outcome(self, outcome: Tensor, trajectories: list[Trajectory]) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        steps = [(trajectory, t, step) for trajectory in trajectories for t, step in enumerate(trajectory.steps)]
        groups = torch.tensor([trajectory.group for trajectory, _, _ in steps])  # (B,)
        states = state_groups(groups, [step.observation for _, _, step in steps])  # (B,)
        relative = step_relative_advantage(
            rewards=torch.tensor([config.success_reward * trajectory.success for trajectory, _, _ in steps]),
            penalties=torch.tensor([config.invalid_penalty * (not step.valid) for _, _, step in steps]),
            steps_left=torch.tensor([len(trajectory.steps) - 1 - t for trajectory, t, _ in steps]),
            state_ids=states,
            gamma=config.gamma,
            normalize=config.normalize,
        )  # (B,)
        metrics = {"advantage/state_group_size": max(1, len(states)) / max(1, len(states.unique()))}
        return outcome + config.state_weight * relative, metrics


def state_groups(group_ids: Tensor, observations: list[str]) -> Tensor:
    """Number the steps' state groups: steps of one task that start from the same observation. (B,) and B -> (B,)"""
    numbers: dict[tuple, int] = {}
    keys = zip(group_ids.tolist(), observations, strict=True)
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def step_relative_advantage(
    rewards: Tensor,  # (B,) R(tau) of the step's trajectory, which is paid at its last step
    penalties: Tensor,  # (B,) the step's own
    steps_left: Tensor,  # (B,) steps that follow in the trajectory; 0 at its last one
    state_ids: Tensor,  # (B,) of state_groups
    *,
    gamma: float,
    normalize: str,
) -> Tensor:
    """GiGPO's second part: (G - mean) / (std + eps) over a state group, G = gamma^steps_left R(tau) - penalty. -> (B,)

    With normalize="mean" the std is left out. A step alone in its group has nothing to be relative to, hence 0 (an
    outcome group of one is another matter).
    """
    returns = rewards * gamma**steps_left - penalties  # (B,)
    _, group, sizes = state_ids.unique(return_inverse=True, return_counts=True)  # (groups,), (B,), (groups,)
    advantages = outcome_advantage(returns, state_ids, torch.arange(len(returns)), normalize=normalize)
    return torch.where(sizes[group] > 1, advantages, torch.zeros_like(advantages))
