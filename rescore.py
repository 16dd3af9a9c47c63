"""Log-probs of sampled responses. The only place that packs, pads, shifts and asks the model for log-probs.

The same functions serve the old, skill-augmented, reference and training passes.

Shapes: B rows (steps), R longest response; a micro-batch holds S packed sequences of padded length L and N response
tokens in all; V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Guidance, Trajectory
from rollout import Encoder
from router import guided_messages


@dataclass
class Sequence:
    """One row of model input. `responses` lists what is scored in it: (row of the batch, first position, length)."""

    ids: list[int]
    responses: list[tuple[int, int, int]]


def pack(contexts: list[list[int]], responses: list[list[int]], *, packed: bool = True) -> list[Sequence]:
    """Rows -> sequences. A row whose context extends the sequence before it, token by token, is packed into it.

    In "chat" style a trajectory of T turns becomes one sequence: one forward pass instead of T, with the same numbers,
    since causal attention gives a position nothing but its past. Where contexts do not extend one another ("window"
    style, or a template that drops old thoughts) every row stays alone. `packed=False` is the plain version.
    Raises ValueError for an empty context or response.
    """
    sequences: list[Sequence] = []
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if not context or not response:
            raise ValueError(f"row {row} has an empty {'response' if context else 'context'}; nothing can be scored")
        last = sequences[-1] if sequences else None
        if not (packed and last and len(context) >= len(last.ids) and context[: len(last.ids)] == last.ids):
            sequences.append(last := Sequence([], []))
        last.ids = context + response
        last.responses.append((row, len(context), len(response)))
    return sequences


def micro_batches(sequences: list[Sequence], token_budget: int) -> list[list[Sequence]]:
    """Group sequences so that S x L stays within `token_budget` (a longer sequence goes alone). Longest first, so that
    a run that does not fit in memory fails at once, and little is lost to padding."""
    batches: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        if not batches or len(batches[-1][0].ids) * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def sequence_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass -> log-probs (N,), their batch rows (N,) and response columns (N,). Gradient flows if enabled.

    The causal shift lives here and nowhere else: the logits at position p - 1 predict the token at position p, so
    logits are asked for at p - 1 only. Log-softmax is taken in float32 of logits / temperature, which is the
    distribution that was sampled from.
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
    logits = model(
        input_ids=ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_to_keep=keep.to(device),
        use_cache=False,
    ).logits  # (N, V): a boolean mask keeps its True positions in row-major order, which is the order of `targets`
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (N, V)
    chosen = logprobs.gather(-1, torch.tensor(targets, device=device)[:, None])[:, 0]  # (N,)
    return chosen, torch.tensor(rows, device=device), torch.tensor(columns, device=device)


@torch.no_grad()
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
    scores = torch.full((len(responses), max(map(len, responses), default=0)), float("nan"))  # (B, R)
    training = model.training
    model.eval()
    for batch in progress(micro_batches(pack(contexts, responses, packed=packed), token_budget)):
        logprobs, rows, columns = sequence_logprobs(model, batch, temperature)
        scores[rows.cpu(), columns.cpu()] = logprobs.float().cpu()
    model.train(training)
    return scores


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

    -> ((B, R), NaN where a step has no guidance of this level; how many steps were left unguided because their
    augmented context and response would not fit in `context_limit` tokens: they are never truncated).
    `scoring` goes to `response_logprobs`.
    """
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    scores = torch.full((len(steps), max(len(step.response) for step in steps)), float("nan"))  # (B, R)
    rows, contexts, too_long = [], [], 0
    for row, trajectory, t, guidance in guided_steps(trajectories, routes, level):
        context = guided_context(encoder, trajectory, t, guidance)
        if len(context) + len(steps[row].response) > context_limit:
            too_long += 1
            continue
        rows.append(row)
        contexts.append(context)
    if rows:
        guided = response_logprobs(model, contexts, [steps[row].response for row in rows], **scoring)
        scores[rows, : guided.shape[1]] = guided
    return scores, too_long
