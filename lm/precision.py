"""Which device a run takes, and which precision is fast on it."""

from __future__ import annotations

import torch


def device_of(setting: str = "auto") -> torch.device:
    """What --device stands for here. auto: a GPU of CUDA where there is one, else the CPU. Apple's GPU (mps) is taken
    only when it is named: small models are slower on it. Raises ValueError for a device that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if setting == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there[setting]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(f"--device {setting}: PyTorch finds none on this machine, but {found}")
    return torch.device(setting)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device ("cpu", "cuda") multiplies in bfloat16. A processor that does not, as in most laptops,
    emulates it: SmolLM2's products take seven times as long as in float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False  # not measured
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mixed_precision(setting: str, device: str = "auto") -> str:
    """What --mixed-precision stands for on this --device: "bf16" or "no"."""
    kind = device_of(device).type
    if setting != "auto":
        return setting
    return "bf16" if multiplies_bfloat16(kind) else "no"
