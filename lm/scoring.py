"""How a model reads: log p of given responses, in as few forward passes as the rows allow.

    rows (context, response) -> pack, graft -> sequences -> micro_batches -> sequence_logprobs -> log p

The same pass serves old, skill-augmented and reference log-probs, and, with gradient, the update. Which contexts are
read by which model: rescore.py.

Logits are the largest tensor of training a small model: 8192 tokens x 151,936 words are 4.6 GiB in float32, and a
backward pass holds three of that size. Here at most CHUNK logits are alive: each chunk of hidden states goes through
the output layer by itself, and the backward pass computes it again.

Shapes: B rows (steps), R longest response; a micro-batch holds S sequences of padded length L and N response tokens;
H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm.obstacles import other_layers, ropes, takes, text_config, unwrapped

CHUNK = 2**25  # tokens x vocabulary: 128 MiB of float32, and still 220 tokens a matrix product at 152k words

counted: Counter[str] = Counter()  # tokens sampled, scored and trained on since a run last took note (runlog/start.py)

_linear_heads: WeakKeyDictionary = WeakKeyDictionary()  # model -> whether its logits are head(hidden states)

At = tuple[Tensor, Tensor]  # batch rows (N,) and response columns (N,) of tokens, on the CPU: an index of (B, R)


@dataclass
class Sequence:
    """One row of model input: a conversation (the trunk), then the branches that leave it.

    `responses` lists what is scored in it, in order of position: (row of the batch, first position, length). `branches`
    lists (branching point, first position, length): a branch sees the trunk up to its branching point, and itself.
    """

    ids: list[int]
    responses: list[tuple[int, int, int]]
    branches: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def trunk(self) -> list[int]:
        return self.ids[: self.branches[0][1]] if self.branches else self.ids


# ---- many responses, no gradient -------------------------------------------------------------------------------------


def no_logprobs(responses: list[list[int]]) -> Tensor:
    """What nobody has scored: NaN, (B, R)."""
    return torch.full((len(responses), max(map(len, responses), default=0)), float("nan"))


def response_logprobs(
    model,
    contexts: Iterable[list[int] | None],
    responses: list[list[int]],
    *,
    temperature: float = 1.0,
    token_budget: int,
    packed: bool = True,
) -> Tensor:
    """log pi(y | h) of every response token. -> (B, R) on the CPU, NaN beyond a row's end and where a context is None.

    `token_budget`: the most padded tokens of one forward pass. `packed=False` scores each row as a sequence of its own:
    the plain version, with the same numbers.
    """
    shape = len(responses), max(map(len, responses), default=0)
    return score_sequences(model, pack(contexts, responses, packed=packed), shape, temperature, token_budget)


def tree_logprobs(
    model,
    contexts: list[list[int]],
    responses: list[list[int]],
    branches: list[list[int] | None],
    *,
    temperature: float = 1.0,
    token_budget: int,
    branches_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi(y | h) and, where a row has a second context h^ in `branches`, log pi(y | h^), in one pass over both.

    -> ((B, R), (B, R)), NaN where a row has no branch. K step skills cost K short branches, not K long contexts; the
    numbers are those of `response_logprobs`. A model that cannot do this (`tree_obstacle`) scores every second context
    by itself, and a notice is logged. `branches_only` leaves the first tensor NaN, and out what it needs.
    """
    obstacle = tree_obstacle(model)
    if obstacle and any(branches):
        notice(f"{type(model).__name__} scores each step skill in a pass of its own: {obstacle}")
    trees = graft(pack(contexts, responses), branches, responses, 0 if obstacle else token_budget)
    count = len(responses)
    if branches_only:
        trees = [Sequence(t.ids, [r for r in t.responses if r[0] >= count], t.branches) for t in trees]
        trees = [tree for tree in trees if tree.responses]
    shape = 2 * count, max(map(len, responses), default=0)
    scores = score_sequences(model, trees, shape, temperature, token_budget)  # (2B, R)
    return scores[:count], scores[count:]


@torch.no_grad()
def score_sequences(
    model, sequences: list[Sequence], shape: tuple[int, int], temperature: float, token_budget: int
) -> Tensor:
    """Log-probs of everything in `sequences`, NaN elsewhere, as a tensor of `shape` on the CPU."""
    scores = torch.full(shape, float("nan"))
    training = model.training
    model.eval()
    for micro in progress(micro_batches(sequences, token_budget), "score"):
        logprobs, at = sequence_logprobs(model, micro, temperature)
        scores[at] = logprobs.float().cpu()
    model.train(training)
    return scores


def layout_noise(
    model, contexts: list[list[int]], responses: list[list[int]], *, temperature: float, token_budget: int
) -> float:
    """Mean |difference| per token, in nats, of two scorings of the same rows: packed and batched, and each row alone.

    In exact arithmetic it is 0. What it is here is the noise floor of A_skill, itself a difference of two scorings.
    """
    scores = response_logprobs(model, contexts, responses, temperature=temperature, token_budget=token_budget)
    alone = response_logprobs(model, contexts, responses, temperature=temperature, token_budget=1, packed=False)
    return (scores - alone).abs().nanmean().item()


def progress(items: list, name: str) -> tqdm:
    """The items, with a progress bar in a terminal, of the main process alone."""
    main = not distributed.is_initialized() or distributed.get_rank() == 0
    return tqdm(items, name, leave=False, disable=None if main else True)


# ---- one forward pass ------------------------------------------------------------------------------------------------


def sequence_logprobs(model, sequences: list[Sequence], temperature: float) -> tuple[Tensor, At]:
    """One forward pass -> log-probs (N,) and where in the batch they belong. Gradient flows if enabled."""
    inputs, keep, targets, at = model_inputs(model, sequences)
    with attention_for(model, sequences):
        logprobs = token_logprobs(model, inputs, keep, targets, temperature)
    return logprobs, at


