"""Hand-computed numbers for everything that enters the advantage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advantage import (
    advantages_of,
    combine,
    merge,
    outcome_advantage,
    outcome_of,
    rescale,
    silent_groups,
    skill_advantage,
    state_groups,
    step_relative_advantage,
)
from config import Config
from data import Step, Trajectory

NAN = float("nan")


def test_outcome_over_steps_weighs_long_trajectories_more():
    # one group: a success of 1 step (return 10), a failure of 3 steps (return 0)
    returns, groups, owners = torch.tensor([10.0, 0, 0, 0]), torch.zeros(4), torch.tensor([0, 1, 1, 1])
    # mean 2.5, sample variance (7.5^2 + 3 * 2.5^2) / 3 = 25, std 5
    got = outcome_advantage(returns, groups, owners)
    assert torch.allclose(got, torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5)


def test_outcome_over_trajectories_counts_each_once():
    returns, groups, owners = torch.tensor([10.0, 0, 0, 0]), torch.zeros(4), torch.tensor([0, 1, 1, 1])
    # mean 5, sample std sqrt(50) = 7.0711
    got = outcome_advantage(returns, groups, owners, over="trajectories")
    assert torch.allclose(got, torch.tensor([0.70711, -0.70711, -0.70711, -0.70711]), atol=1e-4)
    mean_only = outcome_advantage(returns, groups, owners, over="trajectories", normalize="mean")
    assert mean_only.tolist() == [5, -5, -5, -5]


@pytest.mark.parametrize("over", ["steps", "trajectories"])
def test_a_penalty_in_a_group_of_equal_outcomes_stays_bounded(over):
    # two failures of two steps, one step fined 0.1: mean -0.025, far from 0 / 0
    got = outcome_advantage(torch.tensor([0, 0, -0.1, 0]), torch.zeros(4), torch.tensor([0, 0, 1, 1]), over=over)
    assert got[2] < -1
    assert got.abs().max() < 2


def test_outcome_groups_do_not_mix():
    returns, groups = torch.tensor([10.0, 0, 4, 2]), torch.tensor([7, 7, 3, 3])
    got = outcome_advantage(returns, groups, torch.arange(4), normalize="mean")
    assert got.tolist() == [5, -5, 1, -1]


def test_outcome_of_a_group_of_one_is_the_raw_return():
    got = outcome_advantage(torch.tensor([10.0, 3.0]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert torch.allclose(got, torch.tensor([10.0, 3.0]), atol=1e-4)


@pytest.mark.parametrize("over", ["steps", "trajectories"])
@pytest.mark.parametrize("value", [0.0, 10.0, 9.9, 1 / 3])
def test_outcome_of_a_group_without_signal_is_zero(value, over):
    got = outcome_advantage(torch.full((937,), value), torch.zeros(937), torch.arange(937) // 20, over=over)
    assert got.abs().max() < 1e-6


@pytest.mark.parametrize("option", [{"normalize": "max"}, {"over": "tokens"}])
def test_outcome_rejects_unknown_options(option):
    with pytest.raises(ValueError, match="must be"):
        outcome_advantage(torch.zeros(1), torch.zeros(1), torch.zeros(1), **option)


def test_skill_advantage_is_the_shift_on_scored_tokens():
    old = torch.tensor([[-1.0, -2.0, NAN], [-0.5, NAN, NAN]])
    skill = torch.tensor([[-0.25, -3.0, NAN], [NAN, NAN, NAN]])  # the second row was not scored
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert skill_advantage(skill, old, mask).tolist() == [[0.75, -1.0, 0], [0, 0, 0]]


def test_skill_advantage_is_zero_off_the_mask_even_where_numbers_stand():
    got = skill_advantage(torch.ones(1, 3), torch.zeros(1, 3), torch.tensor([[1, 0, 1]]))
    assert got.tolist() == [[1, 0, 1]]


def test_skill_advantage_carries_no_gradient():
    old = torch.zeros(1, 2, requires_grad=True)
    assert not skill_advantage(torch.ones(1, 2), old, torch.ones(1, 2)).requires_grad


def test_combine_adds_each_level_with_its_own_weight():
    outcome, mask = torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]])
    episode, step = torch.tensor([[0.5, 0.25], [0, 0]]), torch.tensor([[0.0, 0], [2, 0]])
    got = combine(outcome, episode, step, mask, episode_weight=0.1, step_weight=0.2)
    assert torch.allclose(got, torch.tensor([[1.05, 1.025], [-0.6, 0]]))


def test_combine_clips_the_shift_before_weighting():
    got = combine(
        torch.zeros(1),
        torch.tensor([[5.0, -5.0]]),
        None,
        torch.ones(1, 2),
        episode_weight=2,
        step_weight=0,
        skill_clip=1,
    )
    assert got.tolist() == [[2, -2]]


values = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(values, values, st.booleans(), st.booleans()), min_size=1, max_size=20), values)
def test_no_nan_reaches_the_result_and_zero_weights_are_grpo(tokens, outcome):
    old = torch.tensor([[a if scored else NAN for a, _, scored, _ in tokens]])
    skill = torch.tensor([[b if scored else NAN for _, b, _, scored in tokens]])
    mask = ~old.isnan()
    shift = skill_advantage(skill, old, mask)
    outcome = torch.tensor([outcome])
    assert combine(outcome, shift, shift, mask, episode_weight=0.3, step_weight=0.1).isfinite().all()
    grpo = combine(outcome, None, None, mask, episode_weight=1, step_weight=1)
    assert torch.equal(combine(outcome, shift, shift, mask, episode_weight=0, step_weight=0), grpo)
    assert torch.equal(grpo, torch.where(mask, outcome, torch.zeros(())))


def played(group: int, reward: float, *observations: str, penalty: float = 0.0) -> Trajectory:
    """A trajectory; `penalty` is its first step's."""
    steps = [Step((), o, [1], [2], "", "", True, penalty * (t == 0)) for t, o in enumerate(observations)]
    return Trajectory("task", group, steps, reward > 0, reward)


