"""LoRA adapters in peft's own format: read as a model, merged into a copy, and which weights they leave out."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from lm.obstacles import NOISE, next_logprobs, unwrapped

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TWICE = (".modules_to_save.weight", ".original_module.weight")  # what peft saves again of resized embeddings
NO_HUB = ("tiny", "tiny-2", "smollm2")  # names of models that come from no hub
NO_PEFT = "needs peft: pip install peft"
FEW = 0.01  # of the weights: no more than that may go without adapters and without a word


def base_of(name: str) -> str | None:
    """The base of the adapters in a folder, or behind a hub id; None where there are no adapters.

    Raises ValueError where the folder holds a whole model, too, or where the adapters name no base.
    """
    try:
        file = None if name in NO_HUB else find_adapter_config_file(name)
    except (OSError, HFValidationError):  # whoever loads the model says so
        return None
    if file is None:
        return None
    folder = Path(name)
    if whole := next((whole for whole in WHOLE if (folder / whole).exists()), None):
        raise ValueError(f"{name} holds adapters and a whole model ({whole}): keep one of the two")
    if folder.is_dir() and not any((folder / weights).exists() for weights in WEIGHTS):
        raise ValueError(f"{name} holds {CONFIG} and no {WEIGHTS[0]}: the adapters themselves are missing")
    config = json.loads(Path(file).read_text())
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if revision not in (None, "main"):
        raise ValueError(
            f"{name} holds adapters of revision {revision} of {base}: name a folder that has it in {CONFIG}"
        )
    if not base:
        raise ValueError(f"{name} holds adapters that name no base: write it into {CONFIG}, base_model_name_or_path")
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)  # beside the adapters
    if Path(base).is_dir() and folder.is_dir() and Path(base).samefile(folder):
        raise ValueError(f"{name} holds adapters that name themselves as their base")
    return base


def with_adapters(model, name: str):
    """A float32 model with the adapters of `name` merged into it -> the model, all of whose weights are trainable.

    Raises ValueError where they do not fit, cannot be merged, or where merging changes what they compute.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{name} holds adapters, and reading them {NO_PEFT}") from error
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import load_peft_weights

    try:
        config, weights = peft.PeftConfig.from_pretrained(name), load_peft_weights(name, device="cpu")
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type.value} is part of the prompt, and no part of the weights")
        config.inference_mode = True
        _make_room(model, weights, tied=getattr(config, "ensure_weight_tying", False))
        adapted = peft.get_peft_model(model, config).eval()
        found = peft.set_peft_model_state_dict(adapted, weights)
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "default")
        wrong = [key for key in found.missing_keys if prefix in key]
        wrong += [key for key in found.unexpected_keys if not key.endswith(TWICE)]
        if wrong:
            raise ValueError(f"{len(wrong)} weights are in one of the two alone, such as {wrong[0]}")
        before = next_logprobs(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
        change = (next_logprobs(merged) - before).abs().max().item()
        if not change <= NOISE[torch.float32]:  # NaN, too
            raise ValueError(f"merging them changes log-probs by {change:.2g} nats")
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError, OSError) as error:
        raise ValueError(f"the adapters in {name} cannot be merged into their base: {first_line(error)}") from None
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return _tied_as_they_are(merged).requires_grad_(True)


def first_line(error: Exception) -> str:
    """What a library's error says, in one line: a headline's first detail belongs to it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _make_room(model, weights: dict, *, tied: bool) -> None:
    """Embeddings of as many tokens as the adapters have. An output layer of its own where one of the two is adapted:
    peft adapts them apart, and merging into a shared weight would change both."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is inputs or module is outputs]
    own = {key: tensor for key, tensor in weights.items() if any(f".{name}." in key for name in names)}
    own = {key: tensor for key, tensor in own.items() if "token_adapter" not in key and "trainable_tokens" not in key}
    rows = {len(tensor) for key, tensor in own.items() if key.endswith(".weight") and "lora" not in key}
    if rows and max(rows) != len(inputs.weight):
        model.resize_token_embeddings(max(rows))
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if own and not tied and outputs is not None and outputs.weight is inputs.weight:
        outputs.weight = nn.Parameter(inputs.weight.detach().clone())
        _say_tied(model, False)


def _tied_as_they_are(model):
    """The configuration says tied where input and output embeddings are equal, or a saved copy would lose one."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and outputs.weight is not inputs.weight and _said_tied(model):
        if torch.equal(outputs.weight, inputs.weight):
            model.tie_weights()
        else:
            _say_tied(model, False)
    return model


def _said_tied(model) -> bool:
    return getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)


def _say_tied(model, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = tied


@torch.no_grad()
def merged_copy(model):
    """A LoRA model's weights with its adapters merged, on the CPU in float32.

    In bfloat16 a short run's changes would be rounded away, and the policy would not be the one that was evaluated.
    Where merging itself changes what the model computes, a warning says so.
    """
    copied = {}  # what deepcopy finds here it takes: the device never holds a second model
    for weight in model.parameters():
        copied[id(weight)] = nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True), weight.requires_grad)
    for buffer in model.buffers():
        copied[id(buffer)] = buffer.detach().to("cpu", copy=True)
    adapted = copy.deepcopy(model, copied).eval()
    before = next_logprobs(adapted)
    merged = adapted.merge_and_unload()
    change = (next_logprobs(merged) - before).abs().max().item()
    if not change <= NOISE[torch.float32]:  # NaN, too
        log.warning("merging the adapters changes log-probs by %.2g nats: the adapters themselves are exact", change)
    return merged


def left_out(model) -> str | None:
    """A warning that names the weights of a LoRA model that no adapter changes; None where they are few.

    Embeddings, output layer, norms and biases never have adapters, and do not count. An adapter does nothing where the
    model reads a layer's weight and never calls the layer (Jamba's dt_proj): it gets no gradient, and stays 0.
    """
    core = unwrapped(model)
    layers = {name: module for name, module in core.named_modules() if hasattr(module, "lora_A")}
    called = _called(model, layers)
    adapted = {
        id(weight)
        for name, module in layers.items()
        if _kind(name) in called
        for weight in module.get_base_layer().parameters()
    }
    ends = [module for module in core.modules() if isinstance(module, nn.Embedding)] + [core.get_output_embeddings()]
    apart = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    counted = {
        name: weight
        for name, weight in core.named_parameters()
        if "lora_" not in name and weight.ndim > 1 and id(weight) not in apart
    }
    without = {name: weight.numel() for name, weight in counted.items() if id(weight) not in adapted}
    share = sum(without.values()) / max(1, sum(weight.numel() for weight in counted.values()))
    if share <= FEW:
        return None
    kinds = list(dict.fromkeys(map(_kind, without)))
    shown = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
    return (
        f"WARNING: LoRA leaves {share:.0%} of the weights as they are, since no adapter reaches them: {shown}. "
        "--lora-rank 0 trains all"
    )


def _kind(name: str) -> str:
    """What layers and experts of a kind have in common."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@torch.no_grad()
def _called(model, layers: dict[str, nn.Module]) -> set[str]:
    """The kinds of `layers` that a forward pass calls. A few tokens do not reach every expert, but every kind."""
    kinds: set[str] = set()
    hooks = []
    for name, module in layers.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: kinds.add(_kind(name))))
    try:
        next_logprobs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return kinds
