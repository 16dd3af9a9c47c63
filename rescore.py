"""Log-probs of sampled responses, with and without a skill in the context. No sampling.

    trajectories, routes -> contexts h, contexts h^ with a skill -> score -> Batch

A pass itself is lm/scoring.py's, the same for old, skill-augmented and reference log-probs.

Shapes: B rows (steps), R longest response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data import Batch, Contexts, Guidance, Level, Route, Skills, Trajectory
from lm.encoder import Encoder
from lm.scoring import response_logprobs, tree_logprobs
from router import guided_messages

if TYPE_CHECKING:
    from runlog.start import Run


def score(
    run: Run,
    trajectories: list[Trajectory],
    skills: list[Skills | None],
    routes: list[Route],
    readers: tuple[str, ...] = ("old", "reference"),
) -> tuple[Batch, dict[str, float]]:
    """What each step's tokens are worth: log pi(y | h) of the policy and the reference, log pi(y | h^) of the scorer.

    A step skill changes the end of a context, so it is scored as a branch of the plain contexts, in the same pass
    where the scorer makes one anyway. An episode skill changes all that follows the task: a pass of its own.
    `readers`: who reads the plain contexts, besides.
    """
    config, limits = run.config, run.config.limits
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    contexts, responses = [step.context for step in steps], [step.response for step in steps]
    guided, metrics = {}, {}
    for level in config.levels:
        guided[level], too_long = guided_contexts(run.encoder, trajectories, routes, level, config.context_limit)
        metrics[f"guided/{level}_too_long"] = too_long

    plain_logprobs, skill_logprobs = {}, {}
    for name in ("old", "reference"):
        reads = name in readers and (name == "old" or config.kl > 0)
        rides = name == config.scorer and "step" in guided
        if reads or rides:
            branches = guided["step"] if rides else [None] * len(steps)
            with run.reading(run.models[name]):
                plain_logprobs[name], branch = tree_logprobs(
                    run.models[name], contexts, responses, branches, limits, branches_only=not reads
                )
            if rides:
                skill_logprobs["step"] = branch  # (B, R)
    if "episode" in guided:
        with run.reading(run.models[config.scorer]):
            skill_logprobs["episode"] = response_logprobs(
                run.models[config.scorer], guided["episode"], responses, limits
            )  # (B, R)

    for level, logprobs in skill_logprobs.items():
        metrics[f"guided/{level}"] = (~logprobs.isnan()).any(1).float().mean().item()
    old, reference = plain_logprobs.get("old"), plain_logprobs.get("reference") if config.kl else None
    return Batch(trajectories, skills, routes, guided, old, reference, skill_logprobs), metrics


def guided_contexts(
    encoder: Encoder, trajectories: list[Trajectory], routes: list[Route], level: Level, context_limit: int
) -> tuple[Contexts, int]:
    """The context h^ of every step that a skill of one level guides, None for the others; how many were left unguided
    because h^ and the response would not fit in `context_limit` tokens: they are never truncated."""
    contexts: Contexts = []
    too_long = 0
    for trajectory, route in zip(trajectories, routes, strict=True):
        for t, (step, guidances) in enumerate(zip(trajectory.steps, route, strict=True)):
            guidance = next((guidance for guidance in guidances if guidance.level == level), None)
            context = guidance and guided_context(encoder, trajectory, t, guidance)
            if context and len(context) + len(step.response) > context_limit:
                too_long, context = too_long + 1, None
            contexts.append(context)
    return contexts, too_long


def guided_context(encoder: Encoder, trajectory: Trajectory, t: int, guidance: Guidance | None) -> list[int]:
    """The context h^_t of step t with one skill in it (h_t itself where `guidance` is None)."""
    messages = guided_messages([step.prompt for step in trajectory.steps[: t + 1]], guidance, encoder.style)
    return encoder.context(messages, [step.response for step in trajectory.steps[:t]])
