"""Which precision is fast on this machine."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device ("cpu", "cuda") multiplies in bfloat16. A processor that does not, as in most laptops,
    emulates it: SmolLM2's products take seven times as long as in float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mixed_precision(setting: str) -> str:
    """What --mixed-precision stands for here: "bf16" or "no"."""
    if setting != "auto":
        return setting
    return "bf16" if multiplies_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else "no"
