"""Whole distributions against one another, by hand: their values, their gradients, and sharp distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.distributions import divergence

P, Q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
KINDS = ("reverse", "forward", "jsd")
logits = st.lists(st.floats(-4, 4), min_size=3, max_size=3)


def of(kind, student=P, teacher=Q, **options) -> float:
    return divergence(kind, student.log(), teacher.log(), **options).item()


def gradient(kind, student, teacher=Q, **options) -> torch.Tensor:
    """At the logits of a student with these probabilities. -> (V,)"""
    own = student.log().requires_grad_()
    divergence(kind, own.log_softmax(-1), teacher.log(), **options).sum().backward()
    return own.grad[0]


def test_values_by_hand():
    reverse = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    forward = 0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3)
    assert of("reverse") == pytest.approx(reverse, abs=1e-6)
    assert of("forward") == pytest.approx(forward, abs=1e-6)
    # beta 1/4: m = Q/4 + 3P/4 = (0.425, 0.275, 0.3)
    m = torch.tensor([0.425, 0.275, 0.3])
    to_m = lambda p: (p[0] * (p[0] / m).log()).sum().item()
    assert of("jsd", beta=0.25) == pytest.approx(0.25 * to_m(Q) + 0.75 * to_m(P), abs=1e-6)


@given(logits, logits, st.floats(0.05, 0.95))
def test_never_negative_and_zero_at_the_teacher(a, b, beta):
    student, teacher = (torch.tensor([x]).log_softmax(-1) for x in (a, b))
    for kind in KINDS:
        assert divergence(kind, student, teacher, beta=beta).item() >= -1e-5
        assert divergence(kind, teacher, teacher, beta=beta).item() == pytest.approx(0, abs=1e-5)


def test_jsd_is_symmetric_at_one_half_and_goes_to_either_kl():
    assert of("jsd") == pytest.approx(of("jsd", Q, P), abs=1e-6)
    # near the ends it shrinks like beta (1 - beta), and what is left is the KL of that end
    assert of("jsd", beta=1e-3) / 1e-3 == pytest.approx(of("forward"), rel=0.01)
    assert of("jsd", beta=1 - 1e-3) / 1e-3 == pytest.approx(of("reverse"), rel=0.01)


def test_the_reverse_kl_is_the_mean_of_the_sampled_shift():
    """-sum_v p_v (log q_v - log p_v) grad log p_v."""
    shift = (Q / P).log()[0]
    expected = -(P[0] * shift - (P[0] * shift).sum() * P[0])
    assert torch.allclose(gradient("reverse", P), expected, atol=1e-6)


def test_where_few_words_have_it_all_nothing_is_infinite():
    sharp = torch.tensor([[40.0, 0.0, -40.0]])
    own = sharp.clone().requires_grad_()
    for kind in KINDS:
        got = divergence(kind, own.log_softmax(-1), sharp.log_softmax(-1).flip(-1))
        got.sum().backward()
        assert got.isfinite().all() and own.grad.isfinite().all()


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="unknown divergence"):
        of("sideways")
