"""Whole next-token distributions in place of one log-prob, for the variants that need them. OPID does not.

A distribution over V words is V numbers, the hidden state that it comes from only H. So states travel, and
distributions are made of them CHUNK logits at a time.

Shapes: N and n tokens, H hidden size, V vocabulary. Student and teacher are log-probs; gradient flows into the student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm.scoring import (
    CHUNK,
    At,
    Sequence,
    attention_for,
    has_linear_head,
    head_logprobs,
    hidden_states,
    model_inputs,
)

Divergence = Callable[[Tensor, Tensor], Tensor]  # of log-probs of two models (n, V) each -> (n,)


def states_obstacle(model) -> str | None:
    """Why the distributions of this model cannot be had from its hidden states; None where they can."""
    return None if has_linear_head(model) else "its logits are not simply its output layer's"


def sequence_states(model, sequences: list[Sequence]) -> tuple[Tensor, Tensor, At]:
    """One forward pass -> states (N, H) that predict the response tokens, these tokens (N,), and where in the batch
    they belong. Gradient flows if enabled."""
    inputs, keep, targets, at = model_inputs(model, sequences)
    with attention_for(model, sequences):
        states = hidden_states(model, inputs)[keep]  # (N, H)
    return states, targets, at


def states_and_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, At]:
    """As `sequence_logprobs`, with the states (N, H) before the log-probs."""
    states, targets, at = sequence_states(model, sequences)
    return states, head_logprobs(model.get_output_embeddings(), states, targets, temperature, CHUNK), at


def layer_states(model, sequences: list[Sequence], layers: str) -> tuple[Tensor, At]:
    """What layers put out at the response tokens themselves, (N, K, H), and where in the batch these belong.

    `layers`: "last" (what the output layer reads), "all" or every second one, "even" (the first, the third, ...) or
    "odd". Gradient flows if enabled. Raises ValueError for another word.
    """
    chosen = {"last": slice(-1, None), "all": slice(1, None), "even": slice(1, None, 2), "odd": slice(2, None, 2)}
    if layers not in chosen:
        raise ValueError(f"layers must be one of {', '.join(chosen)}, not {layers!r}")
    inputs, keep, _, at = model_inputs(model, sequences)
    tokens = keep.roll(1, 1)  # (S, L) a response token stands one behind where it is predicted
    with attention_for(model, sequences):
        states = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
    return torch.stack([layer[tokens] for layer in states[chosen[layers]]], 1), at


def distribution(head, states: Tensor, temperature: float, words: int | None = None) -> Tensor:
    """Hidden states (n, H) -> log-probs in float32, (n, V), over the first `words` alone where it is given."""
    return torch.log_softmax(head(states)[:, :words].float() / temperature, -1)


def divergences(
    head,
    states: Tensor,  # (n, H) the policy's
    teacher_head,
    teacher_states: Tensor,  # (n, H)
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """`divergence` between policy and teacher at each token, (n,). Of both distributions no more than CHUNK log-probs
    are alive at any time: the backward pass makes each chunk again. Gradient flows into `states` and `head`.
    Models of one tokenizer may differ in how far their output layers are padded (Qwen2.5-3B and 7B): V is the smaller.
    """
    words = min(head.weight.shape[0], teacher_head.weight.shape[0])
    size = max(1, CHUNK // (2 * words))

    def part(states: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = distribution(teacher_head, others, temperature, words)  # (size, V)
        return divergence(distribution(head, states, temperature, words), theirs)

    chunks = zip(states.split(size), teacher_states.split(size), strict=True)
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


# ---- how far two distributions are apart -----------------------------------------------------------------------------


DIVERGENCES = ("reverse", "forward", "jsd")


def divergence(kind: str, student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """Of log-probs (n, V) each -> (n,), in nats, at least 0. Raises ValueError for an unknown kind.

    reverse  KL(p || q) = sum p (log p - log q): the student stays where the teacher is
    forward  KL(q || p) = sum q (log q - log p): the student covers all that the teacher does
    jsd      beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1)
    """
    if kind == "reverse":
        return kl(student, teacher)
    if kind == "forward":
        return kl(teacher, student)
    if kind == "jsd":
        shares = student.new_tensor([beta, 1 - beta]).log()  # (2,)
        between = torch.logaddexp(teacher + shares[0], student + shares[1])  # (n, V) log m
        return beta * kl(teacher, between) + (1 - beta) * kl(student, between)
    raise ValueError(f"unknown divergence {kind!r}; known: {', '.join(DIVERGENCES)}")


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum exp(a) (a - b), of log-probs (n, V) -> (n,)"""
    return (a.exp() * (a - b)).sum(-1)
