"""log p of given tokens: one forward pass over packed sequences, the output layer a chunk of tokens at a time.

Logits are the largest tensor of training a small model: 8192 tokens x 151,936 words are 4.6 GiB in float32, and a
backward pass holds three of that size. Here no more than CHUNK logits are alive at any time: each chunk of hidden
states goes through the output layer by itself, and the backward pass computes it again rather than keep it.

Shapes: S sequences of padded length L, N response tokens asked for, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm.branches import tree_attention, tree_inputs
from lm.obstacles import takes, text_config
from lm.packing import Sequence

CHUNK = 2**25  # tokens x vocabulary: 128 MiB of float32, and still 220 tokens a matrix product at 152k words

_linear_heads: WeakKeyDictionary = WeakKeyDictionary()  # model -> whether its logits are head(hidden states)


At = tuple[Tensor, Tensor]  # batch rows (N,) and response columns (N,) of tokens, on the CPU: an index of (B, R)


def sequence_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, At]:
    """One forward pass -> log-probs (N,) and where in the batch they belong. Gradient flows if enabled.

    The causal shift lives here and nowhere else: the logits at position p - 1 predict the token at position p, so
    logits are asked for at p - 1 only.
    """
    inputs, keep, targets, at = asked(model, sequences)
    with attention_for(model, sequences):
        logprobs = token_logprobs(model, inputs, keep, targets, temperature)
    return logprobs, at


def asked(model, sequences: list[Sequence]) -> tuple[dict[str, Tensor], Tensor, Tensor, At]:
    """-> what the model reads; where it predicts a response token, `keep` (S, L); those tokens (N,), all on the model's
    device; and where in the batch they belong."""
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
    if any(sequence.branches for sequence in sequences):
        inputs |= tree_inputs(sequences, length, device)
    return inputs, keep.to(device), _ids(targets, device), (_ids(rows, "cpu"), _ids(columns, "cpu"))


def attention_for(model, sequences: list[Sequence]):
    """A context in which the model may read these sequences."""
    return tree_attention(model) if any(sequence.branches for sequence in sequences) else nullcontext()


def _ids(values: list[int], device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)  # of none, too, which are no integers otherwise


def token_logprobs(
    model, inputs: dict[str, Tensor], keep: Tensor, targets: Tensor, temperature: float, chunk: int | None = None
) -> Tensor:
    """Log-probs (N,) of `targets` (N,), each predicted at a True position of `keep` (S, L) in row-major order.

    `inputs` goes to the model as it is. Where all logits (N, V) fit in one chunk (CHUNK unless told otherwise), or are
    not simply the output layer's (see `has_linear_head`), the model computes them itself.
    """
    chunk = CHUNK if chunk is None else chunk
    vocabulary = text_config(model).vocab_size if hasattr(model, "config") else 0
    if len(targets) * vocabulary > chunk and has_linear_head(model):
        return chunked_logprobs(model, inputs, keep, targets, temperature, chunk)
    # A boolean mask keeps its True positions in row-major order, which is the order of `targets`.
    if takes(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[keep]
    return chosen_logprobs(logits, targets, temperature)


def chunked_logprobs(
    model, inputs: dict[str, Tensor], keep: Tensor, targets: Tensor, temperature: float, chunk: int
) -> Tensor:
    """The same numbers and gradients with at most `chunk` logits alive (one token's, where that is more)."""
    states = hidden_states(model, inputs)[keep]  # (N, H)
    return head_logprobs(model.get_output_embeddings(), states, targets, temperature, chunk)


def head_logprobs(head, states: Tensor, targets: Tensor, temperature: float, chunk: int) -> Tensor:
    """Hidden states (N, H) -> log-probs (N,), `chunk` logits at a time."""
    size = max(1, chunk // head.weight.shape[0])

    def score(states: Tensor, targets: Tensor) -> Tensor:
        return chosen_logprobs(head(states), targets, temperature)

    parts = zip(states.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        options = {"use_reentrant": False, "preserve_rng_state": False}  # an output layer draws no random numbers
        return torch.cat([checkpoint(score, *part, **options) for part in parts])
    return torch.cat([score(*part) for part in parts])


def hidden_states(model, inputs: dict[str, Tensor]) -> Tensor:
    """What the output layer reads, (S, L, H).

    Taken on its way out of the decoder while the model runs as a whole, so that whatever wraps the model (LoRA
    adapters, or adapters that are switched off) has its say.
    """
    held: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: held.append(output[0]))
    try:
        model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        hook.remove()
    return held[0]


@torch.no_grad()
def has_linear_head(model) -> bool:
    """Whether the model's logits are one linear layer of its hidden states, bit for bit on a few tokens.

    False where something comes after that layer: soft-capping (Gemma 2), a scale (Cohere, Granite). Tried once a model,
    and logged where it is False. A model that has no such parts counts as False, too.
    """
    if model not in _linear_heads:
        training = model.training
        model.eval()
        _linear_heads[model] = linear = _logits_are_linear(model)
        model.train(training)
        if not linear:
            logging.getLogger(__name__).warning(
                "%s changes the logits of its output layer: they are held as a whole, which takes more memory",
                type(model).__name__,
            )
    return _linear_heads[model]


def _logits_are_linear(model) -> bool:
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not torch.nn.Linear or decoder is model:
        return False
    inputs = {"input_ids": torch.arange(4, device=model.device)[None]}
    logits, states = model(**inputs, use_cache=False).logits, hidden_states(model, inputs)
    return states.shape[-1] == head.in_features and torch.equal(head(states), logits)


def chosen_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-softmax in float32 of logits / temperature, the distribution that was sampled from. (n, V) -> (n,)"""
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, targets[:, None])[:, 0]
