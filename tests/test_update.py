"""What an iteration makes of log-probs: the advantages of each method, the loss, and where each method pushes a policy
over two actions. Hand-computed numbers."""

import math
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from advantage import combine, skill_advantage
from config import Config, variant_of
from data import Advantages, Batch, Step, Trajectory
from lm.distributions import divergence
from train import k3, outcomes, policy_loss
from variants import opd, opid_contrast
from variants.rlsd import rescale
from variants.sdar import gated_pull
from variants.skill_sd import weighted_k3

NAN = float("nan")


def settings(algo, **changes) -> Config:
    return variant_of(algo).settings(algo=algo, **changes)


def advantages_of(config, old, skill_logprobs, reference=None) -> Advantages:
    """Of the method that `config` names, for steps that are all of tasks of their own, so that A_ep is the return: the
    first step won, the others lost and were invalid."""
    steps = [Step((), str(t), [1], [2] * len(row), "", "", t == 0) for t, row in enumerate(old)]
    trajectories = [Trajectory("", t, [step], t == 0) for t, step in enumerate(steps)]
    batch = Batch(trajectories, [None] * len(steps), [[()] for _ in steps], {}, old, reference, skill_logprobs)
    reading = lambda *models: nullcontext()
    run = SimpleNamespace(
        config=config, iteration=0, metrics={}, rng=random.Random(0), reading=reading, models={"teacher": None}
    )
    return variant_of(config.algo).advantages(run, batch)


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("grpo", [[2, 2], [-1, 0]]),
        ("gigpo", [[2, 2], [-1, 0]]),  # what it adds is in `outcome` already
        ("opid", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opid-shuffled", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opid-placebo", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opid-shift", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),  # of the policy, to itself
        ("opid-full", [[2, 2], [-1, 0]]),
        ("opid-oracle", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opsd", [[0, 0], [0, 0]]),
        ("sdpo", [[0, 0], [0, 0]]),
        ("grpo+opsd", [[2, 2], [-1, 0]]),
        ("sdar", [[2, 2], [-1, 0]]),
        ("skill-sd", [[2, 2], [-1, 0]]),
        ("skill-grpo", [[2, 2], [-1, 0]]),
        # half of A_ep times exp(0.3) -> 1.2, exp(-0.1) = 0.904837; for the failure exp(-0.2) = 0.818731
        ("rlsd", [[2.2, 1.904837], [-0.909365, 0]]),
    ],
)
def test_what_enters_the_advantage_of_each_method(algo, expected):
    """Two steps, the first guided by the episode skill, the second by a step skill."""
    old = torch.tensor([[-1.0, -1.0], [-2.0, NAN]])
    scored = {"episode": torch.tensor([[-0.7, -1.1], [NAN, NAN]]), "step": torch.tensor([[NAN, NAN], [-1.8, NAN]])}
    weights = {} if algo in ("grpo", "gigpo", "skill-grpo") else {"episode_weight": 0.5, "step_weight": 0.25}
    config = settings(algo, success_reward=2.0, invalid_penalty=1.0, **weights)
    got = advantages_of(config, old, scored if config.levels else {})
    assert torch.allclose(got.total, torch.tensor(expected, dtype=torch.float32), atol=1e-5)
    assert torch.allclose(got.outcome, torch.tensor([2.0, -1.0]), atol=1e-5)
    assert got.skill.isnan().tolist() == ([[False, False], [False, True]] if config.levels else [[True] * 2] * 2)


def test_the_shift_is_the_difference_to_its_base():
    """By the scorer's own plain log-prob -1.4 the skill praises with 0.4 what the policy's -0.5 would have blamed."""
    old, base, scored = torch.tensor([[-0.5, NAN]]), torch.tensor([[-1.4, NAN]]), {"step": torch.tensor([[-1.0, NAN]])}
    changes = {"success_reward": 1.0, "step_weight": 2.0, "scorer": "reference"}
    for algo, expected, logged in (("opid-shift", 1.8, 0.4), ("opid", 0.0, -0.5)):
        got = advantages_of(settings(algo, **changes), old, scored, base)
        assert torch.allclose(got.total, torch.tensor([[expected, 0.0]]), atol=1e-5)
        assert got.skill[0, 0].item() == pytest.approx(logged)


