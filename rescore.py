"""Log-probs of sampled responses. The only place that packs, pads, shifts and asks the model for log-probs.

The same functions serve the old, skill-augmented, reference and training passes.

Shapes: B rows (steps), R longest response; a micro-batch holds S packed sequences of padded length L and N response
tokens in all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from data import Guidance, Trajectory
from lm.branches import tree_attention, tree_inputs, tree_obstacle
from lm.encoder import Encoder
from lm.logprobs import token_logprobs
from lm.packing import Sequence, graft, micro_batches, pack
from router import guided_messages


@cache
def _notice(text: str) -> None:
    """Log it once."""
    logging.getLogger(__name__).warning(text)


def sequence_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass -> log-probs (N,), their batch rows (N,) and response columns (N,). Gradient flows if enabled.

    The causal shift lives here and nowhere else: the logits at position p - 1 predict the token at position p, so
    logits are asked for at p - 1 only.
    """
    device = model.device
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)  # (S, L), right-padded
    attention_mask = torch.zeros_like(ids)  # (S, L)
    keep = torch.zeros(ids.shape, dtype=torch.bool)  # (S, L) True at p - 1 for a response token at p
    rows, columns, targets = [], [], []
    for s, sequence in enumerate(sequences):
        ids[s, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention_mask[s, : len(sequence.ids)] = 1
        for row, start, size in sequence.responses:
            keep[s, start - 1 : start + size - 1] = True
            rows += [row] * size
            columns += range(size)
            targets += sequence.ids[start : start + size]
    inputs = {"input_ids": ids.to(device), "attention_mask": attention_mask.to(device)}
    branched = any(sequence.branches for sequence in sequences)
    inputs |= tree_inputs(sequences, length, device) if branched else {}
    with tree_attention(model) if branched else nullcontext():
        logprobs = token_logprobs(model, inputs, keep.to(device), torch.tensor(targets, device=device), temperature)
    return logprobs, torch.tensor(rows, device=device), torch.tensor(columns, device=device)


@torch.no_grad()
def _scores(
    model, sequences: list[Sequence], shape: tuple[int, int], temperature: float, token_budget: int, progress
) -> Tensor:
    """Log-probs of everything in `sequences`, NaN elsewhere, as a tensor of `shape` on the CPU."""
    scores = torch.full(shape, float("nan"))
    training = model.training
    model.eval()
    for batch in progress(micro_batches(sequences, token_budget)):
        logprobs, rows, columns = sequence_logprobs(model, batch, temperature)
        scores[rows.cpu(), columns.cpu()] = logprobs.float().cpu()
    model.train(training)
    return scores


def response_logprobs(
    model,
    contexts: list[list[int]],
    responses: list[list[int]],
    *,
    temperature: float = 1.0,
    token_budget: int = 16384,
    packed: bool = True,
    progress=lambda batches: batches,
) -> Tensor:
    """log pi(y | h) of every response token, NaN beyond a row's end. -> (B, R) on the CPU.

    `packed=False` scores each row as a sequence of its own: the plain version, with the same numbers.
    """
    shape = len(responses), max(map(len, responses), default=0)
    return _scores(model, pack(contexts, responses, packed=packed), shape, temperature, token_budget, progress)


def tree_logprobs(
    model,
    contexts: list[list[int]],
    responses: list[list[int]],
    branches: list[list[int] | None],
    *,
    branches_only: bool = False,
    temperature: float = 1.0,
    token_budget: int = 16384,
    progress=lambda batches: batches,
) -> tuple[Tensor, Tensor]:
    """log pi(y | h) and, where a row has a second context h^ in `branches`, log pi(y | h^), in one pass over both.

    -> ((B, R), (B, R)), NaN where a row has no branch. K step skills cost K short branches rather than K long contexts;
    the numbers are those of `response_logprobs`. A model that cannot do this (see `tree_obstacle`) scores every second
    context by itself, and a notice is logged. `branches_only` leaves the first tensor NaN, and out what it needs.
    """
    if (obstacle := tree_obstacle(model)) and any(branches):
        _notice(f"{type(model).__name__} scores each step skill in a pass of its own: {obstacle}")
    trees = graft(pack(contexts, responses), branches, responses, 0 if obstacle else token_budget)
    count = len(responses)
    if branches_only:
        trees = [Sequence(t.ids, [r for r in t.responses if r[0] >= count], t.branches) for t in trees]
        trees = [tree for tree in trees if tree.responses]
    shape = 2 * count, max(map(len, responses), default=0)
    plain, branch = _scores(model, trees, shape, temperature, token_budget, progress).split(count)
    return plain, branch


def guided_steps(
    trajectories: list[Trajectory], routes: list[list[tuple[Guidance, ...]]], level: str
) -> Iterator[tuple[int, Trajectory, int, Guidance]]:
    """(row, trajectory, step, guidance) of each step with guidance of `level`; rows count steps pooled in order."""
    row = 0
    for trajectory, route in zip(trajectories, routes, strict=True):
        for t, guidances in enumerate(route):
            for guidance in guidances:
                if guidance.level == level:
                    yield row + t, trajectory, t, guidance
        row += len(trajectory.steps)


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
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    contexts: list[list[int] | None] = [None] * len(steps)
    too_long = 0
    for row, trajectory, t, guidance in guided_steps(trajectories, routes, level):
        context = guided_context(encoder, trajectory, t, guidance)
        if len(context) + len(steps[row].response) > context_limit:
            too_long += 1
        else:
            contexts[row] = context
    return contexts, too_long


def skill_logprobs(
    model,
    encoder: Encoder,
    trajectories: list[Trajectory],
    routes: list[list[tuple[Guidance, ...]]],
    level: str,
    *,
    context_limit: int,
    **scoring,
) -> tuple[Tensor, int]:
    """log pi(y | h^) of the very same response tokens under the contexts that one level of skills augments.

    -> ((B, R), NaN where a step has no guidance of this level; how many steps did not fit, see `guided_contexts`).
    `scoring` goes to `response_logprobs`. For step skills this is the plain version of `tree_logprobs`.
    """
    contexts, too_long = guided_contexts(encoder, trajectories, routes, level, context_limit=context_limit)
    responses = [step.response for trajectory in trajectories for step in trajectory.steps]
    return guided_logprobs(model, contexts, responses, **scoring), too_long


def guided_logprobs(model, contexts: list[list[int] | None], responses: list[list[int]], **scoring) -> Tensor:
    """`response_logprobs` of the rows that have a context; NaN for the others. -> (B, R)"""
    scores = torch.full((len(responses), max(map(len, responses), default=0)), float("nan"))  # (B, R)
    rows = [row for row, context in enumerate(contexts) if context is not None]
    if rows:
        guided = response_logprobs(model, [contexts[row] for row in rows], [responses[row] for row in rows], **scoring)
        scores[rows, : guided.shape[1]] = guided
    return scores


def layout_noise(model, contexts: list[list[int]], responses: list[list[int]], **scoring) -> float:
    """Mean |difference| a token, in nats, of two scorings of the same rows: packed and batched, and each row alone.

    In exact arithmetic it is 0. What it is here is the noise floor of A_skill, itself a difference of two scorings.
    """
    scores = response_logprobs(model, contexts, responses, **scoring)
    alone = response_logprobs(model, contexts, responses, **scoring | {"packed": False, "token_budget": 1})
    return (scores - alone).abs().nanmean().item()
