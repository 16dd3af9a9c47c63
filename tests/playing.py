"""What several tests do: play episodes with a sampler of their own, and score skill-augmented contexts one level at a
time, the straightforward way."""

from lm.sampler import Sampler
from rescore import response_logprobs, skill_contexts
from rollout import rollout

BUDGET = 16384  # tokens of a pass: everything at once


def play(model, encoder, make_env, games, group_size, *, max_new_tokens, context_limit, temperature=1.0, **sampling):
    """`rollout` by a Sampler with these options."""
    sampler = Sampler(model, encoder.tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, **sampling)
    return rollout(sampler, encoder, make_env, games, group_size, context_limit=context_limit)


def skill_logprobs(model, encoder, trajectories, routes, level, *, context_limit, packed=True):
    """-> (log pi(y | h^) (B, R), NaN where a step has no guidance of this level; how many steps did not fit)."""
    contexts, too_long = skill_contexts(encoder, trajectories, routes, level, context_limit)
    responses = [step.response for trajectory in trajectories for step in trajectory.steps]
    return response_logprobs(model, contexts, responses, token_budget=BUDGET, packed=packed), too_long
