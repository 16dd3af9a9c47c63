"""What enters the update: the outcome advantage, the skill advantage, and their sum. Tensors and numbers only.

Shapes: B rows are steps pooled over trajectories, R is the padded response length. NaN marks "not scored" and never
enters a sum: what is not scored has no skill advantage. Nothing here carries gradient.
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
    `over="trajectories"` gives each rollout the same weight, split over its steps. A group of one sample has mean 0 and
    std 1 there, hence the raw return here too. Raises ValueError for an unknown option.
    """
    if normalize not in ("mean_std", "mean"):
        raise ValueError(f"normalize must be 'mean_std' or 'mean', not {normalize!r}")
    if over not in ("steps", "trajectories"):
        raise ValueError(f"over must be 'steps' or 'trajectories', not {over!r}")
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


def skill_advantage(skill_logprobs: Tensor, base_logprobs: Tensor, mask: Tensor) -> Tensor:
    """A_skill = (log pi(y | h with skill) - log pi_old(y | h)) * m. All (B, R) -> (B, R).

    `base_logprobs` is the second term. Where the scorer is not the sampling policy, the difference also holds how far
    the two are apart without any skill, a pull towards the scorer; `--shift-base scorer` takes log pi(y | h) of the
    scorer instead, and what is left is the skill's own doing.

    Positive where the skill makes the sampled token likelier (praise), negative where it makes it less likely (blame).
    Exactly 0 off the mask and where either side is NaN, that is, not scored.
    """
    # A_skill = (log pi(y | h^) - log pi_old(y | h)) * m                    (paper: skill advantage)
    shift = skill_logprobs - base_logprobs  # (B, R)
    return torch.where(mask.bool() & ~shift.isnan(), shift, torch.zeros_like(shift)).detach()


def where_scored(shift: Tensor, logprobs: Tensor) -> Tensor:
    """A shift with NaN where `logprobs` has it: 0 is what enters a sum, NaN says "not scored". All (B, R) -> (B, R)"""
    return shift.masked_fill(logprobs.isnan(), float("nan"))


def combine(
    outcome: Tensor,  # (B,)
    episode_shift: Tensor | None,  # (B, R) skill_advantage of the episode-guided steps
    step_shift: Tensor | None,  # (B, R) skill_advantage of the step-guided steps
    mask: Tensor,  # (B, R)
    *,
    episode_weight: float,
    step_weight: float,
    skill_clip: float | None = None,
) -> Tensor:
    """A = A_ep + lambda_ep A_skill (episode-guided) + lambda_step A_skill (step-guided), 0 off the mask. -> (B, R)

    A weight of 0 leaves its term out altogether, so that the result is GRPO's bit for bit. `skill_clip` bounds each
    |A_skill| before weighting (an addition of ours, off by default).
    """
    # A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]
    advantages = outcome[:, None] * mask.to(outcome.dtype)  # (B, R)
    for shift, weight in ((episode_shift, episode_weight), (step_shift, step_weight)):
        if shift is None or weight == 0:
            continue
        if skill_clip is not None:
            shift = shift.clamp(-skill_clip, skill_clip)
        advantages = advantages + weight * shift
    return advantages


def sum_of_scored(mask: Tensor, *scores: Tensor) -> Tensor:
    """The sum of what was scored: NaN where none of `scores` has a value. All (B, R) -> (B, R)"""
    total = torch.full(mask.shape, float("nan"), device=mask.device)  # (B, R)
    for score in scores:
        known = ~score.isnan()  # (B, R)
        total[known] = total[known].nan_to_num() + score[known]
    return total


def linear_decay(iteration: int, iterations: int) -> float:
    """From 1 at iteration 0 in a line to 0 at `iterations`; always 1 where that is 0."""
    return max(0.0, 1 - iteration / iterations) if iterations else 1.0
