"""The log-probs of many responses by one model, in micro-batches and without a gradient, by the pass of training
(lm/logprobs.py). Which contexts are scored by which model: rescore.py.

Shapes: B rows (steps), R longest response.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from lm.branches import notice, tree_obstacle
from lm.logprobs import sequence_logprobs
from lm.packing import Sequence, graft, micro_batches, pack
from lm.parallel import gathered


@dataclass(frozen=True)
class Limits:
    """What scoring goes by: the temperature that was sampled at, and the bound of its memory."""

    temperature: float
    token_budget: int  # most padded tokens of a forward pass


def response_logprobs(
    model, contexts: list[list[int] | None], responses: list[list[int]], limits: Limits, *, packed: bool = True
) -> Tensor:
    """log pi(y | h) of every response token. -> (B, R) on the CPU, NaN beyond a row's end and where a context is None.

    `packed=False` scores each row as a sequence of its own: the straightforward version, with the same numbers.
    """
    shape = len(responses), max(map(len, responses), default=0)
    return score_sequences(model, pack(contexts, responses, packed=packed), shape, limits)


def tree_logprobs(
    model,
    contexts: list[list[int]],
    responses: list[list[int]],
    branches: list[list[int] | None],
    limits: Limits,
    *,
    branches_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi(y | h) and, where a row has a second context h^ in `branches`, log pi(y | h^), in one pass over both.

    -> ((B, R), (B, R)), NaN where a row has no branch. K step skills cost K short branches rather than K long contexts;
    the numbers are those of `response_logprobs`. A model that cannot do this (see `tree_obstacle`) scores every second
    context by itself, and a notice is logged. `branches_only` leaves the first tensor NaN, and out what it needs.
    """
    obstacle = tree_obstacle(model)
    if obstacle and any(branches):
        notice(f"{type(model).__name__} scores each step skill in a pass of its own: {obstacle}")
    trees = graft(pack(contexts, responses), branches, responses, 0 if obstacle else limits.token_budget)
    count = len(responses)
    if branches_only:
        trees = [Sequence(t.ids, [r for r in t.responses if r[0] >= count], t.branches) for t in trees]
        trees = [tree for tree in trees if tree.responses]
    shape = 2 * count, max(map(len, responses), default=0)
    scores = score_sequences(model, trees, shape, limits)  # (2B, R)
    return scores[:count], scores[count:]


def layout_noise(model, contexts: list[list[int]], responses: list[list[int]], limits: Limits) -> float:
    """Mean |difference| per token, in nats, of two scorings of the same rows: packed and batched, and each row alone.

    In exact arithmetic it is 0. What it is here is the noise floor of A_skill, itself a difference of two scorings.
    """
    scores = response_logprobs(model, contexts, responses, limits)
    alone = response_logprobs(model, contexts, responses, replace(limits, token_budget=1), packed=False)
    return (scores - alone).abs().nanmean().item()


@torch.no_grad()
def score_sequences(model, sequences: list[Sequence], shape: tuple[int, int], limits: Limits) -> Tensor:
    """Log-probs of everything in `sequences`, NaN elsewhere, as a tensor of `shape` on the CPU."""
    scores = torch.full(shape, float("nan"))
    training = model.training
    model.eval()
    with gathered(model):
        for batch in tqdm(micro_batches(sequences, limits.token_budget), "score", leave=False, disable=None):
            logprobs, at = sequence_logprobs(model, batch, limits.temperature)
            scores[at] = logprobs.float().cpu()
    model.train(training)
    return scores
