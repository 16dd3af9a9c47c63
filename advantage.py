"""What enters the update: the outcome advantage, the skill advantage, and their sum. No model, no gradient.

Shapes: B rows are steps pooled over trajectories, R is the padded response length. NaN marks "not scored" and never
enters a sum: what is not scored has no skill advantage.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import Config
from data import Advantages, Batch, Trajectory

if TYPE_CHECKING:
    from runlog.start import Run


def opid_advantages(run: Run, batch: Batch, rng: random.Random) -> Advantages:
    """A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]."""
    config, old = run.config, batch.old_logprobs
    outcome = outcome_advantages(batch.trajectories, config)  # (B,)
    shifts = {level: skill_advantage(logprobs, old) for level, logprobs in batch.skill_logprobs.items()}  # (B, R) each
    weights = {"episode": config.episode_weight, "step": config.step_weight}
    return Advantages(combine(outcome, shifts, weights, batch.mask), outcome, sum_of_scored(shifts, batch.mask))


def outcome_advantages(trajectories: list[Trajectory], config: Config) -> Tensor:
    """A_ep of each step: R(tau), less the step's own penalty, against its group. -> (B,)"""
    steps = [(i, trajectory, step) for i, trajectory in enumerate(trajectories) for step in trajectory.steps]
    rewards = torch.tensor([config.success_reward * trajectory.success for _, trajectory, _ in steps])  # (B,) R(tau)
    penalties = torch.tensor([config.invalid_penalty * (not step.valid) for _, _, step in steps])  # (B,)
    groups = torch.tensor([trajectory.group for _, trajectory, _ in steps])  # (B,)
    owners = torch.tensor([i for i, _, _ in steps])  # (B,)
    return outcome_advantage(rewards - penalties, groups, owners, config.normalize, config.group_over)


def outcome_advantage(
    returns: Tensor,  # (B,) R(tau) of the step's trajectory, less the step's own penalty
    group_ids: Tensor,  # (B,) which task
    trajectory_ids: Tensor,  # (B,) which rollout
    normalize: str = "mean_std",
    over: str = "steps",
    eps: float = 1e-6,
) -> Tensor:
    """A_ep = (R(tau) - mean_g) / (std_g + eps), or R(tau) - mean_g with normalize="mean". -> (B,)

    `over="steps"` takes the group's mean and (sample) std over step rows, as the authors' release does
    (gigpo/core_gigpo.py, compute_mean_std_cross_steps=True), so that a long trajectory weighs more;
    `over="trajectories"` gives each rollout the same weight, split over its steps. A group of one sample has mean 0 and
    std 1 there, hence the raw return here too.
    """
    advantages = torch.zeros_like(returns)  # (B,)
    scores = returns.double()  # in float32 the rounding error of a mean of equal returns is as large as eps
    for group in group_ids.unique():
        rows = group_ids == group  # (B,)
        samples = trajectory_ids[rows] if over == "trajectories" else torch.arange(int(rows.sum()))  # (steps of g,)
        _, sample, sizes = samples.unique(return_inverse=True, return_counts=True)
        mean, std = torch.zeros(()), torch.ones(())
        if len(sizes) > 1:
            shares = 1 / (sizes[sample] * len(sizes)).double()  # (steps of g,) sum to 1, and equally over samples
            mean = (shares * scores[rows]).sum()
            # Not the std of per-trajectory returns: where those are equal, a step's own penalty would be divided by 0.
            std = ((shares * (scores[rows] - mean) ** 2).sum() * len(sizes) / (len(sizes) - 1)).sqrt()
        centred = scores[rows] - mean
        advantages[rows] = (centred / (std + eps) if normalize == "mean_std" else centred).to(returns.dtype)
    return advantages


def skill_advantage(skill_logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """A_skill, NaN where either side is: not scored. All (B, R) -> (B, R).

    Positive where the skill makes the sampled token likelier (praise), negative where it makes it less likely (blame).
    """
    # A_skill = (log pi(y | h^) - log pi_old(y | h)) * m                    (paper: skill advantage)
    return skill_logprobs - base_logprobs


def combine(outcome: Tensor, shifts: dict[str, Tensor], weights: dict[str, float], mask: Tensor) -> Tensor:
    """The sum of outcome (B,) and `shifts` (B, R) by level, 0 off the mask. -> (B, R)

    A weight of 0 leaves its term out altogether, so that the result is GRPO's bit for bit.
    """
    # A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]
    advantages = outcome[:, None] * mask.to(outcome.dtype)  # (B, R)
    for level, weight in weights.items():  # in this order, whichever was scored first: sums of floats depend on it
        if weight and level in shifts:
            advantages = advantages + weight * shifts[level].masked_fill(shifts[level].isnan(), 0.0)
    return advantages


def sum_of_scored(shifts: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The sum of what was scored: NaN where nothing was. All (B, R) -> (B, R)"""
    total = torch.full(mask.shape, float("nan"))  # (B, R)
    for shift in shifts.values():
        known = ~shift.isnan()  # (B, R)
        total[known] = total[known].nan_to_num() + shift[known]
    return total
