"""Sampling with Hugging Face `generate`, and the KV cache carried from turn to turn.

Sampling is temperature, and nothing else (top_p 1, top_k off, no repetition penalty). What is sampled must be what is
scored, so a model's own generation_config may not leak in.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lm.cache import CachedConversations, roomy_cache
from lm.encoder import closing_token
from lm.obstacles import cache_obstacle, cached_columns, padding_obstacle, unwrapped
from lm.scoring import counted

COMPACT_AT = 0.25  # share of spare columns at which a cache is compacted; the copy costs about as much as one new token

_own: WeakKeyDictionary = WeakKeyDictionary()  # model -> the generation settings that it came with


def end_of_turn_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the tokenizer's, those that the model's own configuration names, and what the
    chat template closes an assistant's turn with (of Qwen2.5 base models that is neither of the others)."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id, closing_token(tokenizer)] if i is not None})


def own_generation_config(model) -> GenerationConfig | None:
    """What a model came with, whatever sampling put in its place; None where it generates nothing."""
    core = unwrapped(model)
    return _own.get(core, getattr(core, "generation_config", None))


def temperature_sampling(model, tokenizer, *, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Temperature sampling and nothing else; temperature 0 is greedy.

    `generate` fills every option that is unset from `model.generation_config`, so that one is replaced, too, by one
    that holds token ids only (Qwen ships top_p 0.8, top_k 20, repetition_penalty 1.05).
    """
    _own.setdefault(unwrapped(model), model.generation_config)
    ends, pad = end_of_turn_ids(model, tokenizer), tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    config = GenerationConfig(
        eos_token_id=ends,
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
    )
    if temperature > 0:
        config.do_sample, config.temperature, config.top_k, config.top_p = True, temperature, 0, 1.0
    return config


