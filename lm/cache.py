"""The KV cache that is carried from turn to turn: it grows in place, loses the padding inside rows, and whole rows.

Shapes: B rows of length L; heads and size as the model has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lm.obstacles import text_config


class RoomyLayer(DynamicLayer):
    """Keys and values with room for a turn's tokens, so that each is written in place: transformers' own layer copies
    all that it holds for every new token. `dtype`: in which they are kept; None: as they come."""

    def __init__(self, room: int, dtype: torch.dtype | None):
        super().__init__()
        self.room, self.dtype = room, dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(B, heads, new, size) each -> (B, heads, L + new, size) each"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = appended(self.keys, key_states.to(self.dtype or key_states.dtype), self.room)
        self.values = appended(self.values, value_states.to(self.dtype or value_states.dtype), self.room)
        return self.keys, self.values


def appended(held: Tensor, new: Tensor, room: int) -> Tensor:
    """(B, heads, L, size) and (B, heads, n, size) -> (B, heads, L + n, size).

    In place where the memory of `held` has room behind each head's last column, which its strides say; else in new
    memory with room for `room` more.
    """
    length = held.shape[2] if held.numel() else 0
    grown = (*new.shape[:2], length + new.shape[2], new.shape[3])
    if not length or held.stride()[2:] != (held.shape[3], 1) or held.stride(1) < grown[2] * held.shape[3]:
        roomy = new.new_empty(*grown[:2], grown[2] + room, grown[3])
        roomy[:, :, :length] = held if length else 0
        held = roomy[:, :, :length]
    everything = held.as_strided(grown, held.stride(), held.storage_offset())
    everything[:, :, length:] = new
    return everything


def roomy_cache(model, room: int) -> DynamicCache:
    """An empty cache for `model`, whose layers of full attention grow in place.

    Under autocast SDPA rounds keys before it uses them, so that they may as well be kept rounded: rotary embeddings
    make them in float32.
    """
    kind = model.device.type
    rounds = torch.is_autocast_enabled(kind) and text_config(model)._attn_implementation == "sdpa"
    dtype = torch.get_autocast_dtype(kind) if rounds else None
    cache = DynamicCache(config=text_config(model))
    cache.layers = [RoomyLayer(room, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class CachedConversations:
    """Conversations that a cache has seen, a row each. The newest column of `ids` is not in the cache yet: `generate`
    reads it together with what comes next."""

    keys: list[int]  # which episode each row belongs to
    seen: list[list[int]]  # the ids behind each row, padding left out
    ids: Tensor  # (rows, length)
    mask: Tensor  # (rows, length) 0 on padding
    cache: DynamicCache  # keys and values of a layer: (rows, heads, length - 1, size)

    @property
    def spare(self) -> float:
        """The share of the columns that could be done without."""
        return 1 - max(map(len, self.seen)) / self.ids.shape[1]

    def compacted(self) -> CachedConversations:
        """The same without the padding inside rows: left-padded to the longest. Takes the cache over, a layer at a
        time, so that no second one is held.

        Exact, since keys carry their positions with them and position ids follow the mask. A row whose newest token is
        in the cache already has it read once more, as every row's newest column is.
        """
        longest = max(map(len, self.seen))
        # masked columns first, the others in their order: the last `longest` are the row
        columns = self.mask.argsort(dim=1, stable=True)[:, -longest:]  # (rows, longest)
        cached = columns[:, :-1, None].clamp(max=self.ids.shape[1] - 2)  # (rows, longest - 1, 1)

        def move(states: Tensor) -> Tensor:
            """(rows, heads, length - 1, size) -> (rows, heads, longest - 1, size)"""
            return states.gather(2, cached[:, None].expand(-1, states.shape[1], -1, states.shape[3]))

        layers: list[Any] = self.cache.layers  # of attention alone: no other cache is kept
        for layer in layers:
            layer.keys, layer.values = move(layer.keys), move(layer.values)
        ids, mask = self.ids.gather(1, columns), self.mask.gather(1, columns)
        return CachedConversations(self.keys, self.seen, ids, mask, self.cache)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.ids.device)
        self.keys, self.seen = [self.keys[row] for row in rows], [self.seen[row] for row in rows]
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.cache.batch_select_indices(index)