def test_opd_is_the_teachers_shift_and_nothing_else(monkeypatch):
    config = settings("opd", teacher="smollm2", success_reward=7.0)
    monkeypatch.setattr(opd, "response_logprobs", lambda *a, **k: torch.tensor([[-0.25, NAN]]))
    got = advantages_of(config, torch.tensor([[-1.0, NAN]]), {})
    assert got.total.tolist() == [[0.75, 0]]
    assert (got.outcome.item(), got.skill[0, 0].item()) == (pytest.approx(7.0, rel=1e-5), 0.75)  # logged, and no more


def test_the_outcome_is_the_reward_less_the_steps_own_penalty():
    """One group: won, of a valid and an invalid step, and lost, of a valid one. Returns 10, 9.9 and 0, mean 6.6333."""
    valid, invalid = (Step((), "", [1], [2], "", "", valid) for valid in (True, False))
    played = [Trajectory("t", 0, [valid, invalid], True), Trajectory("t", 0, [valid], False)]
    config = Config(success_reward=10.0, invalid_penalty=0.1, normalize="mean")
    assert torch.allclose(outcomes(config, played), torch.tensor([3.36667, 3.26667, -6.63333]), atol=1e-4)


# ---- the loss ----------------------------------------------------------------------------------------------------


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


def test_dual_clip_bounds_what_a_token_with_a_negative_advantage_costs():
    new, advantages = torch.tensor([5.0, 5.0, 0.5]), torch.tensor([-1.0, 1.0, -1.0])  # log-ratios; old is 0
    loss, _ = policy_loss(new, torch.zeros(3), advantages, clip=0.2)
    assert torch.allclose(loss, torch.tensor([148.41316, -1.2, 1.648721]))  # e^5, 1.2, e^0.5
    bounded, _ = policy_loss(new, torch.zeros(3), advantages, clip=0.2, dual_clip=3.0)
    assert torch.allclose(bounded, torch.tensor([3.0, -1.2, 1.648721]))