class Draws(LogitsProcessor):
    """Chooses the token that each row's own random numbers say: the first at which the distribution function passes u.

    Left to itself, `generate` draws for all rows at once, so that what an episode samples would depend on the rows
    beside it. Here memory may be bounded (--rollout-budget) and rows may leave without another token being sampled,
    rounding aside. `record=True` keeps the log-probs of the chosen tokens.
    """

    def __init__(self, temperature: float, numbers: Tensor | None, start: int, record: bool):
        """`numbers` (rows, n): u of each row's coming tokens, 0 <= u < 1; None: the likeliest token each time. `start`:
        columns before the first one."""
        self.temperature, self.numbers, self.start = temperature or 1.0, numbers, start
        self.record = record
        self.logprobs: list[Tensor] = []  # one (rows,) a token
        self.finite: Tensor | bool = True

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids (rows, length so far), logits (rows, V) of the token to come -> (rows, V) with one left to choose."""
        logprobs = torch.log_softmax(logits.float() / self.temperature, -1)  # (rows, V)
        if self.numbers is None:
            chosen = logprobs.argmax(-1, keepdim=True)  # (rows, 1)
        else:
            below = logprobs.exp().cumsum(-1)  # (rows, V)
            total = below[:, -1:]  # (rows, 1) 1 but for rounding
            u = self.numbers[:, ids.shape[1] - self.start, None] * total
            chosen = torch.searchsorted(below, torch.minimum(u, total.nextafter(torch.zeros_like(total))), right=True)
            chosen = chosen.clamp(max=logits.shape[1] - 1)  # what is no number finds no place
        logprob = logprobs.gather(1, chosen)  # (rows, 1)
        if self.record:
            self.logprobs.append(logprob[:, 0])
        self.finite = logprob.isfinite().all() & self.finite
        return torch.full_like(logits, -torch.inf).scatter(1, chosen, 0.0)

    def recorded(self, columns: int) -> list[list[float]]:
        """Log-probs of the first `columns` tokens of each row."""
        return torch.stack(self.logprobs[:columns], 1).tolist()


class Sampler:
    """`generate` over a batch of contexts, one call a turn. Keeps the KV cache from turn to turn where contexts grow.

    A new turn's tokens are left-padded within their own chunk, and what `generate` wrote after a row's end-of-turn
    token is masked; position ids follow the mask, so padding inside a row changes nothing. Where more than `compact_at`
    of the columns could be done without, rows are moved together. Where any context does not extend what its row holds,
    all are read anew. Where the model's architecture makes padding matter (lm/obstacles.py) the cache is not kept, or
    not beyond a sliding window, and rows of unequal length are sampled apart. `record=True` keeps in `recorded` the
    log-prob of each sampled token: episode -> turn -> one a token.

    Memory: its caller keeps rows x length within `rollout_budget` (None: no bound), and contexts are read in pieces of
    at most `token_budget` rows x columns. Random numbers: of one seed, drawn from PyTorch's when a Sampler is made,
    each turn of each episode has its own.
    """

    compact_at = COMPACT_AT

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_new_tokens: int,
        temperature: float,
        reuse_cache: bool = True,
        record: bool = False,
        rollout_budget: int | None = None,
        token_budget: int | None = None,
    ):
        self.model, self.rollout_budget, self.token_budget = model, rollout_budget, token_budget
        # how many columns a cache may have that is kept, and that is filled in pieces
        self.columns = cached_columns(model) if cache_obstacle(model) is None else 0
        self.kept = self.columns if reuse_cache else 0
        self.pads = padding_obstacle(model) is None
        # `Draws` chooses, and leaves `generate` one token to take: a draw of its own would cost as much as half a layer
        self.config = temperature_sampling(model, tokenizer, max_new_tokens=max_new_tokens, temperature=0.0)
        self.ends, self.pad = set(self.config.eos_token_id), self.config.pad_token_id
        self.held: CachedConversations | None = None
        self.temperature, self.recorded = temperature, defaultdict(list) if record else None
        self.seed, self.turns = int(torch.randint(2**62, ())), Counter()

    def rows(self, length: int) -> int:
        """How many rows of at most `length` tokens may be sampled at a time: at least one."""
        return sys.maxsize if self.rollout_budget is None else max(1, self.rollout_budget // length)

    def __call__(self, keys: list[int], contexts: list[list[int]]) -> list[list[int]]:
        """Sample one response for each of `contexts`; `keys` name the episodes, so that finished ones leave."""
        if not self.pads:
            return self._by_length(keys, contexts)
        if self.held and not grows(self.held, keys, contexts):
            self.held = None
        if self.held and keys != self.held.keys:
            self.held.keep([self.held.keys.index(key) for key in keys])
        if self.held and self.held.spare > self.compact_at:
            self.held = self.held.compacted()
        return self._generate(keys, contexts)

    def _by_length(self, keys: list[int], contexts: list[list[int]]) -> list[list[int]]:
        """Rows of one length at a time, so that none has padding."""
        responses: dict[int, list[int]] = {}
        for length in sorted({len(context) for context in contexts}):
            rows = [row for row, context in enumerate(contexts) if len(context) == length]
            same = self._generate([keys[row] for row in rows], [contexts[row] for row in rows])
            responses |= dict(zip(rows, same, strict=True))
        return [responses[row] for row in range(len(contexts))]

    def _append(self, contexts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """What is held and the contexts' new tokens -> ids and mask, both (rows, length)."""
        seen = self.held.seen if self.held else [[] for _ in contexts]
        chunks = [context[len(before) :] for context, before in zip(contexts, seen, strict=True)]
        width, device = max(map(len, chunks)), self.model.device
        ids = torch.tensor([[self.pad] * (width - len(chunk)) + chunk for chunk in chunks], device=device)
        mask = torch.tensor([[0] * (width - len(chunk)) + [1] * len(chunk) for chunk in chunks], device=device)
        if self.held is None:
            return ids, mask
        return torch.cat([self.held.ids, ids], 1), torch.cat([self.held.mask, mask], 1)

    def _numbers(self, keys: list[int]) -> Tensor | None:
        """(rows, max_new_tokens): of each row's coming turn; None for greedy sampling."""
        if not self.temperature:
            return None
        draws = [np.random.default_rng((self.seed, key, self.turns[key])) for key in keys]
        numbers = np.stack([draw.random(self.config.max_new_tokens, np.float32) for draw in draws])
        return torch.from_numpy(numbers).to(self.model.device)

    @torch.no_grad()
    def _generate(self, keys: list[int], contexts: list[list[int]]) -> list[list[int]]:
        ids, mask = self._append(contexts)
        length = ids.shape[1] + self.config.max_new_tokens
        if self.held and length > self.kept:
            self.held = None
            ids, mask = self._append(contexts)
        cache = self.held.cache if self.held else None
        if cache is None and length <= self.columns:
            cache = roomy_cache(self.model, self.config.max_new_tokens)
        piece = max(1, self.token_budget // len(keys)) if self.token_budget and length <= self.columns else None
        self.config.prefill_chunk_size = piece
        draws = Draws(self.temperature, self._numbers(keys), ids.shape[1], self.recorded is not None)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self.config,
            logits_processor=LogitsProcessorList([draws]),
            synced_gpus=False,  # a sharded model is gathered, and nobody waits for other processes' tokens
            cache=cache,
        )
        if not draws.finite:
            raise FloatingPointError("a sampled token's log-prob is infinite or no number: the weights are spoilt")
        new = out.sequences[:, ids.shape[1] :].tolist()  # (rows, new tokens)
        responses = [self._cut(row) for row in new]
        self._note(keys, responses, draws)
        if out.sequences.shape[1] <= self.kept:
            written = [[1] * len(response) + [0] * (len(row) - len(response)) for row, response in zip(new, responses)]
            mask = torch.cat([mask, torch.tensor(written, device=mask.device)], 1)
            seen = [context + response for context, response in zip(contexts, responses)]
            self.held = CachedConversations(list(keys), seen, out.sequences, mask, out.cache)
        return responses

    def _note(self, keys: list[int], responses: list[list[int]], draws: Draws) -> None:
        """The turn is over: the next one has other random numbers."""
        self.turns.update(keys)
        counted["sampled"] += sum(map(len, responses))
        if self.recorded is not None:
            rows = draws.recorded(max(map(len, responses)))
            for key, response, row in zip(keys, responses, rows, strict=True):
                self.recorded[key].append(row[: len(response)])

    def _cut(self, tokens: list[int]) -> list[int]:
        """Up to the first end-of-turn token, which belongs to the response (the policy chose to stop)."""
        for i, token in enumerate(tokens):
            if token in self.ends:
                return tokens[: i + 1]
        return tokens


def grows(held: CachedConversations, keys: list[int], contexts: list[list[int]]) -> bool:
    """Whether each episode's context goes on from what its row holds."""
    seen = dict(zip(held.keys, held.seen, strict=True))
    return all(
        key in seen and len(context) > len(seen[key]) and context[: len(seen[key])] == seen[key]
        for key, context in zip(keys, contexts, strict=True)
    )


def generate(sampler: Sampler, contexts: list[list[int]]) -> list[list[int]]:
    """Independent responses to independent contexts -> their ids, in batches of like length within the sampler's
    budget. Make a Sampler for each call, without `reuse_cache`."""
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    responses: list[list[int]] = [[] for _ in contexts]
    while order:
        rows = sampler.rows(len(contexts[order[0]]) + sampler.config.max_new_tokens)
        batch, order = order[:rows], order[rows:]
        for i, response in zip(batch, sampler(batch, [contexts[i] for i in batch]), strict=True):
            responses[i] = response
    return responses
