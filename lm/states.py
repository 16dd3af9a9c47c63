"""What a model's output layer reads at response tokens: for whole distributions instead of one log-prob.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm.logprobs import CHUNK, At, asked, attention_for, has_linear_head, head_logprobs, hidden_states
from lm.packing import Sequence

Divergence = Callable[[Tensor, Tensor], Tensor]  # of log-probs of two models (n, V) each -> (n,)


def states_obstacle(model) -> str | None:
    """Why the distributions of this model cannot be had from its hidden states; None where they can."""
    return None if has_linear_head(model) else "its logits are not simply its output layer's"


def sequence_states(model, sequences: list[Sequence]) -> tuple[Tensor, Tensor, At]:
    """One forward pass -> states (N, H) that predict the response tokens, these tokens (N,), and where in the batch
    they belong. Gradient flows if enabled."""
    inputs, keep, targets, at = asked(model, sequences)
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
    inputs, keep, _, at = asked(model, sequences)
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
