"""RLSD: the skill rescales A_ep, token by token. SDAR release: verl/trainer/ppo/rlsd_utils.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from config import OWN
from data import Advantages, Batch
from runlog.start import Run
from train import OPID, opid_advantages
from variants.sdar import OneTeacher


@dataclass
class Settings(OneTeacher):
    rlsd_mix: float = OWN(0.5, "mu at first: how much Delta rescales A_ep", bounds=(0, 1))
    rlsd_iterations: int = OWN(50, "iterations in which mu falls to 0 (release: 100); 0: it stays", bounds=(0, None))
    rlsd_clip: float = OWN(0.2, "bound of the rescaling, 1 - eps to 1 + eps", bounds=(0, None))


def advantages(run: Run[Settings], batch: Batch) -> Advantages:
    config, opid = run.config, opid_advantages(run, batch)
    left = max(0.0, 1 - run.iteration / config.rlsd_iterations) if config.rlsd_iterations else 1.0
    total = rescale(opid.outcome, opid.skill.nan_to_num(), batch.mask, config.rlsd_mix * left, config.rlsd_clip)
    return replace(opid, total=total)


def rescale(outcome: Tensor, shift: Tensor, mask: Tensor, mix: float, clip: float) -> Tensor:
    """A_ep ((1 - mix) + mix clip(exp(sign(A_ep) Delta), 1 - clip, 1 + clip)), 0 off the mask. -> (B, R)

    `outcome` (B,); `shift` (B, R), 0 where no skill was scored, hence weight 1. The skill says which tokens matter
    most, and never changes a sign. `mix` 0 is GRPO.
    """
    sign = outcome.sign()[:, None]  # (B, 1)
    weight = (sign * shift).exp().clamp(1 - clip, 1 + clip)  # (B, R)
    return outcome[:, None] * mask.to(outcome.dtype) * ((1 - mix) + mix * weight)


VARIANT = replace(OPID, advantages=advantages, settings=Settings)
