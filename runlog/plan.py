"""What a run would need of memory: python train.py --plan [--recipe ...]

Estimated from the model's configuration, no weights loaded. Exact: weights, gradients, optimizer, copies, KV cache.
Activations are what autograd saves in a forward pass of this very architecture under this run's autocast, counted on
tensors without data and extended to --token-budget; the rest is arithmetic (see `_logits`, `_reading`). What a real run
took is in its first iteration's line and its `memory/peak_mib`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from config import LOCAL_WRITERS, Config
from lm.loading import add_lora
from lm.logprobs import CHUNK
from runlog import peak_mib
from tiny.loading import load_config

MIB = 2**20
LENGTH = 32  # tokens of a row on which activations are counted; short, so that its mask does not count


@dataclass
class Part:
    """`size` in bytes. `phase` says when it is held: always, while sampling (rollouts and skills), or in the update."""

    name: str
    size: float
    phase: str
    note: str


def plan(config: Config) -> list[Part]:
    """What a process holds at its peak, part by part. Raises what loading a model's configuration raises (OSError
    where the hub cannot be reached)."""
    architecture, dtype = load_config(config.model, config.env), getattr(torch, config.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        model = add_lora(model, config.lora_rank) if config.lora_rank else model
    weights = _bytes(model.parameters())
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    layers, hidden = architecture.num_hidden_layers, architecture.hidden_size
    a_token, fixed = _saved(architecture, config)
    whole = a_token * config.token_budget
    if config.gradient_checkpointing:  # the input of every layer, and one layer in full
        whole = whole / layers + layers * config.token_budget * hidden * _width(config.dtype)
    tokens = _tokens_sampled(config)
    parts = [
        Part("weights", weights, "always", f"{config.dtype}"),
        Part("reference copy", 0 if config.lora_rank else weights, "always", "none with LoRA: adapters off"),
        Part("teacher", _teacher(config), "always", "--teacher"),
        Part("EMA copy", weights if config.keeps_ema else 0, "always", "--scorer ema, --skill-writer ema"),
        Part("optimizer", 2 * trained, "always", "AdamW: two moments a trained weight"),
        Part("KV cache", tokens * _kv_bytes(architecture, config), "sampling", f"{tokens:,} tokens at most"),
        Part("reading prompts", tokens * _reading(architecture, config), "sampling", f"{tokens:,} tokens in one go"),
        Part("gradients", trained, "update", ""),
        Part("autocast copies", fixed, "update", "--mixed-precision: weights as they are multiplied"),
        Part("activations", whole, "update", f"{config.token_budget:,} tokens a pass (--token-budget)"),
        Part("logits", _logits(architecture, config), "update", "a chunk at a time"),
    ]
    if not torch.cuda.is_available():
        parts.append(Part("process", peak_mib(torch.device("cpu")) * MIB, "always", "Python and libraries, as of now"))
    return parts


def peak(parts: list[Part]) -> float:
    """Bytes: what is always held, and the larger of the two phases."""
    of = {phase: sum(p.size for p in parts if p.phase == phase) for phase in ("always", "sampling", "update")}
    return of["always"] + max(of["sampling"], of["update"])


def format_plan(parts: list[Part]) -> str:
    lines = [f"{'part':<18}{'MiB':>10}  {'held':<10}note"]
    lines += [f"{p.name:<18}{p.size / MIB:>10.1f}  {p.phase:<10}{p.note}".rstrip() for p in parts if p.size]
    return "\n".join([*lines, f"{'peak, estimated':<18}{peak(parts) / MIB:>10.1f}  a process"])


def _teacher(config: Config) -> int:
    if config.teacher is None:
        return 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(config.teacher), dtype=getattr(torch, config.dtype))
    return _bytes(model.parameters())


def _bytes(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _width(dtype: str) -> int:
    """Bytes of a number."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def _compute_width(config: Config) -> int:
    return 2 if config.mixed_precision == "bf16" else _width(config.dtype)


def _saved(architecture, config: Config) -> tuple[float, float]:
    """Bytes that a forward pass saves for the backward pass: (for each token, whatever their number).

    Of the model without adapters: where LoRA freezes a weight, its adapter saves the same input in its stead.
    """
    with FakeTensorMode():  # tensors without data that still have a device, which autocast asks for
        model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype)).train()
        one, two = (_saved_by(model, config, rows) for rows in (1, 2))
    return (two - one) / LENGTH, 2 * one - two


def _saved_by(model, config: Config, rows: int) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # each storage once, and kept, so that no address is used twice

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    # of four dimensions, as a mask of two would be looked into, and there is nothing in it
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    autocast = torch.autocast("cpu", torch.bfloat16) if config.mixed_precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in held.values())


def _tokens_sampled(config: Config) -> int:
    """Most tokens whose keys and values are held at a time, which may also all be read in one forward pass."""
    episodes = config.tasks * config.rollouts  # with many processes: each its share
    acting = episodes * config.context_limit
    if not config.writes_skills or config.skill_writer not in LOCAL_WRITERS:
        return acting
    writing = min(config.rollout_budget, episodes * (config.skill_context_limit or config.context_limit))
    return max(acting, writing)


def _kv_bytes(model, config: Config) -> int:
    """Keys and values of one token, all layers."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * head * _compute_width(config)


def _reading(model, config: Config) -> int:
    """What one layer holds of a token without gradient: its input and output, queries and attention, and the MLP's
    gate, up and their product. The next layer uses the same memory again."""
    return (4 * model.hidden_size + 3 * model.intermediate_size) * _compute_width(config)


def _logits(model, config: Config) -> int:
    """Logits, their log-softmax and its gradient, in float32, of one chunk (benchmarks/memory.py measures three)."""
    return 3 * 4 * min(config.token_budget * model.vocab_size, CHUNK)
