"""Skill-SD: GRPO, and KL to the policy under its skill by k3. SDAR release: skillsd_utils.py, compute_sdl_loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import OWN
from data import Batch
from lm.scoring import Sequence, sequence_logprobs
from runlog.start import Run
from train import OPID, Terms, grpo_loss
from variants.sdar import OneTeacher, only_teacher, outcome_only


@dataclass
class Settings(OneTeacher):
    distill_weight: float = OWN(0.001, "weight of the term (the release's)", bounds=(0, None))


def loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    new, at = sequence_logprobs(run.policy, micro, run.config.temperature)  # (n,) log pi_theta(y | h)
    losses, terms = grpo_loss(new, at, batch, run.config)
    teacher, old = only_teacher(batch)[at].to(new.device), batch.old_logprobs[at].to(new.device)  # (n,) each
    terms["loss/distill"] = weighted_k3(new, old, teacher)
    return losses + run.config.distill_weight * terms["loss/distill"], terms


def weighted_k3(new: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
    """rho k3, rho = pi_theta / pi_old, both with gradient: KL(pi_theta || pi_teacher) in expectation over pi_old,
    gradient included, which is -rho d grad log pi_theta. All (n,) -> (n,), 0 where `teacher` is NaN."""
    scored = ~teacher.isnan()  # (n,)
    d, log_ratio = teacher[scored] - new[scored], (new - old)[scored]  # (scored,) each
    # Beyond the release's bounds a token carries no gradient: of one factor alone it would point the other way.
    term = log_ratio.clamp(max=10.0).exp() * (d.clamp(max=20.0).exp() - 1 - d.clamp(max=20.0))  # (scored,)
    term = torch.where((d < 20.0) & (log_ratio < 10.0), term, term.detach())
    return torch.zeros_like(scored, dtype=term.dtype).masked_scatter(scored, term)


VARIANT = replace(OPID, advantages=outcome_only, loss=loss, settings=Settings)
