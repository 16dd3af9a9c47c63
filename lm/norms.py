"""RMSNorm in one kernel instead of six, where that changes no bit: a step of decoding is mostly small kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

plain: dict[type, object] = {}  # class of norms -> its own `forward`; None where ours would give other numbers


def fuse_norms(model):
    """Every RMSNorm of `model` in PyTorch's own kernel: -> the model.

    Classes are changed, not modules, so that copies and what is loaded later are, too. Each class is tried once, on
    random numbers on the CPU, and stays as it is unless all of them are the same: Gemma's multiplies by 1 + weight.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and kind not in plain:
            plain[kind] = kind.forward if same_bits(module) else None
            if plain[kind]:
                kind.forward = fused
    return model


def fused(self, hidden_states: Tensor) -> Tensor:
    """(..., H) -> (..., H)"""
    size, weight = hidden_states.shape[-1:], self.weight
    if hidden_states.dtype == weight.dtype == torch.float32:
        return rms_norm(hidden_states, size, weight, self.variance_epsilon)
    # transformers rounds before it multiplies by the weight
    return weight * rms_norm(hidden_states, size, None, self.variance_epsilon)


@torch.no_grad()
def same_bits(module) -> bool:
    """Whether `fused` and the module's own `forward` agree on random numbers, in float32 and bfloat16."""
    if not hasattr(module, "variance_epsilon") or getattr(module, "weight", None) is None:
        return False
    twin, draws = copy.deepcopy(module).to_empty(device="cpu").float(), torch.Generator("cpu").manual_seed(0)
    pairs = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
    for kept, read in pairs:  # of weights and states
        twin.weight.copy_(torch.randn(twin.weight.shape, generator=draws, device="cpu"))
        twin.to(kept)
        states = torch.randn(3, 5, *twin.weight.shape, generator=draws, device="cpu").to(read)
        try:
            own, ours = twin(states), fused(twin, states)
        except (TypeError, RuntimeError):  # it reads more than states
            return False
        if own.dtype != ours.dtype or not torch.equal(own, ours):
            return False
    return True
