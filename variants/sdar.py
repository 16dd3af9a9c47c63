"""SDAR: GRPO, and a gated pull of the policy towards itself under its skill. SDAR release:
verl/trainer/ppo/sdar_utils.py, compute_sdar_loss."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advantage import combine, opid_advantages
from config import OWN, Config
from data import Advantages, Batch
from lm.logprobs import sequence_logprobs
from lm.packing import Sequence
from runlog.start import Run
from train import OPID, Terms, grpo_loss


@dataclass
class Settings(Config):
    distill_weight: float = OWN(0.01, "c: weight of the gated term (the release's ALFWorld scripts)")
    gate_beta: float = OWN(5.0, "beta: steepness of the gate sigmoid(beta Delta), per nat")


def outcome_only(run: Run, batch: Batch, rng: random.Random) -> Advantages:
    """A = A_ep: the skill acts through the loss, and lambda has no say. Its shift is logged all the same."""
    opid = opid_advantages(run, batch, rng)
    return replace(opid, total=combine(opid.outcome, {}, {}, batch.mask))


def sdar_loss(run: Run, micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    new, at = sequence_logprobs(run.policy, micro, run.config.temperature)  # (n,) log pi_theta(y | h)
    losses, terms = grpo_loss(new, at, batch, run.config)
    teacher = only_teacher(batch)[at].to(new.device)  # (n,) log pi(y | h^), NaN where no skill guides the step
    terms["loss/distill"] = gated_pull(new, teacher, run.config.gate_beta)
    return losses + run.config.distill_weight * terms["loss/distill"], terms


def gated_pull(new: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """g (log pi_teacher - log pi_theta), g = sigmoid(beta Delta_now) without gradient. (n,) -> (n,), 0 without teacher.

    Descending it ascends g log pi_theta: every sampled token becomes likelier, but in the mean over samples a common
    pull cancels (E[grad log pi] = 0), and what is left is a policy gradient whose reward is g. g grows with Delta_now,
    so probability moves to the tokens that the teacher likes better: towards the teacher.
    """
    scored = ~teacher.isnan()  # (n,)
    # Selected, not multiplied by 0: a NaN times 0 is a NaN, in the gradient too.
    delta = teacher[scored] - new[scored]  # (scored,) Delta_now
    term = (beta * delta.detach()).sigmoid() * delta  # (scored,)
    return torch.zeros_like(scored, dtype=term.dtype).masked_scatter(scored, term)


def only_teacher(batch: Batch) -> Tensor:
    """The one log pi(y | h^) of each token, NaN where it has none. -> (B, R). Raises ValueError where it has two."""
    taken = torch.full_like(batch.old_logprobs, float("nan"))  # (B, R)
    for logprobs in batch.skill_logprobs.values():
        known = ~logprobs.isnan()  # (B, R)
        if (known & ~taken.isnan()).any():
            raise ValueError("a token has two teachers: the routing gives its step two skills")
        taken[known] = logprobs[known]
    return taken


VARIANT = replace(OPID, advantages=outcome_only, loss=sdar_loss, settings=Settings)