def model_inputs(model, sequences: list[Sequence]) -> tuple[dict[str, Tensor], Tensor, Tensor, At]:
    """-> what the model reads; where it predicts a response token, `keep` (S, L); those tokens (N,), all on the model's
    device; and where in the batch they belong.

    The causal shift lives here: the logits at position p - 1 predict the token at position p, so that `keep` is True
    at p - 1.
    """
    device = model.device
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)  # (S, L), right-padded
    attention_mask = torch.zeros_like(ids)  # (S, L)
    keep = torch.zeros(ids.shape, dtype=torch.bool)  # (S, L) True at p - 1 for a response token at p
    rows, columns, targets = [], [], []
    counted["trained" if torch.is_grad_enabled() else "scored"] += sum(len(s.ids) for s in sequences if s.responses)
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
        # an output layer draws no random numbers
        again = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(again)
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


# ---- rows -> sequences -----------------------------------------------------------------------------------------------


def pack(contexts: Iterable[list[int] | None], responses: list[list[int]], *, packed: bool = True) -> list[Sequence]:
    """Rows -> sequences. A row whose context extends the sequence before it, token by token, is packed into it.

    In "chat" style a trajectory of T turns becomes one sequence: one forward pass instead of T, with the same numbers,
    since causal attention gives a position nothing but its past. Where contexts do not extend one another ("window"
    style, or a template that drops old thoughts) every row stays alone, as all do with `packed=False`.
    A row whose context is None is left out.
    Raises ValueError for an empty context or response.
    """
    sequences: list[Sequence] = []
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if context is None:
            continue
        if not context or not response:
            raise ValueError(f"row {row} has an empty {'response' if context else 'context'}; nothing can be scored")
        if not (packed and sequences and context[: len(sequences[-1].ids)] == sequences[-1].ids):
            sequences.append(Sequence([], []))
        last = sequences[-1]
        last.ids = context + response
        last.responses.append((row, len(context), len(response)))
    return sequences


def micro_batches(sequences: list[Sequence], token_budget: int) -> list[list[Sequence]]:
    """Group sequences so that S x L stays within `token_budget` (a longer sequence goes alone). Longest first, so that
    a run that does not fit in memory fails at once, and little is lost to padding."""
    batches: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        if not batches or len(batches[-1][0].ids) * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def moved(sequences: list[Sequence], advantages: Tensor) -> list[Sequence]:
    """Those with a token whose advantage (B, R) is not 0, at least one: PPO-clip alone has no gradient at the others,
    such as those of GRPO's silent groups."""
    moving = [s for s in sequences if any(advantages[row, :size].any() for row, _, size in s.responses)]
    return moving or sequences[:1]  # its gradient is 0, which is a step, too: AdamW has moments


def graft(
    sequences: list[Sequence], contexts: list[list[int] | None], responses: list[list[int]], token_budget: int
) -> list[Sequence]:
    """Hang a second context of each row (None: it has none) on the packed sequence that holds the row.

    The new sequences hold what the old ones did, and the second contexts' responses as rows B + row:

        ids        [h_0 .. y_0 h_1 .. y_1 h_2 .. y_2 | rest of h^_1 from where it differs from h_1, y_1 | ... ]
        position    0 ..       p ..                  | p ..                                             |

    A second context is a sequence of its own where nothing is shared (it differs from the first token on, or its row
    was packed with no other: "window" style), or where the branch would push a sequence over `token_budget`.
    """
    trees = [Sequence(list(s.ids), list(s.responses), list(s.branches)) for s in sequences]
    home = {row: tree for tree in trees if len(tree.responses) > 1 for row, _, _ in tree.responses}
    alone: list[tuple[int, list[int]]] = []  # (row, second context)
    for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if context is None:
            continue
        tree = home.get(row)
        # the last token of a context predicts the response, so it always belongs to the branch
        shared = _common(tree.trunk, context[:-1]) if tree else 0
        branch = context[shared:] + response
        if tree is None or not shared or len(tree.ids) + len(branch) > token_budget:
            alone.append((row, context))
            continue
        start = len(tree.ids)
        tree.branches.append((shared, start, len(branch)))
        tree.responses.append((len(contexts) + row, start + len(branch) - len(response), len(response)))
        tree.ids += branch
    for sequence in pack([context for _, context in alone], [responses[row] for row, _ in alone]):
        placed = [(len(contexts) + alone[i][0], start, size) for i, start, size in sequence.responses]
        trees.append(Sequence(sequence.ids, placed))
    return trees


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---- branches: a conversation and its variants in one sequence -------------------------------------------------------
#
# A step skill changes a context from one point on. So the conversation (the trunk) is read once, and each changed
# ending (a branch) is put behind it in the same sequence. A branch sees the trunk up to where it leaves it, and itself.

TREE_ATTENTION = "opid_tree"  # the name of our attention in transformers' table


def tree_inputs(sequences: list[Sequence], length: int, device) -> dict[str, Tensor]:
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
    q, k, v = (states[:, :, :causal] for states in (query, key, value))
    parts = [sdpa_attention_forward(module, q, k, v, None, **options)[0]]
    if attention_mask is not None:
        parts += [sdpa_attention_forward(module, query[:, :, causal:], key, value, attention_mask, **options)[0]]
    return torch.cat(parts, 1), None


AttentionInterface.register(TREE_ATTENTION, causal_then_masked)


@contextmanager
def tree_attention(model) -> Generator[None]:
    """The model's layers use `causal_then_masked` inside."""
    config = text_config(model)  # that of other parts, such as one that sees, stays as it is
    before = config._attn_implementation
    config._attn_implementation = TREE_ATTENTION
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
