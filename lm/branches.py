"""One forward pass over a conversation and its variants: which token may see which, and at what position each stands.

A step skill changes a context from one point on. So the conversation (the trunk) is read once, and each changed ending
(a branch) is put behind it in the same sequence; a branch sees the trunk up to the point where it leaves it, and
itself. lm/packing.py lays such sequences out; here is the mask, and the attention that uses it.

Shapes: S sequences of padded length L, the longest branches' part M; heads and head size as the model has them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm.obstacles import other_layers, ropes, takes, text_config, unwrapped

NAME = "opid_tree"  # of our attention, in transformers' table


def tree_inputs(sequences: list, length: int, device) -> dict[str, Tensor]:
    """attention_mask (S, 1, M, L) of the last M positions, True where a query sees a key; position_ids (S, L).

    The positions before them are in every sequence's trunk, where a query sees all that came before: no mask is needed,
    and `causal_then_masked` gives them none. That takes M x L bytes a sequence instead of L x L, and half the time.
    """
    first = min(len(sequence.trunk) for sequence in sequences)  # L - M
    mask = torch.ones(length - first, length, dtype=torch.bool, device=device).tril(first)
    mask = mask.repeat(len(sequences), 1, 1, 1)  # (S, 1, M, L)
    positions = torch.zeros(len(sequences), length, dtype=torch.long)  # padding comes last, so that nothing sees it
    for s, sequence in enumerate(sequences):
        positions[s, : len(sequence.trunk)] = torch.arange(len(sequence.trunk))
        for point, start, size in sequence.branches:
            positions[s, start : start + size] = torch.arange(point, point + size)
            # neither the rest of the trunk nor earlier branches
            mask[s, 0, start - first : start - first + size, point:start] = False
    return {"attention_mask": mask, "position_ids": positions.to(device)}


def causal_then_masked(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' SDPA, once for the queries without a mask and once for the last M, which have one.

    query (S, heads, L, size), key and value (S, kv heads, L, size), attention_mask (S, 1, M, L) -> (S, L, heads, size)
    """
    causal = query.shape[2] - (0 if attention_mask is None else attention_mask.shape[2])
    before = [states[:, :, :causal] for states in (query, key, value)]
    parts = [sdpa_attention_forward(module, *before, None, **options)[0]]
    if attention_mask is not None:
        parts += [sdpa_attention_forward(module, query[:, :, causal:], key, value, attention_mask, **options)[0]]
    return torch.cat(parts, 1), None


AttentionInterface.register(NAME, causal_then_masked)


@contextmanager
def tree_attention(model) -> Iterator[None]:
    """The model's layers use `causal_then_masked` inside."""
    config = text_config(model)  # that of other parts, such as one that sees, stays as it is
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@cache
def notice(text: str) -> None:
    """Log it once."""
    logging.getLogger(__name__).warning(text)


def tree_obstacle(model) -> str | None:
    """Why this model cannot score branches in one pass with their trunk; None where it can."""
    if not hasattr(model, "config") or text_config(model)._attn_implementation != "sdpa":
        return "its attention is not 'sdpa', which takes a mask of any form"
    core = unwrapped(model)
    if layers := other_layers(core):
        return f"it has layers that are not full attention ({', '.join(layers)})"
    if not getattr(core, "_supports_attention_backend", False):
        return "it does not take its attention from transformers' AttentionInterface"
    if getattr(core, "_is_stateful", False) or not takes(core, "position_ids"):
        return "it is recurrent, or takes no position ids"
    for rope in ropes(text_config(core)):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f"its {rope['rope_type']} position embedding depends on the length of the whole input"
    return None
