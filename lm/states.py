"""What a model's output layer read at response tokens, kept: for whole distributions instead of one log-prob.

A distribution over V words is V numbers, the hidden state that it comes from only H. So states are what is stored, on
the CPU, and distributions are made of them again, CHUNK logits at a time, where they are needed.

Shapes: B rows (steps), R longest response, N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm.logprobs import CHUNK, asked, attention_for, has_linear_head, head_logprobs, hidden_states
from lm.packing import Sequence
from lm.parallel import gathered

Divergence = Callable[[Tensor, Tensor], Tensor]  # of log-probs of two models (n, V) each -> (n,)


def states_obstacle(model) -> str | None:
    """Why the distributions of this model cannot be had from its hidden states; None where they can."""
    return None if has_linear_head(model) else "its logits are not simply its output layer's"


def sequence_states(model, sequences: list[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward pass -> states (N, H) that predict the response tokens, these tokens (N,), their batch rows (N,) and
    response columns (N,). Gradient flows if enabled."""
    inputs, keep, targets, rows, columns = asked(model, sequences)
    with attention_for(model, sequences):
        states = hidden_states(model, inputs)[keep]  # (N, H)
    return states, targets, rows, columns


def states_and_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sequence_logprobs`, with the states before the log-probs: (N, H), then (N,) each."""
    states, targets, rows, columns = sequence_states(model, sequences)
    return states, head_logprobs(model.get_output_embeddings(), states, targets, temperature, CHUNK), rows, columns


def layer_states(model, sequences: list[Sequence], layers: str) -> tuple[Tensor, Tensor, Tensor]:
    """What layers put out at the response tokens themselves: (N, K, H), batch rows (N,) and response columns (N,).

    `layers`: "last" (what the output layer reads), "all" or every second one, "even" (the first, the third, ...) or
    "odd". Gradient flows if enabled. Raises ValueError for another word.
    """
    chosen = {"last": slice(-1, None), "all": slice(1, None), "even": slice(1, None, 2), "odd": slice(2, None, 2)}
    if layers not in chosen:
        raise ValueError(f"layers must be one of {', '.join(chosen)}, not {layers!r}")
    inputs, keep, _, rows, columns = asked(model, sequences)
    tokens = keep.roll(1, 1)  # (S, L) a response token stands one behind where it is predicted
    with attention_for(model, sequences):
        states = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
    return torch.stack([layer[tokens] for layer in states[chosen[layers]]], 1), rows, columns


class States:
    """The hidden states of one model at the response tokens that it scored."""

    def __init__(self, model, rows: int, columns: int):
        self.model = model
        self.at = torch.full((rows, columns), -1)  # (B, R) where a token's state lies, -1 where it has none
        self.head = None  # the output layer as it was, where the model's own changes meanwhile
        self.parts: list[Tensor] = []  # joined they are (N, H), on the CPU
        self.count = 0

    def add(self, states: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.at[rows.cpu(), columns.cpu()] = self.count + torch.arange(len(states))
        self.parts.append(states.detach().cpu())
        self.count += len(states)

    @property
    def known(self) -> Tensor:
        """(B, R) bool: whether there is a state."""
        return self.at >= 0

    def of_rows(self, first: int, last: int) -> States:
        """The rows from `first` to before `last`, the states themselves shared."""
        part = States(self.model, 0, 0)
        part.at, part.parts, part.count, part.head = self.at[first:last], self.parts, self.count, self.head
        return part

    def hold(self) -> None:
        """Keeps the output layer where the model is about to be trained: what was read stays what it was."""
        head = self.model.get_output_embeddings()
        if head.weight.requires_grad:
            self.head = copy.deepcopy(head).requires_grad_(False)

    @property
    def output_layer(self):
        return self.model.get_output_embeddings() if self.head is None else self.head

    def at_tokens(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, H) on the model's device. Every one of these tokens must be known."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0][self.at[rows, columns]].to(self.model.device)

    def logprobs(self, rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
        """Log-probs of the whole vocabulary at these tokens, (n, V)."""
        return distribution(self.output_layer, self.at_tokens(rows, columns), temperature)


def distribution(head, states: Tensor, temperature: float, words: int | None = None) -> Tensor:
    """Hidden states (n, H) -> log-probs in float32, (n, V), over the first `words` alone where it is given."""
    return torch.log_softmax(head(states)[:, :words].float() / temperature, -1)


@torch.no_grad()
def expected_shift(policy: States, skill: States, base: States, temperature: float) -> Tensor:
    """What A_skill is on average over the words that the policy might have sampled: its control variate.

        E = sum_v pi_old(v | h) (log pi(v | h^) - log pi_base(v)),  base: what A_skill is the difference to

    With pi_old itself as the base that is -KL(pi_old(. | h) || pi(. | h^)), never above 0: on average every sampled
    token is blamed. A token's A_skill less E is 0 on average (vOPD, arXiv 2605.07865). -> (B, R) on the CPU, NaN where
    any of the three has no state.
    """
    known = policy.known & skill.known & base.known  # (B, R)
    expected = torch.full(known.shape, float("nan"))
    rows, columns = known.nonzero(as_tuple=True)  # (N,) each
    size = max(1, CHUNK // (3 * policy.model.get_output_embeddings().weight.shape[0]))
    with gathered(policy.model), gathered(skill.model), gathered(base.model):
        for first in range(0, len(rows), size):  # never, where nothing was guided
            r, c = rows[first : first + size], columns[first : first + size]  # (size,) each
            old, guided = policy.logprobs(r, c, temperature), skill.logprobs(r, c, temperature)  # (size, V) each
            plain = old if base is policy else base.logprobs(r, c, temperature)  # (size, V)
            expected[r, c] = (old.exp() * (guided - plain)).sum(-1).cpu()
    return expected


def divergences(
    model,
    states: Tensor,  # (n, H) the policy's
    teacher: States,
    rows: Tensor,  # (n,) of the teacher's states
    columns: Tensor,  # (n,)
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """`divergence` between policy and teacher at each token, (n,). Of both distributions no more than CHUNK log-probs
    are alive at any time: the backward pass makes each chunk again. Gradient flows into `states` and the output layer.
    Models of one tokenizer may differ in how far their output layers are padded (Qwen2.5-3B and 7B): V is the smaller.
    """
    head, other = model.get_output_embeddings(), teacher.output_layer
    words = min(head.weight.shape[0], other.weight.shape[0])
    size = max(1, CHUNK // (2 * words))

    def part(states: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = distribution(other, others, temperature, words)  # (size, V)
        return divergence(distribution(head, states, temperature, words), theirs)

    parts = [states.new_zeros(0, dtype=torch.float32)]
    for first in range(0, len(rows), size):  # never, where the teacher knows none of the tokens
        here = slice(first, first + size)
        others = teacher.at_tokens(rows[here], columns[here])
        parts.append(checkpoint(part, states[here], others, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)
