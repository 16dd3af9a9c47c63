"""What enters the update: the outcome advantage, the skill advantage, and their sum. No model code.

Shapes: B rows are steps pooled over trajectories, R is the padded response length. NaN marks "not scored" and never
leaves this file: what is not scored has no skill advantage. Nothing here carries gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Config
from data import Trajectory


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
            weights = 1 / (sizes[sample] * len(sizes)).double()  # (steps of g,) sum to 1, and equally over samples
            mean = (weights * scores[rows]).sum()
            # Not the std of per-trajectory returns: where those are equal, a step's own penalty would be divided by 0.
            std = ((weights * (scores[rows] - mean) ** 2).sum() * len(sizes) / (len(sizes) - 1)).sqrt()
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
    shift = skill_logprobs - base_logprobs  # (B, R)
    return torch.where(mask.bool() & ~shift.isnan(), shift, torch.zeros_like(shift)).detach()


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
    advantages = outcome[:, None] * mask.to(outcome.dtype)  # (B, R)
    for shift, weight in ((episode_shift, episode_weight), (step_shift, step_weight)):
        if shift is None or weight == 0:
            continue
        if skill_clip is not None:
            shift = shift.clamp(-skill_clip, skill_clip)
        advantages = advantages + weight * shift
    return advantages


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
    normalize: str = "mean_std",
) -> Tensor:
    """GiGPO's second part: (G - mean) / (std + eps) over a state group, G = gamma^steps_left R(tau) - penalty. -> (B,)

    With normalize="mean" the std is left out. A step alone in its group has nothing to be relative to, hence 0 (an
    outcome group of one is another matter). Paper: GiGPO, arXiv 2505.10978, eq. 5-7; both authors' releases:
    gigpo/core_gigpo.py, compute_step_discounted_returns and step_norm_reward.
    """
    returns = rewards * gamma**steps_left - penalties  # (B,)
    _, group, sizes = state_ids.unique(return_inverse=True, return_counts=True)  # (groups,), (B,), (groups,)
    advantages = outcome_advantage(returns, state_ids, torch.arange(len(returns)), normalize=normalize)
    return torch.where(sizes[group] > 1, advantages, torch.zeros_like(advantages))


def rescale(outcome: Tensor, shift: Tensor, mask: Tensor, *, mix: float, clip: float) -> Tensor:
    """RLSD: A_ep ((1 - mix) + mix clip(exp(sign(A_ep) Delta), 1 - clip, 1 + clip)), 0 off the mask. -> (B, R)

    `outcome` (B,); `shift` (B, R) is what `skill_advantage` returned: 0, hence weight 1, where no skill was scored. The
    skill says which tokens matter most and never which way to go: no sign changes. `mix` 0 is GRPO.
    SDAR release: verl/trainer/ppo/rlsd_utils.py, compute_rlsd_token_advantage.
    """
    sign = outcome.sign()[:, None]  # (B, 1)
    weight = (sign * shift).exp().clamp(1 - clip, 1 + clip)  # (B, R)
    return outcome[:, None] * mask.to(outcome.dtype) * ((1 - mix) + mix * weight)


def merge(mask: Tensor, *scores: Tensor) -> Tensor:
    """The sum of what was scored: NaN where none of `scores` has a value. All (B, R) -> (B, R)"""
    total = torch.full(mask.shape, float("nan"), device=mask.device)  # (B, R)
    for score in scores:
        known = ~score.isnan()  # (B, R)
        total[known] = total[known].nan_to_num() + score[known]
    return total


def silent_groups(trajectories: list[Trajectory]) -> dict[int, bool]:
    """Group -> whether all its rollouts earned the same, so that the outcome says nothing about its steps."""
    rewards: dict[int, set[float]] = {}
    for trajectory in trajectories:
        rewards.setdefault(trajectory.group, set()).add(trajectory.reward)
    return {group: len(seen) == 1 for group, seen in rewards.items()}


def outcome_of(config: Config, trajectories: list[Trajectory]) -> tuple[Tensor, dict[str, float]]:
    """-> (A_ep of each step, and beside it the step-relative advantage of a method that has one (B,); metrics)."""
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    counts = torch.tensor([len(trajectory.steps) for trajectory in trajectories])
    owner = torch.arange(len(trajectories)).repeat_interleave(counts)  # (B,)
    rewards = torch.tensor([trajectories[i].reward for i in owner])  # (B,)
    penalties = torch.tensor([step.penalty for step in steps])  # (B,)
    groups = torch.tensor([trajectories[i].group for i in owner])  # (B,)
    options = {"normalize": config.normalize}
    outcome = outcome_advantage(rewards - penalties, groups, owner, **options, over=config.group_over)  # (B,)
    silent = silent_groups(trajectories).values()
    metrics = {"advantage/silent_groups": sum(silent) / len(silent)}
    if not config.method.states:
        return outcome, metrics
    left = torch.tensor([n for t in trajectories for n in reversed(range(len(t.steps)))])  # (B,)
    states = state_groups(groups, [step.observation for step in steps])  # (B,)
    relative = step_relative_advantage(rewards, penalties, left, states, gamma=config.gamma, **options)  # (B,)
    metrics["advantage/state_group_size"] = len(states) / len(states.unique())
    return outcome + config.state_weight * relative, metrics


def advantages_of(
    config: Config,
    iteration: int,
    outcome: Tensor,  # (B,) of outcome_of
    old: Tensor,  # (B, R) log pi_old(y | h), NaN off the mask
    scored: dict[str, Tensor],  # (B, R) each, log-probs by level: "episode", "step", or "teacher" for a larger model
    base: Tensor | None = None,  # (B, R) log-probs that `scored` is compared with; None: old
) -> tuple[Tensor, Tensor]:
    """-> (what the update uses (B, R), A_skill before weighting (B, R), NaN where nothing was scored)."""
    mask, method = ~old.isnan(), config.method  # (B, R)
    base = old if base is None else base
    shifts = {level: skill_advantage(logprobs, base, mask) for level, logprobs in scored.items()}  # (B, R) each
    known = [shift.masked_fill(scored[level].isnan(), float("nan")) for level, shift in shifts.items()]
    skill_advantages = merge(mask, *known)  # (B, R)
    if method.shift == "scale":
        shift = skill_advantages.nan_to_num()  # (B, R)
        return rescale(outcome, shift, mask, mix=config.mix(iteration), clip=config.rlsd_clip), skill_advantages
    added, fade = shifts if method.shift == "add" else {}, config.fade(iteration)
    advantages = combine(
        outcome if method.outcome else torch.zeros_like(outcome),
        added.get("teacher", added.get("episode")),
        added.get("step"),
        mask,
        episode_weight=1.0 if method.teacher else fade * config.episode_weight,
        step_weight=fade * config.step_weight,
        skill_clip=config.skill_clip,
    )  # (B, R)
    return advantages, skill_advantages


def advantage_metrics(outcome: Tensor, skill_advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Mean |A_ep| over response tokens, and mean |A_skill| and A_skill over those that a skill was scored on."""
    guided = skill_advantages[~skill_advantages.isnan()]  # (guided tokens,)
    count = max(len(guided), 1)
    return {
        "advantage/outcome_abs": ((outcome.abs()[:, None] * mask).sum() / mask.sum()).item(),
        "advantage/skill_abs": guided.abs().sum().item() / count,
        "advantage/skill_mean": guided.sum().item() / count,
    }
