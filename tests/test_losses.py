"""The loss terms in hand-computed numbers, and where each method pushes a policy over two actions."""

import math

import pytest
import torch

from advantage import combine, rescale, skill_advantage
from baselines.losses import distillation_loss, k3, policy_loss

NAN = float("nan")


def test_policy_loss_by_hand():
    old = torch.zeros(6)
    new = torch.tensor([1.0, 1.1, 1.5, 1.5, 0.5, 0.5]).log()  # the ratios
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, 2.0, -2.0])
    loss, clipped = policy_loss(new, old, advantages, clip=0.2)
    assert torch.allclose(loss, torch.tensor([-2.0, -2.2, -2.4, 3.0, -1.0, 1.6]))
    assert clipped.tolist() == [0, 0, 1, 0, 0, 1]


def test_clipped_tokens_carry_no_gradient_and_others_push_along_the_advantage():
    new = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    policy_loss(new, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), clip=0.2)[0].sum().backward()
    assert new.grad.tolist() == [-1, 1, 0]


def test_k3_is_zero_at_the_reference_positive_elsewhere_and_pulls_back():
    new = torch.tensor([0.0, 0.5, -0.5], requires_grad=True)
    kl = k3(new, torch.zeros(3))
    assert torch.allclose(kl, torch.tensor([0.0, 0.106531, 0.148721]), atol=1e-5)  # e^-0.5 - 0.5, e^0.5 - 1.5
    kl.sum().backward()
    assert new.grad[1] > 0 > new.grad[2]


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
    loss = distillation_loss(kind, new, old, teacher, beta=5.0)
    assert torch.allclose(loss, torch.tensor([*expected, 0.0]), atol=1e-5)
    loss.sum().backward()
    assert torch.allclose(new.grad, torch.tensor([*gradient, 0.0]), atol=1e-5)


def test_the_gate_is_one_half_at_beta_zero():
    new, old, teacher = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -0.1])
    gated = distillation_loss("gated", new, old, teacher, beta=0.0)
    assert torch.equal(gated, distillation_loss("ungated", new, old, teacher, beta=5.0))


@pytest.mark.parametrize("kind", ["gated", "ungated", "k3"])
def test_nothing_scored_and_huge_ratios_stay_finite(kind):
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    distillation_loss(kind, new, new.detach(), torch.full((2,), NAN), beta=5.0).sum().backward()
    assert new.grad.tolist() == [0, 0]
    far = distillation_loss(kind, new, torch.tensor([-500.0, 0]), torch.tensor([0.0, -500]), beta=5.0)
    assert far.isfinite().all()


def test_an_unknown_term_is_named():
    with pytest.raises(ValueError, match="unknown distillation term 'mse'"):
        distillation_loss("mse", torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0)


# ---- a policy over two actions -----------------------------------------------------------------------------------
#
# The policy plays a with probability 1/2; the teacher would play a with 4/5. Losses are averaged over the two actions
# with the policy's own probabilities, which is the expectation over samples. Logits are (a, b), and the gradient of
# the logit of a says all, since the two sum to 0: negative means that descent makes a likelier.

TEACHER = torch.tensor([0.8, 0.2]).log()


def gradient_of_a(loss, logits=(0.0, 0.0)) -> float:
    logits = torch.tensor(logits, requires_grad=True)
    new = logits.log_softmax(0)  # (2,)
    old = new.detach()
    (old.exp() * loss(new, old)).sum().backward()
    assert logits.grad.sum().abs() < 1e-6
    return logits.grad[0].item()


def clipped(advantages):
    """The policy's loss under advantages (2,) that may depend on log pi_old."""
    return lambda new, old: policy_loss(new, old, advantages(old), clip=0.2)[0]


def added(outcome, weight):
    """OPID's advantages of the two actions, each a response of one token."""

    def advantages(old):
        shift = skill_advantage(TEACHER[:, None], old[:, None], torch.ones(2, 1))  # (2, 1)
        return combine(outcome, shift, None, torch.ones(2, 1), episode_weight=weight, step_weight=0.0)[:, 0]

    return advantages


def rescaled(outcome):
    def advantages(old):
        shift = skill_advantage(TEACHER[:, None], old[:, None], torch.ones(2, 1))  # (2, 1)
        return rescale(outcome, shift, torch.ones(2, 1), mix=0.5, clip=0.2)[:, 0]

    return advantages


def distilled(kind):
    return lambda new, old: distillation_loss(kind, new, old, TEACHER, beta=5.0)


WON_BY_B = torch.tensor([-1.0, 1.0])


def test_outcome_alone_follows_the_outcome():
    # -sum_i pi_i A_i grad log pi_i, d log pi_a / d logit_a = 1/2, d log pi_b / d logit_a = -1/2
    assert gradient_of_a(clipped(lambda old: WON_BY_B)) == pytest.approx(0.5)


def test_opid_and_opd_go_to_the_teacher():
    # Delta = log 1.6 and log 0.4; -(1/4) (log 1.6 - log 0.4) = -(1/4) log 4
    pull = -0.25 * math.log(4)
    assert gradient_of_a(clipped(added(torch.zeros(2), 1.0))) == pytest.approx(pull)  # opd: no outcome, weight 1
    assert gradient_of_a(clipped(added(WON_BY_B, 0.1))) == pytest.approx(0.5 + 0.1 * pull)


def test_added_shift_rests_at_the_teacher():
    """Descent on the sampled-token reverse KL stops where policy and teacher agree."""
    assert gradient_of_a(clipped(added(torch.zeros(2), 1.0)), TEACHER.tolist()) == pytest.approx(0, abs=1e-6)


def test_rlsd_rescales_but_never_turns_the_outcome():
    # weights: a lost and the teacher likes it: exp(-log 1.6) = 0.625 -> 0.8; b won and the teacher doesn't: 0.4 -> 0.8;
    # half of each is taken: 0.9
    assert gradient_of_a(clipped(rescaled(WON_BY_B))) == pytest.approx(0.9 * 0.5)
    assert gradient_of_a(clipped(rescaled(-WON_BY_B))) == pytest.approx(-1.1 * 0.5)


def test_gated_distillation_goes_to_the_teacher():
    # g = sigmoid(5 log 1.6) = 0.912937 and sigmoid(5 log 0.4) = 0.010136; -(1/4) (g_a - g_b)
    g = [1 / (1 + 1.6**-5), 1 / (1 + 0.4**-5)]
    assert gradient_of_a(distilled("gated")) == pytest.approx(-0.25 * (g[0] - g[1]))


def test_gated_distillation_rests_at_the_teacher():
    assert gradient_of_a(distilled("gated"), TEACHER.tolist()) == pytest.approx(0, abs=1e-6)
    assert gradient_of_a(distilled("gated"), [3.0, 0.0]) > 0  # a is already likelier than the teacher has it


def test_the_opposite_sign_would_leave_the_teacher():
    assert gradient_of_a(lambda new, old: -distilled("gated")(new, old)) > 0


def test_ungated_distillation_has_no_direction():
    assert gradient_of_a(distilled("ungated")) == pytest.approx(0, abs=1e-6)
    assert gradient_of_a(distilled("ungated"), [1.0, -1.0]) == pytest.approx(0, abs=1e-6)


def test_k3_distillation_is_the_gradient_of_the_reverse_kl():
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    new = logits.log_softmax(0)
    (new.exp() * (new - TEACHER)).sum().backward()
    assert gradient_of_a(distilled("k3"), (0.3, -0.2)) == pytest.approx(logits.grad[0].item(), abs=1e-6)
    assert gradient_of_a(distilled("k3")) < 0