def test_state_groups_are_of_one_task():
    assert state_groups(torch.tensor([0, 0, 1, 0]), ["hall", "bed", "hall", "hall"]).tolist() == [0, 1, 2, 0]


def test_step_relative_advantage_by_hand():
    # Two rollouts start in the hall: one wins 10 after 2 more steps, one loses. G = 0.5^2 * 10 = 2.5, and 0 - 1 = -1
    # (an invalid action): mean 0.75, sample std 3.5 / sqrt(2). The step alone in its state has nothing to compare.
    rewards, penalties = torch.tensor([10.0, 10, 10, 0]), torch.tensor([0.0, 0, 0, 1])
    left, states = torch.tensor([2, 1, 0, 0]), torch.tensor([0, 1, 2, 0])
    mean = step_relative_advantage(rewards, penalties, left, states, gamma=0.5, normalize="mean")
    assert mean.tolist() == [1.75, 0, 0, -1.75]
    both = step_relative_advantage(rewards, penalties, left, states, gamma=0.5)
    assert torch.allclose(both, torch.tensor([0.707107, 0, 0, -0.707107]), atol=1e-5)


def test_gigpo_adds_the_step_relative_part_to_the_outcome():
    trajectories = [played(0, 10.0, "hall", "bed"), played(0, 0.0, "hall", "desk", penalty=1.0)]
    plain, metrics = outcome_of(Config(algo="grpo", normalize="mean"), trajectories)
    assert plain.tolist() == [5.25, 5.25, -5.75, -4.75]  # returns 10 10 -1 0, mean 4.75
    assert metrics == {"advantage/silent_groups": 0}
    both, metrics = outcome_of(Config(algo="gigpo", normalize="mean", gamma=0.5, state_weight=2.0), trajectories)
    assert both.tolist() == [5.25 + 2 * 3, 5.25, -5.75 - 2 * 3, -4.75]  # G in the hall: 5 and -1, mean 2
    assert metrics == {"advantage/silent_groups": 0, "advantage/state_group_size": 4 / 3}


def test_groups_whose_rollouts_are_equal_are_silent():
    trajectories = [played(group, reward, "hall") for group, reward in [(0, 10.0), (0, 10.0), (1, 0.0), (1, 10.0)]]
    assert silent_groups(trajectories) == {0: True, 1: False}
    assert outcome_of(Config(), trajectories)[1] == {"advantage/silent_groups": 0.5}


def test_rescale_by_hand():
    outcome, mask = torch.tensor([2.0, -2.0]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    shift = torch.tensor([[0.1, -9.0, 0.0], [0.1, -9.0, 9.0]])
    got = rescale(outcome, shift, mask, mix=0.5, clip=0.2)
    # exp(0.1) = 1.105171, exp(-9) -> 0.8; for the loss exp(-0.1) = 0.904837, exp(9) -> 1.2
    assert torch.allclose(got, torch.tensor([[2.105171, 1.8, 2.0], [-1.904837, -2.2, 0.0]]), atol=1e-5)
    assert torch.equal(rescale(outcome, shift, mask, mix=0.0, clip=0.2), outcome[:, None] * mask)


normal = st.floats(-100, 100, width=32, allow_subnormal=False)  # a tenth of the smallest subnormal number is 0


@given(st.lists(values, min_size=1, max_size=9), normal, st.floats(0, 1), st.floats(0, 0.9))
def test_rescale_never_turns_a_sign(shifts, outcome, mix, clip):
    outcome, shift = torch.tensor([outcome]), torch.tensor([shifts])
    got = rescale(outcome, shift, torch.ones_like(shift), mix=mix, clip=clip)
    assert (got.sign() == outcome.sign()).all()
    assert (got.abs() <= outcome.abs() * (1 + clip) * 1.001).all()


def test_merge_knows_what_was_not_scored():
    got = merge(torch.ones(1, 3), torch.tensor([[1.0, NAN, NAN]]), torch.tensor([[2.0, 5.0, NAN]]))
    assert got[0, :2].tolist() == [3, 5]
    assert got[0, 2].isnan()


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("grpo", [[2, 2], [-1, 0]]),
        ("gigpo", [[2, 2], [-1, 0]]),  # what it adds is in `outcome` already
        ("opid", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opid-shuffled", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opid-oracle", [[2 + 0.5 * 0.3, 2 - 0.5 * 0.1], [-1 + 0.25 * 0.2, 0]]),
        ("opsd", [[0, 0], [0, 0]]),
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
    config = Config(algo=algo, episode_weight=0.5, step_weight=0.25)
    got, skill_advantages = advantages_of(config, 0, torch.tensor([2.0, -1.0]), old, scored if config.levels else {})
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-5)
    assert skill_advantages.isnan().tolist() == ([[False, False], [False, True]] if config.levels else [[True] * 2] * 2)


def test_the_shift_is_the_difference_to_its_base():
    """By the scorer's own plain log-prob -1.4 the skill praises with 0.4 what the policy's -0.5 would have blamed."""
    old, base, scored = torch.tensor([[-0.5, NAN]]), torch.tensor([[-1.4, NAN]]), {"step": torch.tensor([[-1.0, NAN]])}
    config, outcome = Config(step_weight=2.0), torch.tensor([1.0])
    assert torch.allclose(advantages_of(config, 0, outcome, old, scored, base)[0], torch.tensor([[1.8, 0.0]]))
    assert torch.allclose(advantages_of(config, 0, outcome, old, scored)[0], torch.tensor([[0.0, 0.0]]))


def test_the_skill_term_fades_in_a_line_to_grpo():
    config = Config(episode_weight=0.5, step_weight=1.0, skill_iterations=4)
    old, outcome = torch.tensor([[-1.0], [-2.0]]), torch.tensor([2.0, -1.0])
    scored = {"episode": torch.tensor([[-0.6], [NAN]]), "step": torch.tensor([[NAN], [-1.0]])}  # shifts 0.4 and 1
    expected = {0: [2 + 0.5 * 0.4, -1 + 1], 1: [2 + 0.75 * 0.5 * 0.4, -1 + 0.75], 4: [2, -1], 9: [2, -1]}
    for iteration, wanted in expected.items():
        advantages, skills = advantages_of(config, iteration, outcome, old, scored)
        assert torch.allclose(advantages[:, 0], torch.tensor(wanted, dtype=torch.float32))
        assert torch.allclose(skills[:, 0], torch.tensor([0.4, 1.0]))  # what is logged stays what it was


def test_opd_is_the_teachers_shift_and_nothing_else():
    config = Config(algo="opd", teacher="smollm2")
    old, teacher = torch.tensor([[-1.0, NAN]]), torch.tensor([[-0.25, NAN]])
    assert advantages_of(config, 0, torch.tensor([7.0]), old, {"teacher": teacher})[0].tolist() == [[0.75, 0]]
