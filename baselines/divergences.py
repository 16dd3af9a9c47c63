"""How far two next-token distributions are apart: the exact counterpart of a sampled token's log-prob shift.

    E over y ~ pi of grad log pi(y) (log pi_teacher(y) - log pi(y))  =  -grad KL(pi || pi_teacher)

so an advantage of weight lambda on sampled tokens and lambda times `reverse` in the loss have the same gradient on
average, and the loss has it without the noise of sampling.

Shapes: n tokens, V vocabulary. Student and teacher are log-probs; gradient flows into the student.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm.states import States, divergences

Config = Any  # a config.Config


def divergence(
    kind: str,
    student: Tensor,  # (n, V) log p
    teacher: Tensor,  # (n, V) log q
    *,
    beta: float = 0.5,
    top_k: int = 0,
    top_k_of: str = "teacher",
    rest: str = "bin",
) -> Tensor:
    """-> (n,), in nats, at least 0 but for `rest` "drop" and "hold".

    reverse  KL(p || q) = sum p (log p - log q): the student stays where the teacher is
    forward  KL(q || p) = sum q (log q - log p): the student covers all that the teacher does
    jsd      beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1)

    `top_k` words alone, the likeliest of the teacher or of the student (0: all V). What becomes of the others' sum:
    "bin": all others are one more word, so that both stay distributions. "drop": left out. The sum of what is left then
    has a gradient of its own: grad sum p (log p - log q) = sum p (log p - log q + 1) grad log p, where the 1, which
    cancels over a whole distribution, moves probability out of the k words, wherever the teacher has it. "hold": left
    out, with the weights p (log p - log q) held, so that the 1 is not there; only of `reverse` ("The Many Faces of
    On-Policy Distillation", arXiv 2605.11182). Raises ValueError for an unknown option.
    """
    if top_k_of not in ("teacher", "student") or rest not in ("bin", "drop", "hold"):
        raise ValueError(f"top_k_of must be teacher or student, not {top_k_of!r}; rest bin, drop or hold, not {rest!r}")
    if top_k and top_k < student.shape[-1]:
        words = (teacher if top_k_of == "teacher" else student.detach()).topk(top_k).indices  # (n, k)
        student, teacher = (with_rest(p.gather(-1, words), rest) for p in (student, teacher))  # (n, k) or (n, k + 1)
    if kind == "reverse" and rest == "hold":
        weights = (student.exp() * (student - teacher)).detach()  # (n, k)
        return (weights * (1 + student - student.detach())).sum(-1)
    if kind == "reverse":
        return kl(student, teacher)
    if kind == "forward":
        return kl(teacher, student)
    if kind == "jsd":
        shares = student.new_tensor([beta, 1 - beta]).log()  # (2,)
        between = torch.logaddexp(teacher + shares[0], student + shares[1])  # (n, V) log m
        return beta * kl(teacher, between) + (1 - beta) * kl(student, between)
    raise ValueError(f"unknown divergence {kind!r}; known: reverse, forward, jsd")


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum exp(a) (a - b), of log-probs (n, V) -> (n,)"""
    return (a.exp() * (a - b)).sum(-1)


def with_rest(logprobs: Tensor, rest: str) -> Tensor:
    """(n, k) -> (n, k + 1) with "bin": the last is what the others have together."""
    if rest != "bin":
        return logprobs
    # never log 0, whose gradient is no number: where k words have it all, one float32 rounding error is left
    others = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logprobs.dtype).eps)  # (n, 1)
    return torch.cat([logprobs, others.log()], -1)


def distances(
    policy, states: Tensor, teachers: list[tuple[float, States]], at: tuple[Tensor, Tensor], config: Config
) -> Tensor:
    """The weighted divergences of the policy, hidden states (N, H) at rows and columns `at`, from each teacher at the
    tokens that it knows. -> (N,)"""
    top = {"top_k": config.top_k, "top_k_of": config.top_k_of, "rest": config.top_k_rest}
    measure = partial(divergence, config.divergence, beta=config.jsd_beta, **top)
    total = torch.zeros(len(states), device=states.device)  # (N,)
    for weight, teacher in teachers:
        here = teacher.known[at].nonzero()[:, 0]  # (n,)
        rows, columns = (index[here] for index in at)
        own = states[here.to(states.device)]  # (n, H)
        term = divergences(policy, own, teacher, rows, columns, measure, config.temperature)  # (n,)
        total = total.index_add(0, here.to(total.device), weight * term.float())
    return total
