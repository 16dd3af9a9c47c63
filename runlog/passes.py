"""What one pass of each kind holds beyond the weights: sampling, scoring, update. See counting.py.

They are the run's own code (lm/logprobs.py, lm/sampler.py) on rows as long as they may be, with as many columns as
--token-budget lets through at a time.

Shapes: rows of `length` tokens, S x L a micro-batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from config import Config
from lm.logprobs import CHUNK, head_logprobs, hidden_states
from lm.obstacles import takes, text_config
from lm.sampler import Draws
from runlog.counting import Count, peak_of


@dataclass
class Pass:
    """Bytes: `peak` beyond the weights, of which `cache` are keys and values, and `copies` the weights as autocast
    multiplies them, which it keeps until a phase is over."""

    peak: float
    cache: float
    copies: float


class Passes:
    """The passes of one run; each is counted once, when it is first asked for."""

    def __init__(self, config: Config, architecture):
        self.config, self.architecture, self._counted = config, architecture, {}

    def sampling(self, rows: int, length: int) -> Pass:
        """`rows` x `length` keys and values, with the largest piece of a context being read, or one more token."""
        piece = min(length, max(1, self.config.token_budget // rows))
        passes = [
            self._count(f"sampling {rows} {length} {columns}", self._sample(rows, length, columns))
            for columns in sorted({1, piece})
        ]
        peak = max(peak for peak, _ in passes)
        return Pass(peak, rows * length * self.token_bytes(), passes[0][1])

    def scoring(self) -> Pass:
        """Log-probs without gradient."""
        peak, copies = self._count("scoring", self._score)
        return Pass(peak, 0, copies)

    def update(self) -> Pass:
        """A micro-batch forwards and backwards, with gradients there to add to, which are in its peak."""
        peak, _ = self._count("update", self._train)
        return Pass(peak, 0, self.scoring().copies)

    def token_bytes(self) -> int:
        """Keys and values of one token, all layers."""
        text = self.architecture.get_text_config(decoder=True)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * _heads(text) * size * self._dtype().itemsize

    def _dtype(self) -> torch.dtype:
        """Of what is multiplied."""
        return torch.bfloat16 if self.config.mixed_precision == "bf16" else getattr(torch, self.config.dtype)

    def _autocast(self):
        autocast = self.config.mixed_precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def _count(self, name: str, work) -> tuple[float, float]:
        if name not in self._counted:
            config = self.config
            self._counted[name] = peak_of(work, self.architecture, config.dtype, config.lora_rank)
        return self._counted[name]

    # ---- the work itself -----------------------------------------------------------------------------------------

    def _sample(self, rows: int, length: int, columns: int):
        """The last `columns` of each row are read, and a token is drawn."""

        def work(model, count: Count) -> None:
            text = text_config(model)
            size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            shape = rows, _heads(text), length - columns, size
            with torch.no_grad(), self._autocast():
                layers = range(text.num_hidden_layers if columns < length else 0)
                cache = DynamicCache([[torch.empty(shape, dtype=self._dtype()) for _ in "kv"] for _ in layers] or None)
                count.peaks = [count.held]  # what making it took is not asked for
                model.get_output_embeddings().register_forward_pre_hook(count.mark)
                ids, mask = torch.zeros(rows, columns, dtype=torch.long), torch.ones(rows, 1, columns, length).bool()
                few = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
                logits = model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, **few).logits
                count.mark()
                logits = logits[:, -1].to(copy=True, dtype=torch.float32)  # (rows, V), and as `generate` goes on
                logits = Draws(1.0, torch.zeros(rows, 1), columns, False)(ids, logits)
                torch.multinomial(torch.softmax(logits, -1), 1)
                del logits, cache, ids, mask
                count.kept = count.held

        return work

    def _score(self, model, count: Count) -> None:
        with torch.no_grad(), self._autocast():
            self._logprobs(model.eval(), count)
            count.kept = count.held

    def _train(self, model, count: Count) -> None:
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with self._autocast():
            logprobs = self._logprobs(model, count)
        logprobs.sum().backward()

    def _logprobs(self, model, count: Count) -> torch.Tensor:
        """As `sequence_logprobs` computes them, with the tokens to score at the end of each row."""
        config, head = self.config, model.get_output_embeddings()
        length = min(config.token_budget, config.context_limit)
        rows = config.token_budget // length
        ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, 1, length, length).bool()
        states = hidden_states(model, {"input_ids": ids, "attention_mask": mask})  # (S, L, H)
        responses = 1 if config.context == "window" else config.max_steps
        scored = rows * min(length, responses * config.max_new_tokens)
        states = states.flatten(0, 1).index_select(0, torch.arange(scored))  # (N, H)
        count.mark()
        if states.requires_grad:
            states.register_hook(count.mark)
        return head_logprobs(head, states, torch.zeros(scored, dtype=torch.long), config.temperature, CHUNK)


def _heads(text) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads
