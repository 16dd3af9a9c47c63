"""SDAR: GRPO, and a gated pull of the policy towards itself under its skill. SDAR release:
verl/trainer/ppo/sdar_utils.py, compute_sdar_loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advantage import combine
from config import OWN, Config
from data import Advantages, Batch, Level
from lm.scoring import Sequence, sequence_logprobs
from router import LEVELS
from runlog.start import Run
from train import OPID, Terms, grpo_loss, opid_advantages


@dataclass
class OneTeacher(Config):
    """For a method whose skill is a teacher in the loss: lambda is not used, and a token has at most one teacher."""

    def __post_init__(self):
        self.episode_weight = self.step_weight = 0.0
        super().__post_init__()
        if self.levels and self.routing == "additive":
            raise ValueError(
                f"--algo {self.algo} has at most one teacher per token: --routing {self.routing} gives a step two"
            )

    @property
    def levels(self) -> tuple[Level, ...]:
        return LEVELS


@dataclass
class Settings(OneTeacher):
    distill_weight: float = OWN(0.01, "c: weight of the gated term (the release's ALFWorld scripts)", bounds=(0, None))
    gate_beta: float = OWN(5.0, "beta: steepness of the gate sigmoid(beta Delta), per nat", bounds=(0, None))


def outcome_only(run: Run, batch: Batch) -> Advantages:
    """A = A_ep: the skill acts through the loss. A_skill is still logged."""
    opid = opid_advantages(run, batch)
    return replace(opid, total=combine(opid.outcome, {}, {}, batch.mask))


def sdar_loss(run: Run[Settings], micro: list[Sequence], batch: Batch) -> tuple[Tensor, Terms]:
    new, at = sequence_logprobs(run.policy, micro, run.config.temperature)  # (n,) log pi_theta(y | h)
    losses, terms = grpo_loss(new, at, batch, run.config)
    teacher = only_teacher(batch)[at].to(new.device)  # (n,) log pi(y | h^), NaN where no skill guides the step
    terms["loss/distill"] = gated_pull(new, teacher, run.config.gate_beta)
    return losses + run.config.distill_weight * terms["loss/distill"], terms


def gated_pull(new: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """g (log pi_teacher - log pi_theta), g = sigmoid(beta Delta_now) without gradient. (n,) -> (n,), 0 without teacher.

    A gradient step on it makes each sampled token likelier, in proportion to g. Over all samples a constant g has no
    effect, since E[grad log pi] = 0. So it is a policy gradient with g as its reward. g grows with Delta_now, so
    probability moves to the tokens that the teacher likes better. With beta 0 (grpo+opsd) g is constant: there is no
    direction in expectation, only noise.
    """
    scored = ~teacher.isnan()  # (n,)
    # Selected, not multiplied by 0: NaN times 0 is NaN, in the gradient too.
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
