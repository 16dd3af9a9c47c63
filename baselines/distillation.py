"""Methods whose skill acts through a term of the loss: the scorer under the skill is a teacher of the policy.

Shapes: N response tokens of a micro-batch. Only log pi_theta (`new`) carries gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baselines.method import LAMBDA, SHIFT, Config, Method
from data import Batch, Level
from router import LEVELS


class Distilled(Method):
    """A_ep alone in the advantage, and a term of `kind` in the loss."""

    whole = False
    one_teacher = True
    idle = SHIFT + LAMBDA
    kind: str
    release_weight = 0.01  # of the SDAR release's ALFWorld scripts

    @property
    def loss_weight(self) -> float:
        given = self.config.distill_weight
        return self.release_weight if given is None else given

    @staticmethod
    def levels(config: Config) -> tuple[Level, ...]:
        return LEVELS  # lambda has no say

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        advantages = outcome[:, None] * batch.mask.to(outcome.dtype)  # (B, R)
        return replace(batch, advantages=advantages, teacher_logprobs=only_scores(batch.mask, *guided.values()))

    def loss(self, new: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(self.kind, new, old, teacher, beta=self.config.gate_beta)


class Sdar(Distilled):
    """A_ep, and the gated term."""

    kind = "gated"


class GrpoOpsd(Distilled):
    """A_ep, and the term of `sdar` with its gate held at one half."""

    kind = "ungated"


class SkillSd(Distilled):
    """A_ep, and KL to the teacher by k3."""

    kind = "k3"
    release_weight = 0.001


class Opsd(Distilled):
    """The gated term alone: no outcome."""

    kind = "gated"

    def adjust(
        self, batch: Batch, outcome: Tensor, plain: dict[str, Tensor], guided: dict[str, Tensor], iteration: int
    ) -> Batch:
        return super().adjust(batch, torch.zeros_like(outcome), plain, guided, iteration)


def only_scores(mask: Tensor, *scores: Tensor) -> Tensor:
    """The one score of each token, NaN where it has none. All (B, R) -> (B, R). Raises ValueError where a token has
    two: log-probs of two teachers have no meaningful sum."""
    taken = torch.full(mask.shape, float("nan"), device=mask.device)  # (B, R)
    for score in scores:
        known = ~score.isnan()  # (B, R)
        if (known & ~taken.isnan()).any():
            raise ValueError("a token has two teachers: the routing gives its step two skills")
        taken[known] = score[known]
    return taken


def only_contexts(count: int, *levels: list[list[int] | None]) -> list[list[int] | None]:
    """The one h^ of each of `count` rows, None where it has none; the rows of `levels` exclude one another."""
    found = [[context for context in row if context] for row in zip(*levels, strict=True)] or [[]] * count
    return [contexts[0] if contexts else None for contexts in found]


def distillation_loss(kind: str, new: Tensor, old: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """The term of a method before its weight. All (N,) -> (N,), 0 where `teacher` is NaN.

    gated    g (log pi_teacher - log pi_theta), g = sigmoid(beta Delta_now), Delta_now = log pi_teacher - log pi_theta,
             g without gradient. SDAR release: verl/trainer/ppo/sdar_utils.py, compute_sdar_loss
    ungated  the same with g = 0.5 throughout, which is beta = 0. SDAR release: examples/grpo_opsd_trainer
    k3       rho k3, rho = pi_theta / pi_old, both with gradient. SDAR release: skillsd_utils.py, compute_sdl_loss

    Signs. Descending `gated` ascends g log pi_theta: every sampled token becomes likelier, but in the mean over samples
    a common pull cancels (E[grad log pi] = 0), and what is left is a policy gradient whose reward is g. g grows with
    Delta_now, so probability moves to the tokens that the teacher likes better: towards the teacher. Where g is
    constant everything cancels: `ungated` has no direction in expectation, whatever the teacher says, only noise; it
    is what the release computes, and a control for the gate. `k3` is KL(pi_theta || pi_teacher) in expectation over
    pi_old, gradient included. Raises ValueError for an unknown kind.
    """
    scored = ~teacher.isnan()  # (N,)
    # Selected, not multiplied by 0: a NaN times 0 is a NaN, in the gradient too.
    new, old, teacher = new[scored], old[scored], teacher[scored]  # (scored,)
    delta = teacher - new  # (scored,) Delta_now
    if kind == "gated":
        term = (beta * delta.detach()).sigmoid() * delta
    elif kind == "ungated":
        term = 0.5 * delta
    elif kind == "k3":
        ratio = (new - old).clamp(max=10.0).exp()  # the release's bounds
        term = ratio * (delta.clamp(max=20.0).exp() - 1 - delta)
    else:
        raise ValueError(f"unknown distillation term {kind!r}; known: gated, ungated, k3")
    return torch.zeros_like(scored, dtype=term.dtype).masked_scatter(scored, term)  # (N,)
