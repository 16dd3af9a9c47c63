"""torch.optim.Muon for processors that do not multiply in bfloat16."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import _muon


def orthogonalised(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz as torch has it, in the gradient's own dtype and not in bfloat16: (n, m) -> (n, m), its singular
    values near 1."""
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    wide = gradient.T if tall else gradient
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class ExactMuon(torch.optim.Muon):
    """Muon in float32. torch asks for bfloat16 whatever the processor: emulated, it takes twenty times as long."""

    def step(self, closure=None):
        with patch.object(_muon, "_zeropower_via_newtonschulz", orthogonalised):
            return super().step(closure)
