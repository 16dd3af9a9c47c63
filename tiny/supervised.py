"""Next-token training on demonstrations: the loss, the batches and the loop, for a model of any size."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from tqdm import tqdm

from lm.scoring import Sequence, micro_batches, sequence_logprobs

DECISIVE = 2.5  # weight of a response that is given by what a skill says
SHOWN = 50  # latest steps whose mean loss is shown


def demonstration_loss(model, sequences: list[Sequence], others: float, *, autocast: bool = True) -> torch.Tensor:
    """Weighted mean of -log p a token, in nats: weight 1 on responses, DECISIVE on those that a skill decides, `others`
    on everything else."""
    scored = [Sequence(s.ids, [(row, 1, len(s.ids) - 1)]) for row, s in enumerate(sequences)]
    if not others:  # the output layer is a fifth of a small model's work: only where something is learnt
        scored = sequences
    weights = torch.tensor([weight for s in sequences for weight in token_weights(s, others)])  # (N,)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        logprobs, _ = sequence_logprobs(model, scored, 1.0)  # (N,)
    weights = weights.to(model.device)
    return -(logprobs * weights).sum() / weights.sum()


def token_weights(sequence: Sequence, others: float) -> list[float]:
    """Of each token but the first, or only of those of responses where nothing else is learnt."""
    decisive = getattr(sequence, "decisive", ())
    own = [(start, size, DECISIVE if turn in decisive else 1.0) for turn, start, size in sequence.responses]
    if not others:
        return [weight for _, size, weight in own for _ in range(size)]
    weights = [others] * (len(sequence.ids) - 1)
    for start, size, weight in own:
        weights[start - 1 : start - 1 + size] = [weight] * size
    return weights


def shuffled_batches(sequences: list[Sequence], tokens: int, epochs: int, seed: int) -> list[list[Sequence]]:
    """The batches of all epochs, each of at most `tokens` (a longer sequence goes alone). Neighbours in length share a
    batch, but which batch comes when is random."""
    rng, batches = random.Random(seed), []
    for _ in range(epochs):
        epoch = micro_batches(sequences, tokens)
        rng.shuffle(epoch)
        batches += epoch
    return batches


def teach(
    model,
    batches: list[list[Sequence]],
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[list[Sequence]], torch.Tensor],
    *,
    learning_rate: float,
    losses: list[float],
    after: Callable[[], None] = lambda: None,
    label: str = "cold start",
) -> None:
    """One step a batch, from the one after `losses`, which grows by each. `after` is called after every step. The rate
    rises in the first steps and then falls in a line."""
    warmup = min(50, 1 + len(batches) // 10)
    with tqdm(total=len(batches), initial=len(losses), desc=label, mininterval=2) as bar:
        for step in range(len(losses), len(batches)):
            loss = loss_of(batches[step])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * min(1.0, (step + 1) / warmup, 1.02 - step / len(batches))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(refresh=False, loss=f"{latest(losses):.3f}")
            bar.update()
            after()


def latest(losses: list[float]) -> float:
    """The mean of the last losses, in nats a token."""
    return sum(losses[-SHOWN:]) / len(losses[-SHOWN:])
