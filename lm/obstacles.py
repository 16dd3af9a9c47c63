"""What a model's architecture allows without changing its numbers: a cache kept over turns, padding, packed rows,
norms in one kernel.

Log-probs when sampled must equal log-probs when scored, so each shortcut is taken only where it is exact. What the
configuration says is read from it (a window of 4096 tokens cannot be tried out at the start of a run); what shows on a
few tokens is tried on a few tokens.

Shapes: S sequences of length L, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# |difference| of a log-prob, in nats, that is taken for rounding: the largest of a few tokens', and the mean of a
# rollout's. Measured on SmolLM2-135M, sampled with a cache and scored packed: largest 3e-5 and mean 3e-6 in float32,
# 0.5 and 0.04 in bfloat16. Padding that a model takes in costs 0.2 to 6 nats.
NOISE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.25}
MEAN_NOISE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.04}
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "attention_window_size",
    "local_attention",
    "keep_window_size",
)
LENGTHS = ("max_position_embeddings", "max_seq_len")  # how many positions a model has, where it has a table of them
PROBE = 6  # tokens of a tried sequence

plain_norms: dict = {}  # class of RMSNorms -> its own `forward`; None where ours would give other numbers
_tried: WeakKeyDictionary = WeakKeyDictionary()  # model -> (left, inside), see padding_changes


class Mendable(ValueError, RuntimeError):
    """What the user can mend while a run is under way: it ends in one line (runlog/ending.py)."""


def unwrapped(model):
    """The transformers model itself, inside LoRA adapters or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model):
    """The language model's configuration; models that also see or hear (Gemma 3) keep it in an outer one."""
    return model.config.get_text_config(decoder=True)


def takes(model, name: str) -> bool:
    """Whether the model's forward pass has a parameter of this name."""
    return name in inspect.signature(unwrapped(model).forward).parameters


def ropes(config) -> list[dict]:
    """The parameters of each kind of rotary embedding; some models have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return nested or [parameters]


def other_layers(model) -> list[str]:
    """Kinds of layers that are not full attention over all tokens before, as the configuration names them."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        windowed = next((name for name in WINDOWS if getattr(config, name, None)), None)
        kinds = [{None: "full_attention", "sliding_window": "sliding_attention"}.get(windowed, windowed)]
    return sorted({str(kind) for kind in kinds} - {"full_attention"})


def cache_obstacle(model) -> str | None:
    """Why keys and values cannot be kept from one turn to the next, where rows have padding inside; None if they can
    (up to `cached_columns`).

    Recurrent and convolutional states take padding in, some positions count it. Whatever is not known to be exact
    counts as an obstacle: then each turn reads its whole context again.
    """
    core = unwrapped(model)
    if layers := [layer for layer in other_layers(model) if layer != "sliding_attention"]:
        return f"it has layers that are not full attention ({', '.join(layers)})"
    if getattr(core, "_is_stateful", False) or not (core._supports_default_dynamic_cache() and takes(core, "cache")):
        return "it keeps a state of its own in place of keys and values"
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    others = {kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}}
    if others:
        return f"its cache has layers of other kinds than keys and values ({', '.join(sorted(others))})"
    if not takes(model, "position_ids"):
        return "it takes no position ids, so that padding inside a row moves what comes after"
    left, inside = padding_changes(model)
    if max(left, inside) > NOISE[dtypes(model)[0]]:
        return f"padding inside a row changes its log-probs (by {max(left, inside):.2g} nats on a few tokens)"
    return None


def dtypes(model) -> list[torch.dtype]:
    """Of the weights, the one that rounds most first."""
    found = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return sorted(found, key=lambda dtype: -torch.finfo(dtype).eps)


def cached_columns(model) -> float:
    """How many columns a kept cache may have: a sliding window counts padding, too, so it must leave none out yet."""
    if "sliding_attention" not in other_layers(model):
        return math.inf
    return (getattr(text_config(model), "sliding_window", None) or 1) - 1


def padding_obstacle(model) -> str | None:
    """Why rows of unequal length cannot be sampled in one batch, padded on the left; None where they can."""
    left, _ = padding_changes(model)
    return (
        f"padding on the left changes its log-probs (by {left:.2g} nats on a few tokens)"
        if left > NOISE[dtypes(model)[0]]
        else None
    )


def sampling_note(model, *, reuse_cache: bool = True) -> str:
    """One line for the start of a run: how this model samples, and why not in the fastest way."""
    cache = cache_obstacle(model) if reuse_cache else "switched off"
    columns = "" if cached_columns(model) == math.inf else f", up to {cached_columns(model)} tokens of a sliding window"
    kept = (
        f"the cache is kept from turn to turn{columns}"
        if cache is None
        else f"each turn reads its whole context: {cache}"
    )
    padding = padding_obstacle(model)
    return kept + (f"; rows of unequal length are sampled apart: {padding}" if padding else "")


