"""Log-probs of sampled responses, with and without a skill in the context. No sampling.

    contexts h, contexts h^ with a skill -> score -> log pi(y | h), log pi(y | h^), NaN where a row has no skill

A pass itself is lm/scoring.py's, the same for old, skill-augmented and reference log-probs.

Shapes: B rows (steps), R longest response.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from data import Guidance, Trajectory
from lm.encoder import Encoder
from lm.scoring import Progress, response_logprobs, tree_logprobs
from lm.states import States
from router import guided_messages

# ---- the contexts ----------------------------------------------------------------------------------------------------


def guided_context(encoder: Encoder, trajectory: Trajectory, t: int, guidance: Guidance | None) -> list[int]:
    """The context h^_t of step t with one skill in it (h_t itself where `guidance` is None)."""
    messages = guided_messages([step.prompt for step in trajectory.steps[: t + 1]], guidance, encoder.style)
    return encoder.context(messages, [step.response for step in trajectory.steps[:t]])


def guided_contexts(
    encoder: Encoder,
    trajectories: list[Trajectory],
    routes: list[list[tuple[Guidance, ...]]],
    level: str,
    *,
    context_limit: int,
) -> tuple[list[list[int] | None], int]:
    """The context h^ of every step that a skill of one level guides, None for the others; how many were left unguided
    because h^ and the response would not fit in `context_limit` tokens: they are never truncated."""
    contexts: list[list[int] | None] = []
    too_long = 0
    for trajectory, route in zip(trajectories, routes, strict=True):
        for t, (step, guidances) in enumerate(zip(trajectory.steps, route, strict=True)):
            guidance = next((guidance for guidance in guidances if guidance.level == level), None)
            context = guidance and guided_context(encoder, trajectory, t, guidance)
            if context and len(context) + len(step.response) > context_limit:
                too_long, context = too_long + 1, None
            contexts.append(context)
    return contexts, too_long


# ---- their log-probs -------------------------------------------------------------------------------------------------


def score(
    readers: dict,  # name -> model that reads every plain context
    scorer,  # the model that reads the guided ones; it may be among the readers
    contexts: list[list[int]],  # B of them, h
    responses: list[list[int]],
    guided: dict[str, list[list[int] | None]],  # level -> B of guided_contexts, h^
    *,
    temperature: float,
    token_budget: int,
    progress: Callable[[str], Progress],  # name of a pass -> its progress bar
    keep: dict[str, States] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs (B, R): log pi(y | h) by reader, and log pi(y | h^) by level, in as few passes as they need.

    A step skill changes the end of a context, so it is scored as a branch of the plain contexts, in the same pass
    where the scorer makes one anyway. An episode skill changes all that follows the task: a pass of its own.
    `keep` gets the hidden states behind each, by the same names.
    """
    limits = {"temperature": temperature, "token_budget": token_budget}
    count, longest = len(responses), max(map(len, responses), default=0)
    plain, scored = {}, {}
    ridden = next((name for name, model in readers.items() if model is scorer), "step")  # where step skills ride along
    passes = readers | {ridden: scorer} if "step" in guided else readers
    for name, model in passes.items():
        rides = "step" in guided and name == ridden
        branches = guided["step"] if rides else [None] * count
        states = None if keep is None else States(model, 2 * count, longest)
        some = {"branches_only": name not in readers, "progress": progress(name), "states": states}
        plain[name], branch = tree_logprobs(model, contexts, responses, branches, **limits, **some)
        if rides:
            scored["step"] = branch
        if keep is not None:
            keep[name] = states.of_rows(0, count)
            if rides:
                keep["step"] = states.of_rows(count, 2 * count)
    if "episode" in guided:
        states = None if keep is None else keep.setdefault("episode", States(scorer, count, longest))
        some = {"progress": progress("episode"), "states": states}
        scored["episode"] = response_logprobs(scorer, guided["episode"], responses, **limits, **some)
    return {name: plain[name] for name in readers}, scored
