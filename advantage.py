"""What enters the update: the outcome advantage, the skill advantage, and their sum. Tensors and numbers only.

Shapes: B rows are steps pooled over trajectories, R is the padded response length. Log-probs are NaN where nothing was
scored; advantages are 0 there, so that NaN never enters a sum. Nothing here carries gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outcome_advantage(
    returns: Tensor,  # (B,) R(tau) of the step's trajectory, less the step's own penalty
    group_ids: Tensor,  # (B,) which task
    trajectory_ids: Tensor,  # (B,) which rollout
    *,
    normalize: str = "mean_std",
    over: str = "steps",
    eps: float = 1e-6,
) -> Tensor:
    """A_ep = (R(tau) - mean_g) / (std_g + eps), or R(tau) - mean_g with normalize="mean". -> (B,)

    `over="steps"` takes the group's mean and (sample) std over step rows, as the authors' release does
    (gigpo/core_gigpo.py, compute_mean_std_cross_steps=True), so that a long trajectory weighs more;
    `over="trajectories"` gives each rollout the same weight, split over its steps. For a group of one we follow the
    release: mean 0 and std 1, so A_ep is the return. Raises ValueError for an unknown option.
    """
    if normalize not in ("mean_std", "mean"):
        raise ValueError(f"normalize must be 'mean_std' or 'mean', not {normalize!r}")
    if over not in ("steps", "trajectories"):
        raise ValueError(f"over must be 'steps' or 'trajectories', not {over!r}")
    advantages = torch.zeros_like(returns)  # (B,)
    scores = returns.double()  # in float32 the rounding error of a mean of equal returns is as large as eps
    for group in group_ids.unique():
        rows = group_ids == group  # (B,)
        unit = trajectory_ids[rows] if over == "trajectories" else torch.arange(int(rows.sum()))  # (steps of g,)
        _, unit, sizes = unit.unique(return_inverse=True, return_counts=True)  # a unit is what counts once
        mean, std = torch.zeros(()), torch.ones(())
        if len(sizes) > 1:
            shares = 1 / (sizes[unit] * len(sizes)).double()  # (steps of g,) sum to 1, and equally over units
            mean = (shares * scores[rows]).sum()
            # Not the std of per-trajectory returns: where those are equal, a step's own penalty would be divided by 0.
            std = ((shares * (scores[rows] - mean) ** 2).sum() * len(sizes) / (len(sizes) - 1)).sqrt()
        centred = scores[rows] - mean
        advantages[rows] = (centred / (std + eps) if normalize == "mean_std" else centred).to(returns.dtype)
    return advantages


def skill_advantage(skill_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A_skill of the steps that one level of skill guides. All (B, R) -> (B, R).

    Positive where the skill makes the sampled token likelier (praise), negative where it makes it less likely (blame).
    Exactly 0 off the mask and where either side is NaN, that is, not scored.
    """
    # A_skill = (log pi(y | h^) - log pi_old(y | h)) * m                    (paper: skill advantage)
    shift = skill_logprobs - old_logprobs  # (B, R)
    return torch.where(mask.bool() & ~shift.isnan(), shift, torch.zeros_like(shift)).detach()


def combine(outcome: Tensor, shifts: dict[str, Tensor], weights: dict[str, float], mask: Tensor) -> Tensor:
    """A from the outcome (B,) and, by level, A_skill (B, R) and its lambda; 0 off the mask. -> (B, R)

    A weight of 0 leaves its term out altogether, so that the result is GRPO's bit for bit.
    """
    # A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]
    advantages = outcome[:, None] * mask.to(outcome.dtype)  # (B, R)
    for level, weight in weights.items():  # in this order, whichever was scored first: sums of floats depend on it
        if weight and level in shifts:
            advantages = advantages + weight * shifts[level]
    return advantages


def sum_of_scored(shifts: dict[str, Tensor], logprobs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """A_skill over all levels, for logs and reports: NaN where no level was scored (`shifts` are 0 there). -> (B, R)"""
    known = torch.stack([torch.zeros_like(mask), *(~scores.isnan() for scores in logprobs.values())]).any(0)  # (B, R)
    total = sum(shifts.values(), torch.zeros(mask.shape))  # (B, R)
    return total.masked_fill(~(known & mask), float("nan"))
