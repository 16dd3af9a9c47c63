"""GiGPO: A_ep gets a step-relative part, among the steps of a task that start from the same observation. No skills.

Paper: GiGPO, arXiv 2505.10978, eq. 5-7; both authors' releases: gigpo/core_gigpo.py,
compute_step_discounted_returns and step_norm_reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advantage import combine, outcome_advantage, sum_of_scored
from config import OWN
from data import Advantages, Batch
from runlog.start import Run
from train import OPID, outcomes
from variants.grpo import Settings as GrpoSettings


@dataclass
class Settings(GrpoSettings):
    state_weight: float = OWN(1.0, "weight of the step-relative advantage", bounds=(0, None))
    gamma: float = OWN(0.95, "discount per step of the return that state groups compare", bounds=(0, 1))


def advantages(run: Run[Settings], batch: Batch) -> Advantages:
    config = run.config
    steps = [(trajectory, t, step) for trajectory in batch.trajectories for t, step in enumerate(trajectory.steps)]
    groups = torch.tensor([trajectory.group for trajectory, _, _ in steps])  # (B,)
    states = state_groups(groups, [step.observation for _, _, step in steps])  # (B,)
    rewards = torch.tensor([config.success_reward * trajectory.success for trajectory, _, _ in steps])  # (B,)
    penalties = torch.tensor([config.invalid_penalty * (not step.valid) for _, _, step in steps])  # (B,)
    steps_left = torch.tensor([len(trajectory.steps) - 1 - t for trajectory, t, _ in steps])  # (B,)

    # G = gamma^steps_left R(tau) - penalty;  A = A_ep + w (G - mean) / (std + eps) over its state group
    returns = rewards * config.gamma**steps_left - penalties  # (B,)
    relative = step_relative_advantage(returns, states, config.normalize)  # (B,)
    outcome = outcomes(config, batch.trajectories) + config.state_weight * relative  # (B,)

    run.metrics["advantage/state_group_size"] = max(1, len(states)) / max(1, len(states.unique()))
    return Advantages(combine(outcome, {}, {}, batch.mask), outcome, sum_of_scored({}, {}, batch.mask))


def state_groups(group_ids: Tensor, observations: list[str]) -> Tensor:
    """Number the steps' state groups: steps of one task that start from the same observation. (B,) and B -> (B,)"""
    numbers: dict[tuple, int] = {}
    keys = zip(group_ids.tolist(), observations, strict=True)
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def step_relative_advantage(returns: Tensor, state_ids: Tensor, normalize: str) -> Tensor:
    """(G - mean) / (std + eps) over a state group; with normalize="mean" the std is left out. (B,), (B,) -> (B,)

    A step alone in its group gets 0, since there is nothing to compare it with. (`outcome_advantage` gives a group of
    one its raw return.)
    """
    _, group, sizes = state_ids.unique(return_inverse=True, return_counts=True)  # (groups,), (B,), (groups,)
    relative = outcome_advantage(returns, state_ids, torch.arange(len(returns)), normalize=normalize)
    return torch.where(sizes[group] > 1, relative, torch.zeros_like(relative))


VARIANT = replace(OPID, advantages=advantages, settings=Settings)
