"""The distillation terms in hand-computed numbers."""

import pytest
import torch

from config import variant_of
from data import Batch
from variants.sdar import gated_pull, only_teacher
from variants.skill_sd import weighted_k3

NAN = float("nan")
TERMS = {  # (new, old, teacher) -> the term of a method before its weight
    "gated": lambda new, old, teacher: gated_pull(new, teacher, 5.0),
    "ungated": lambda new, old, teacher: gated_pull(new, teacher, 0.0),
    "k3": weighted_k3,
}


@pytest.mark.parametrize(
    ("kind", "expected", "gradient"),
    [
        # Delta_now = 0.2 and -0.4, sigmoid(5 Delta_now) = 0.731059 and 0.119203
        ("gated", [0.146212, -0.047681], [-0.731059, -0.119203]),
        ("ungated", [0.1, -0.2], [-0.5, -0.5]),
        # rho = e^0.1 and 1, k3 = e^0.2 - 1.2 and e^-0.4 - 0.6; d(rho k3)/dnew = rho (k3 + 1 - e^Delta)
        ("k3", [0.023654, 0.070320], [-0.221034, 0.4]),
    ],
)
def test_distillation_by_hand(kind, expected, gradient):
    new = torch.tensor([-1.0, -0.5, -3.0], requires_grad=True)
    old, teacher = torch.tensor([-1.1, -0.5, -2.0]), torch.tensor([-0.8, -0.9, NAN])
    loss = TERMS[kind](new, old, teacher)
    assert torch.allclose(loss, torch.tensor([*expected, 0.0]), atol=1e-5)
    loss.sum().backward()
    assert torch.allclose(new.grad, torch.tensor([*gradient, 0.0]), atol=1e-5)


def test_the_gate_is_one_half_at_beta_zero():
    new, teacher = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -0.1])
    assert torch.equal(gated_pull(new, teacher, 0.0), 0.5 * (teacher - new))
    assert variant_of("grpo+opsd").settings(algo="grpo+opsd").gate_beta == 0
    with pytest.raises(ValueError, match="--gate-beta must be between 0 and 0"):
        variant_of("grpo+opsd").settings(algo="grpo+opsd", gate_beta=5.0)


@pytest.mark.parametrize("kind", ["gated", "ungated", "k3"])
def test_nothing_scored_and_huge_ratios_stay_finite(kind):
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    TERMS[kind](new, new.detach(), torch.full((2,), NAN)).sum().backward()
    assert new.grad.tolist() == [0, 0]
    far = TERMS[kind](new, torch.tensor([-500.0, 0]), torch.tensor([0.0, -500]))
    assert far.isfinite().all()


def test_each_token_has_one_teacher():
    episode, step = torch.tensor([[1.0, NAN, NAN]]), torch.tensor([[NAN, 2.0, NAN]])
    teacher = lambda **logprobs: only_teacher(Batch([], [], [], {}, torch.ones(1, 3), None, logprobs))
    got = teacher(episode=episode, step=step)
    assert got[0, :2].tolist() == [1, 2]
    assert got[0, 2].isnan()
    with pytest.raises(ValueError, match="two teachers"):
        teacher(episode=episode, step=torch.tensor([[1.0, 2.0, NAN]]))


def test_the_terms_weigh_what_the_release_gives_them_or_what_was_asked_for():
    made = lambda algo, **changes: variant_of(algo).settings(algo=algo, **changes).distill_weight
    weights = {algo: made(algo) for algo in ("sdar", "opsd", "grpo+opsd", "skill-sd")}
    assert weights == {"sdar": 0.01, "opsd": 0.01, "grpo+opsd": 0.01, "skill-sd": 0.001}
    assert made("skill-sd", distill_weight=0.5) == 0.5
