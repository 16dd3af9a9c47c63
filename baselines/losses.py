"""What is minimised, a token: PPO-clip, KL to the reference, and the distillation terms of some methods.

Shapes: N response tokens of a micro-batch. Only log pi_theta (`new`) carries gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # of a token's two probabilities, so that no exp overflows (the SDAR release's bound)


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO-clip a token: -min(r A, clip(r, 1 - clip, 1 + clip) A), r = pi_theta / pi_old. All (N,) -> (N,), and where
    the clipped branch, which carries no gradient, was the smaller."""
    ratio = (new - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float()


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) a token, by Schulman's k3 on sampled tokens: exp(d) - 1 - d, d = log pi_ref - log pi_th.
    Never negative. (N,) -> (N,)"""
    d = reference - new
    return d.exp() - 1 - d


def distillation_loss(kind: str, new: Tensor, old: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """The term of a method (`Method.distill`) before its weight. All (N,) -> (N,), 0 where `teacher` is NaN.

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
        ratio = (new - old).clamp(max=MAX_LOG_RATIO).exp()
        term = ratio * k3(torch.zeros_like(delta), delta.clamp(max=MAX_LOG_RATIO))
    else:
        raise ValueError(f"unknown distillation term {kind!r}; known: gated, ungated, k3")
    return torch.zeros_like(scored, dtype=term.dtype).masked_scatter(scored, term)  # (N,)
