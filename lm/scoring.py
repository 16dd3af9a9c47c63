"""The log-probs of many responses by one model, in micro-batches and without a gradient, by the pass of training
(lm/logprobs.py). Which contexts are scored by which model: rescore.py.

Shapes: B rows (steps), R longest response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lm.branches import notice, tree_obstacle
from lm.logprobs import sequence_logprobs
from lm.packing import Sequence, graft, micro_batches, pack
from lm.parallel import gathered
from lm.states import States, states_and_logprobs

Progress = Callable[[list], Iterator]  # micro-batches -> the same, with a progress bar


def response_logprobs(
    model,
    contexts: list[list[int] | None],
    responses: list[list[int]],
    *,
    temperature: float = 1.0,
    token_budget: int,
    packed: bool = True,
    progress: Progress = iter,
    states: States | None = None,
) -> Tensor:
    """log pi(y | h) of every response token. -> (B, R) on the CPU, NaN beyond a row's end and where a context is None.

    `packed=False` scores each row as a sequence of its own: the straightforward version, with the same numbers.
    `states` gets the hidden states behind them.
    """
    shape = len(responses), max(map(len, responses), default=0)
    sequences = pack(contexts, responses, packed=packed)
    return _score_all(model, sequences, shape, temperature, token_budget, progress, states)


def tree_logprobs(
    model,
    contexts: list[list[int]],
    responses: list[list[int]],
    branches: list[list[int] | None],
    *,
    branches_only: bool = False,
    temperature: float = 1.0,
    token_budget: int,
    progress: Progress = iter,
    states: States | None = None,
) -> tuple[Tensor, Tensor]:
    """log pi(y | h) and, where a row has a second context h^ in `branches`, log pi(y | h^), in one pass over both.

    -> ((B, R), (B, R)), NaN where a row has no branch. K step skills cost K short branches rather than K long contexts;
    the numbers are those of `response_logprobs`. A model that cannot do this (see `tree_obstacle`) scores every second
    context by itself, and a notice is logged. `branches_only` leaves the first tensor NaN, and out what it needs.
    `states` (2B rows, the second contexts' after the others) gets the hidden states behind them.
    """
    obstacle = tree_obstacle(model)
    if obstacle and any(branches):
        notice(f"{type(model).__name__} scores each step skill in a pass of its own: {obstacle}")
    trees = graft(pack(contexts, responses), branches, responses, 0 if obstacle else token_budget)
    count = len(responses)
    if branches_only:
        trees = [Sequence(t.ids, [r for r in t.responses if r[0] >= count], t.branches) for t in trees]
        trees = [tree for tree in trees if tree.responses]
    shape = 2 * count, max(map(len, responses), default=0)
    scores = _score_all(model, trees, shape, temperature, token_budget, progress, states)  # (2B, R)
    return scores[:count], scores[count:]


def layout_noise(
    model, contexts: list[list[int]], responses: list[list[int]], *, temperature: float, token_budget: int
) -> float:
    """Mean |difference| per token, in nats, of two scorings of the same rows: packed and batched, and each row alone.

    In exact arithmetic it is 0. What it is here is the noise floor of A_skill, itself a difference of two scorings.
    """
    scores = response_logprobs(model, contexts, responses, temperature=temperature, token_budget=token_budget)
    alone = response_logprobs(model, contexts, responses, temperature=temperature, token_budget=1, packed=False)
    return (scores - alone).abs().nanmean().item()


@torch.no_grad()
def _score_all(
    model,
    sequences: list[Sequence],
    shape: tuple[int, int],
    temperature: float,
    token_budget: int,
    progress: Progress,
    states: States | None,
) -> Tensor:
    """Log-probs of everything in `sequences`, NaN elsewhere, as a tensor of `shape` on the CPU."""
    scores = torch.full(shape, float("nan"))
    training = model.training
    model.eval()
    with gathered(model):
        for batch in progress(micro_batches(sequences, token_budget)):
            if states is None:
                logprobs, rows, columns = sequence_logprobs(model, batch, temperature)
            else:
                read, logprobs, rows, columns = states_and_logprobs(model, batch, temperature)
                states.add(read, rows, columns)
            scores[rows.cpu(), columns.cpu()] = logprobs.float().cpu()
    model.train(training)
    return scores