def test_extreme_ratios_stay_numbers():
    new = torch.tensor([100.0, 100.0, -1000.0], requires_grad=True)
    advantages = torch.tensor([0.0, -1.0, 1.0])
    loss = policy_loss(new, torch.zeros(3), advantages, clip=0.2)[0] + k3(new, torch.zeros(3), 10.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert new.grad.isfinite().all()
    assert k3(torch.tensor([-1000.0]), torch.zeros(1), 10.0).tolist() == [10]
    assert k3(torch.tensor([5.0]), torch.zeros(1)).item() == pytest.approx(math.exp(-5) + 4)


def test_k3_is_zero_at_the_reference_positive_elsewhere_and_pulls_back():
    new = torch.tensor([0.0, 0.5, -0.5], requires_grad=True)
    kl = k3(new, torch.zeros(3))
    assert torch.allclose(kl, torch.tensor([0.0, 0.106531, 0.148721]), atol=1e-5)  # e^-0.5 - 0.5, e^0.5 - 1.5
    kl.sum().backward()
    assert new.grad[1] > 0 > new.grad[2]


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
        return combine(outcome, {"episode": shift}, {"episode": weight, "step": 0.0}, torch.ones(2, 1))[:, 0]

    return advantages


def rescaled(outcome):
    def advantages(old):
        shift = skill_advantage(TEACHER[:, None], old[:, None], torch.ones(2, 1))  # (2, 1)
        return rescale(outcome, shift, torch.ones(2, 1), mix=0.5, clip=0.2)[:, 0]

    return advantages


def gated(beta):
    return lambda new, old: gated_pull(new, TEACHER, beta)


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


def test_the_exact_loss_has_the_gradient_of_the_sampled_shift():
    """opid-full's, on average over samples. (0.3, -0.2): log-probs whose shift to the teacher has a mean far from 0."""
    logits = (0.3, -0.2)
    exact = gradient_of_a(lambda new, old: divergence("reverse", new[None], TEACHER[None]).expand(2), logits)
    assert gradient_of_a(clipped(added(torch.zeros(2), 1.0)), logits) == pytest.approx(exact, abs=1e-6)
    assert gradient_of_a(clipped(added(torch.zeros(2), 0.25)), logits) == pytest.approx(0.25 * exact, abs=1e-6)
    assert abs(exact) > 0.1


def test_a_skill_that_does_what_any_skill_does_has_no_contrast():
    """Both skills make a likelier by the same factor: the plain shift pushes to a, the contrast rests."""
    other = TEACHER.clone()
    assert gradient_of_a(clipped(lambda old: TEACHER - old)) < -0.1
    assert gradient_of_a(clipped(lambda old: TEACHER - other)) == pytest.approx(0, abs=1e-6)
    opposite = TEACHER.flip(0)  # the other skill makes b likelier: what is this one's own counts twice
    assert gradient_of_a(clipped(lambda old: TEACHER - opposite)) == pytest.approx(-0.5 * math.log(4))


def test_bases_by_level_and_what_has_none(monkeypatch):
    """Own skill -0.7 against another's -1.2 on the episode-guided step; the step skill has no counterpart."""
    old = torch.tensor([[-1.0], [-2.0]])
    guided = {"episode": torch.tensor([[-0.7], [NAN]]), "step": torch.tensor([[NAN], [-1.8]])}
    bases = {"episode": torch.tensor([[-1.2], [NAN]]), "step": torch.tensor([[NAN], [NAN]])}
    monkeypatch.setattr(opid_contrast, "rescore", lambda *a, plain: (SimpleNamespace(skill_logprobs=bases), {}))
    config = settings("opid-contrast", episode_weight=2.0, step_weight=3.0, success_reward=0.0, invalid_penalty=0.0)
    got = advantages_of(config, old, guided)
    assert torch.allclose(got.total, torch.tensor([[1.0], [0.0]]))
    assert got.skill.isnan().tolist() == [[False], [True]]


def test_rlsd_rescales_but_never_turns_the_outcome():
    # weights: a lost and the teacher likes it: exp(-log 1.6) = 0.625 -> 0.8; b won and the teacher doesn't: 0.4 -> 0.8;
    # half of each is taken: 0.9
    assert gradient_of_a(clipped(rescaled(WON_BY_B))) == pytest.approx(0.9 * 0.5)
    assert gradient_of_a(clipped(rescaled(-WON_BY_B))) == pytest.approx(-1.1 * 0.5)


def test_gated_distillation_goes_to_the_teacher():
    # g = sigmoid(5 log 1.6) = 0.912937 and sigmoid(5 log 0.4) = 0.010136; -(1/4) (g_a - g_b)
    g = [1 / (1 + 1.6**-5), 1 / (1 + 0.4**-5)]
    assert gradient_of_a(gated(5.0)) == pytest.approx(-0.25 * (g[0] - g[1]))


def test_gated_distillation_rests_at_the_teacher():
    assert gradient_of_a(gated(5.0), TEACHER.tolist()) == pytest.approx(0, abs=1e-6)
    assert gradient_of_a(gated(5.0), [3.0, 0.0]) > 0  # a is already likelier than the teacher has it


def test_the_opposite_sign_would_leave_the_teacher():
    assert gradient_of_a(lambda new, old: -gated(5.0)(new, old)) > 0


def test_ungated_distillation_has_no_direction():
    assert gradient_of_a(gated(0.0)) == pytest.approx(0, abs=1e-6)
    assert gradient_of_a(gated(0.0), [1.0, -1.0]) == pytest.approx(0, abs=1e-6)


def test_k3_distillation_is_the_gradient_of_the_reverse_kl():
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    new = logits.log_softmax(0)
    (new.exp() * (new - TEACHER)).sum().backward()
    assert gradient_of_a(lambda new, old: weighted_k3(new, old, TEACHER), (0.3, -0.2)) == pytest.approx(
        logits.grad[0].item(), abs=1e-6
    )
    assert gradient_of_a(lambda new, old: weighted_k3(new, old, TEACHER)) < 0


def test_the_kl_term_has_the_gradient_of_the_forward_kl_to_the_reference():
    """-sum pi_ref grad log pi: of a's logit that is pi_a - 4/5."""
    assert gradient_of_a(lambda new, old: k3(new, TEACHER)) == pytest.approx(0.5 - 0.8)


def test_beyond_their_bounds_terms_carry_no_gradient():
    """A token that is e^20 times likelier under the reference (or teacher), and one that is e^10 times likelier than it
    was."""
    far = torch.tensor([-25.0], requires_grad=True)
    (k3(far, torch.zeros(1)) + weighted_k3(far, far.detach(), torch.zeros(1))).sum().backward()
    assert far.grad.tolist() == [0]
    risen = torch.tensor([0.0], requires_grad=True)
    weighted_k3(risen, torch.tensor([-11.0]), torch.tensor([-1.0])).sum().backward()
    assert risen.grad.tolist() == [0]
