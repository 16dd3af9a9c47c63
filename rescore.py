"""Log-probs of sampled responses, with and without a skill in the context. No sampling, no gradient.

    trajectories, routes -> contexts h, contexts h^ with a skill in them -> rescore -> Batch

How a model reads them: lm/scoring.py, the same pass for old, skill-augmented and reference log-probs.

Shapes: B rows (steps), R longest response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data import Batch, Contexts, Guidance, Level, Route, Skills, Trajectory
from lm.encoder import Encoder
from lm.scoring import no_logprobs, response_logprobs, tree_logprobs
from router import guided_messages

if TYPE_CHECKING:
    from runlog.start import Run


def rescore(
    run: Run, trajectories: list[Trajectory], skills: list[Skills | None], routes: list[Route], *, plain: bool = True
) -> tuple[Batch, dict[str, float]]:
    """What each step's tokens are worth: log pi(y | h) of the policy and the reference, log pi(y | h^) of the scorer.

    A step skill only changes the end of a context, so we score it in the same pass as the plain context, as a branch.
    An episode skill changes all that follows the task: a pass of its own.
    `plain=False`: log-probs under h are left out (NaN), so that the mask is empty.
    """
    config = run.config
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    h, y = [step.context for step in steps], [step.response for step in steps]  # B of each
    h_skill, skill_logprobs, metrics = {}, {}, {}  # h^ and the log-probs (B, R) under it, by level
    for level in run.levels:
        found = skill_contexts(run.encoder, trajectories, routes, level, config.context_limit)
        h_skill[level], metrics[f"guided/{level}_too_long"] = found
    temperature, budget = config.temperature, config.token_budget
    logprobs = {"old": no_logprobs(y)}  # (B, R) each

    # log pi_old(y | h) and log pi_ref(y | h), with the step skills' log pi(y | h^) as branches of the scorer's pass
    for name in ("old", "reference"):
        reads_plain = plain and (name == "old" or config.kl > 0)
        has_branches = name == config.scorer and "step" in h_skill
        if reads_plain or has_branches:
            branches, model = h_skill["step"] if has_branches else [None] * len(steps), run.models[name]
            with run.reading(model):
                logprobs[name], under_skill = tree_logprobs(
                    model, h, y, branches, temperature=temperature, token_budget=budget, branches_only=not reads_plain
                )
            if has_branches:
                skill_logprobs["step"] = under_skill

    # log pi(y | h^) under the episode skill
    if "episode" in h_skill:
        model, h_hat = run.models[config.scorer], h_skill["episode"]
        with run.reading(model):
            skill_logprobs["episode"] = response_logprobs(model, h_hat, y, temperature=temperature, token_budget=budget)

    for level, scores in skill_logprobs.items():
        metrics[f"guided/{level}"] = (~scores.isnan()).any(1).float().mean().item()
    reference = logprobs.get("reference") if config.kl > 0 else None
    return Batch(trajectories, skills, routes, h_skill, logprobs["old"], reference, skill_logprobs), metrics


def skill_contexts(
    encoder: Encoder, trajectories: list[Trajectory], routes: list[Route], level: Level, context_limit: int
) -> tuple[Contexts, int]:
    """The context h^ of every step that a skill of one level guides, None for the others; how many were left unguided
    because h^ and the response would not fit in `context_limit` tokens: they are never truncated."""
    contexts: Contexts = []
    too_long = 0
    for trajectory, route in zip(trajectories, routes, strict=True):
        for t, (step, guidances) in enumerate(zip(trajectory.steps, route, strict=True)):
            guidance = next((guidance for guidance in guidances if guidance.level == level), None)
            context = skill_context(encoder, trajectory, t, guidance) if guidance else None
            if context and len(context) + len(step.response) > context_limit:
                too_long, context = too_long + 1, None
            contexts.append(context)
    return contexts, too_long


def skill_context(encoder: Encoder, trajectory: Trajectory, t: int, guidance: Guidance | None) -> list[int]:
    """The context h^_t of step t with one skill in it (h_t itself where `guidance` is None)."""
    messages = guided_messages([step.prompt for step in trajectory.steps[: t + 1]], guidance, encoder.style)
    return encoder.context(messages, [step.response for step in trajectory.steps[:t]])