@torch.no_grad()
def padding_changes(model) -> tuple[float, float]:
    """Largest |change| of a next-token log-prob, in nats, by padding on the left and by padding inside a row.

    Tried once a model, through `generate`, which makes position ids from the mask. No random number is drawn.
    """
    if model not in _tried:
        training = model.training
        model.eval()
        ids, gap = _probe_ids(model, PROBE), torch.zeros(3, dtype=torch.long)
        first, rest, ones = ids[: PROBE // 2], ids[PROBE // 2 :], torch.ones(PROBE, dtype=torch.long)
        padded = torch.stack([torch.cat([gap, ids]), torch.cat([first, gap, rest])])  # (2, L)
        mask = torch.stack([torch.cat([gap, ones]), torch.cat([ones[: len(first)], gap, ones[len(first) :]])])
        mixed = (
            len(dtypes(model)) > 1
        )  # a frozen copy that was rounded as autocast would round it runs under autocast alone
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            alone = _next_logprobs(model, ids[None], ones[None])  # (1, V)
            changes = (_next_logprobs(model, padded, mask) - alone).abs().amax(1)  # (2,)
        _tried[model] = tuple(changes.tolist())
        model.train(training)
    return _tried[model]


def _probe_ids(model, count: int) -> Tensor:
    """Ordinary tokens: the first few of a vocabulary are often special ones. (count,)"""
    return (torch.arange(count) * 7 + 11) % text_config(model).vocab_size


def _next_logprobs(model, ids: Tensor, mask: Tensor) -> Tensor:
    """(S, L) -> (S, V)"""
    options = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    ids, mask = ids.to(model.device), mask.to(model.device)
    # not synced: one process may ask alone
    out = model.generate(ids, attention_mask=mask, generation_config=options, synced_gpus=False)
    return out.logits[0].float().log_softmax(-1)


@torch.no_grad()
def next_logprobs(model) -> Tensor:
    """Log-probs of each next token after each of a few tokens, on the CPU. (2 PROBE, V)"""
    logits = model(input_ids=_probe_ids(model, 2 * PROBE)[None].to(model.device), use_cache=False).logits
    return logits[0].float().log_softmax(-1).cpu()


def check_model(model, context_limit: int) -> None:
    """Refuse a model whose log-probs depend on what else is in the batch, or on what comes after a token.

    Raises ValueError with the reason. Scoring packs turns, pads rows and shares batches, so neither may matter. Cheap:
    a few forward passes over a dozen tokens.
    """
    for rope in ropes(text_config(model)):
        if rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = text_config(model).max_position_embeddings
        if rope["rope_type"] == "longrope":
            original = rope.get("original_max_position_embeddings") or original
        if context_limit > original:
            raise ValueError(
                f"its {rope['rope_type']} position embedding depends on the longest row of a batch beyond {original} "
                f"tokens, so that log-probs would depend on their neighbours: lower --context-limit to {original}"
            )
    with torch.autocast(model.device.type, enabled=False):
        changes = scoring_changes(model)
    for what, change in changes.items():
        if not change <= NOISE[model.dtype]:  # NaN, too
            raise ValueError(f"{type(unwrapped(model)).__name__} cannot be trained: {what} (by {change:.2g} nats)")


@torch.no_grad()
def check_positions(model, limit: int) -> None:
    """Refuse contexts of up to `limit` tokens where the model has no position vectors for so many.

    Raises ValueError. Tried, with a token more than the configuration names, where positions are not rotated; before
    the model is on a GPU, where an index beyond a table ends the process.
    """
    config = text_config(model)
    known = next((n for name in LENGTHS if (n := getattr(config, name, None))), None)
    if known is None or limit <= known or any(ropes(config)):
        return
    try:
        model(input_ids=_probe_ids(model, known + 1)[None].to(model.device), use_cache=False)
    except (IndexError, RuntimeError):
        raise ValueError(
            f"it has positions for {known} tokens: --context-limit and --skill-context-limit must not be above {known}"
        ) from None


def untrained_positions(model, limits: dict[str, int]) -> str | None:
    """A warning that names the `limits` (flag -> tokens) beyond the positions that the model was trained on; None
    where there are none."""
    config = text_config(model)
    known = next((n for name in LENGTHS if (n := getattr(config, name, None))), None)
    for rope in ropes(config):
        if original := rope.get("original_max_position_embeddings"):  # of Qwen's YaRN, whose configuration keeps it
            known = max(known or 0, int(original * (rope.get("factor") or 1)))
    beyond = [f"{flag} {limit}" for flag, limit in limits.items() if known and limit > known]
    if not beyond:
        return None
    asked = " and ".join(beyond)
    return f"WARNING: the model was trained on {known} positions, fewer than {asked}: lower to {known}"


@torch.no_grad()
def scoring_changes(model) -> dict[str, float]:
    """Largest |change| of a log-prob, in nats, for each thing that should change none, tried on a few tokens."""
    training, device = model.training, model.device
    model.eval()
    ids = _probe_ids(model, 2 * PROBE)

    def score(rows: Tensor, mask: Tensor, placed: bool = False) -> Tensor:
        """(S, L) -> (S, PROBE, V). `placed`: with position ids."""
        inputs = {"input_ids": rows.to(device), "attention_mask": mask.to(device)}
        inputs |= {"position_ids": torch.arange(PROBE, device=device)[None]} if placed else {}
        out = model(**inputs, use_cache=False)
        return out.logits[:, :PROBE].float().log_softmax(-1)

    ones, short = torch.ones_like(ids), torch.cat([torch.ones(PROBE), torch.zeros(PROBE)]).long()
    padded = torch.cat([ids[:PROBE], torch.zeros(PROBE, dtype=torch.long)])
    alone = score(ids[None, :PROBE], ones[None, :PROBE])
    placed = score(ids[None, :PROBE], ones[None, :PROBE], placed=takes(model, "position_ids"))
    longer, right = score(torch.stack([ids, padded]), torch.stack([ones, short]))
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trained = score(ids[None, :PROBE], ones[None, :PROBE])
    model.train(training)
    return {
        "what comes after a token changes its log-probs": (longer - alone).abs().max().item(),
        "padding on the right changes its log-probs": (right - alone).abs().max().item(),
        "it does not count positions from 0, as sampling does": (placed - alone).abs().max().item(),
        "its log-probs in training mode are not those in evaluation mode": (trained - alone).abs().max().item(),
    }


def logprob_gap(sampled: list[list[float]], scored: Tensor) -> tuple[float, float]:
    """(largest, mean) |log p when sampled - log p when scored| of a token, in nats.

    `sampled`: B rows, of a `Sampler(record=True)`; `scored` (B, R): the same tokens' log-probs by the same model at the
    same temperature, NaN beyond a row's end. (0, 0) for no row. Raises ValueError where the two are not about the
    same tokens.
    """
    if [len(row) for row in sampled] != (~scored.isnan()).sum(1).tolist():
        raise ValueError("what was sampled and what was scored are not the same tokens")
    gaps = [(torch.tensor(row) - scored[i, : len(row)]).abs() for i, row in enumerate(sampled)]
    gaps = torch.cat(gaps) if gaps else torch.zeros(1)  # (tokens,)
    return gaps.max().item(), gaps.mean().item()


def check_gap(largest: float, mean: float, dtype: torch.dtype) -> None:
    """Raise Mendable where sampled and scored log-probs (`logprob_gap`) differ by more than rounding explains.

    `dtype`: the least precise type in use, of the weights or of mixed precision.
    """
    # In 16 bits the largest of a hundred thousand differences is a matter of chance, and only the mean tells.
    if not (mean <= MEAN_NOISE[dtype] and (dtype.itemsize == 2 or largest <= NOISE[dtype])):  # NaN, too
        raise Mendable(
            f"log-probs when sampled and when scored differ by {mean:.2g} nats on average and {largest:.2g} at most, "
            f"more than rounding in {dtype} explains: training would be wrong. Try --no-reuse-cache; if that does not "
            "help, this model cannot be trained here"
        )


def fuse_norms(model):
    """Every RMSNorm of `model` in one kernel of PyTorch's, not six: -> the model. Decoding is mostly small kernels.

    Classes are changed, not modules, so that copies and what is loaded later are, too. Each class is tried once, on
    random numbers on the CPU, and stays as it is unless all of them are the same: Gemma's multiplies by 1 + weight.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and kind not in plain_norms:
            plain_norms[kind] = kind.forward if same_bits(module) else None
            if plain_norms[kind]:
                kind.forward = fused_norm
    return model


def fused_norm(self, hidden_states: Tensor) -> Tensor:
    """(..., H) -> (..., H)"""
    size, weight = hidden_states.shape[-1:], self.weight
    if hidden_states.dtype == weight.dtype == torch.float32:
        return rms_norm(hidden_states, size, weight, self.variance_epsilon)
    # transformers rounds before it multiplies by the weight
    return weight * rms_norm(hidden_states, size, None, self.variance_epsilon)


@torch.no_grad()
def same_bits(module) -> bool:
    """Whether `fused_norm` and the module's own `forward` agree on random numbers, in float32 and bfloat16."""
    if not hasattr(module, "variance_epsilon") or getattr(module, "weight", None) is None:
        return False
    twin, draws = copy.deepcopy(module).to_empty(device="cpu").float(), torch.Generator("cpu").manual_seed(0)
    pairs = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
    for kept, read in pairs:  # of weights and states
        twin.weight.copy_(torch.randn(twin.weight.shape, generator=draws, device="cpu"))
        twin.to(kept)
        states = torch.randn(3, 5, *twin.weight.shape, generator=draws, device="cpu").to(read)
        try:
            own, ours = twin(states), fused_norm(twin, states)
        except (TypeError, RuntimeError):  # it reads more than states
            return False
        if own.dtype != ours.dtype or not torch.equal(own, ours):
            return False
    return True
