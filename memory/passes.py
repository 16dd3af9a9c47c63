"""What one pass of each kind holds beyond the weights, and does: sampling, scoring, update. See counting.py.

They are the run's own code (lm/scoring.py, lm/sampler.py). For memory: on rows as long as they may be, with as many
columns as --token-budget lets through at a time. For hours: on rows as long as they are expected to be.

Shapes: rows of `length` tokens, S x L a micro-batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from config import Config
from lm.cache import RoomyLayer, roomy_cache
from lm.obstacles import takes
from lm.sampler import Draws
from lm.scoring import CHUNK, head_logprobs, hidden_states
from memory.counting import Count, Shells, Work


@dataclass
class Pass:
    """Bytes: `peak` beyond the weights, of which `copies` are the weights as autocast multiplies them, which it keeps
    until a phase is over, and `cache` keys and values. `work`: what it does."""

    peak: float
    copies: float
    cache: float
    work: Work


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: S rows of length L, with so many tokens to score in each."""

    rows: int
    length: int
    scored: int


# What this process has counted, by architecture and types of the weights: name of a pass -> Pass
_COUNTED: dict[tuple, tuple[Shells, dict[str, Pass]]] = {}


class Passes:
    """The passes of one run; each is counted once in a process, for all runs of such weights."""

    def __init__(self, config: Config, architecture):
        self.config = config
        model = repr(architecture.to_dict() | {"_name_or_path": ""}), architecture._attn_implementation
        key = (type(architecture), *model, config.dtype, config.lora_rank, config.mixed_precision)
        if key not in _COUNTED:
            _COUNTED[key] = Shells(architecture, config.dtype, config.lora_rank), {}
        self._shells, self._counted = _COUNTED[key]

    def sampling(self, rows: int, length: int) -> Pass:
        """`rows` x `length` keys and values, with the largest piece of a context being read, or one more token."""
        piece = min(length, max(1, self.config.token_budget // rows))
        return max((self.reading(rows, length, n) for n in sorted({1, piece})), key=lambda each: each.peak)

    def reading(self, rows: int, length: int, columns: int, room: int = 0) -> Pass:
        """The last `columns` of each row are read, and a token is drawn. `room` that the cache has for them: without it
        the cache is copied, as it is once a turn."""
        return self._count(f"sampling {rows} {length} {columns} {room}", self._sample(rows, length, columns, room))

    def scoring(self, shape: Shape | None = None) -> Pass:
        """Log-probs without gradient."""
        shape = shape or self.longest()
        return self._count(f"scoring {shape}", lambda model, count: self._score(model, count, shape))

    def update(self, shape: Shape | None = None) -> Pass:
        """A micro-batch forwards and backwards, with gradients there to add to, which are in its peak."""
        shape, again = shape or self.longest(), self.config.gradient_checkpointing
        counted = self._count(f"update {shape} {again}", lambda model, count: self._train(model, count, shape))
        return replace(counted, copies=self.scoring(shape).copies)

    def longest(self) -> Shape:
        """The largest micro-batch that is read."""
        config = self.config
        rows = max(1, config.token_budget // config.context_limit)
        length = max(config.context_limit, config.token_budget // rows)
        responses = 1 if config.context == "window" else config.max_steps
        return Shape(rows, length, min(length, responses * config.max_new_tokens))

    def _autocast(self):
        autocast = self.config.mixed_precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def _count(self, name: str, work) -> Pass:
        if name not in self._counted:
            self._counted[name] = Pass(*self._shells.count(work))
        return self._counted[name]

    # ---- the work itself -----------------------------------------------------------------------------------------

    def _sample(self, rows: int, length: int, columns: int, room: int):
        def work(model, count: Count) -> None:
            few = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
            with torch.no_grad(), self._autocast():
                cache, a_token = self._cache(model, rows, length - columns, room)
                count.cache = rows * length * a_token
                count.peaks, count.work = [count.held], Work()  # what making it took is not asked for
                model.get_output_embeddings().register_forward_pre_hook(count.mark)
                ids = torch.zeros(rows, columns, dtype=torch.long)
                mask = torch.ones(rows, 1, columns, length, dtype=torch.bool)
                logits = model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, **few).logits
                count.mark()
                logits = logits[:, -1].to(copy=True, dtype=torch.float32)  # (rows, V), and as `generate` goes on
                logits = Draws(1.0, torch.zeros(rows, 1), columns, False)(ids, logits)
                logits.argmax(-1)
                del logits, cache, ids, mask
                count.kept = count.held

        return work

    def _cache(self, model, rows: int, length: int, room: int) -> tuple[DynamicCache, int]:
        """Keys and values of `rows` x `length` tokens, and the bytes of one, in the types in which the sampler keeps
        them."""
        one, cache = roomy_cache(model, 0), DynamicCache()
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), cache=one, use_cache=True)
        layers: list[Any] = one.layers  # of attention alone: no other cache is kept
        pairs = [(layer.keys, layer.values) for layer in layers]  # (1, heads, 1, size) each
        for pair in pairs:
            layer = RoomyLayer(room, pair[0].dtype)
            cache.layers.append(layer)
            layer.update(*(x.new_empty(rows, x.shape[1], length, x.shape[3]) for x in pair))
        return cache, sum(x.nbytes for pair in pairs for x in pair)

    def _score(self, model, count: Count, shape: Shape) -> None:
        with torch.no_grad(), self._autocast():
            self._logprobs(model.eval(), count, shape)
            count.kept = count.held

    def _train(self, model, count: Count, shape: Shape) -> None:
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with self._autocast():
            logprobs = self._logprobs(model, count, shape)
        logprobs.sum().backward()

    def _logprobs(self, model, count: Count, shape: Shape) -> torch.Tensor:
        """As `sequence_logprobs` computes them, with the tokens to score at the end of each row."""
        rows, length = shape.rows, shape.length
        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
        if rows > 1 or not torch.is_grad_enabled():  # there is padding, or branches
            inputs["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
        states = hidden_states(model, inputs)  # (S, L, H)
        scored = rows * shape.scored
        states = states.flatten(0, 1).index_select(0, torch.arange(scored))  # (N, H)
        count.mark()
        if states.requires_grad:
            states.register_hook(count.mark)
        head, targets = model.get_output_embeddings(), torch.zeros(scored, dtype=torch.long)
        return head_logprobs(head, states, targets, self.config.temperature, CHUNK)
