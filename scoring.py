"""Which weights score which contexts, in as few passes as they need: old, reference, larger teacher, guided.

    contexts (with skills) -> rescore.tree_logprobs, rescore.guided_logprobs -> log-probs (B, R), NaN where not scored

B rows are steps pooled over trajectories, R is the longest response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from data import Guidance, Trajectory
from lm.encoder import Encoder
from rescore import guided_contexts, guided_logprobs, tree_logprobs


def guided_by_level(
    encoder: Encoder,
    trajectories: list[Trajectory],
    routes: list[list[tuple[Guidance, ...]]],
    levels: Sequence[str],
    *,
    context_limit: int,
) -> tuple[dict[str, list[list[int] | None]], dict[str, float]]:
    """-> (for each of `levels` the skill-augmented context of each step, None where it has none; metrics)."""
    guided, metrics = {}, {}
    for level in levels:
        guided[level], metrics[f"guided/{level}_too_long"] = guided_contexts(
            encoder, trajectories, routes, level, context_limit=context_limit
        )
    return guided, metrics


def score(
    weights: dict,  # name -> model
    contexts: list[list[int]],
    responses: list[list[int]],
    guided: dict[str, list[list[int] | None]],  # of guided_by_level
    *,
    plain: Sequence[str],  # the names that score the plain contexts
    scorer: str,  # the name that scores the guided ones
    progress: Callable[[str], Callable],  # name of a pass -> a progress bar over its batches
    **scoring,  # temperature, token_budget
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs (B, R): of each of `plain` by name, and of each level's guided contexts by level.

    A step skill changes the end of a context, so it is scored as a branch of the plain contexts, in the same pass
    where the scorer makes one anyway. An episode skill changes all that follows the task: a pass of its own.
    """
    logprobs, scored = {}, {}
    for name in dict.fromkeys([*plain, *([scorer] if "step" in guided else [])]):
        rides = "step" in guided and name == scorer
        logprobs[name], branch = tree_logprobs(
            weights[name],
            contexts,
            responses,
            guided["step"] if rides else [None] * len(contexts),
            branches_only=name not in plain,
            **scoring,
            progress=progress(name),
        )
        if rides:
            scored["step"] = branch
    if "episode" in guided:
        scored["episode"] = guided_logprobs(
            weights[scorer], guided["episode"], responses, **scoring, progress=progress("episode")
        )
    return logprobs, scored
