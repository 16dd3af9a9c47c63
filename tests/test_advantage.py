"""Hand-computed numbers for everything that enters the advantage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advantage import combine, outcome_advantage, skill_advantage, sum_of_scored

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


def test_eps_is_added_to_the_std():
    # std of 1 and 0: sqrt(0.5) = 0.70711; 0.5 / (0.70711 + 0.5)
    got = outcome_advantage(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.arange(2), eps=0.5)
    assert torch.allclose(got, torch.tensor([0.41421, -0.41421]), atol=1e-5)


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
    got = combine(outcome, {"episode": episode, "step": step}, {"episode": 0.1, "step": 0.2}, mask)
    assert torch.allclose(got, torch.tensor([[1.05, 1.025], [-0.6, 0]]))


def test_combine_adds_levels_in_the_order_of_their_weights():
    """Whichever was scored first: a sum of floats depends on its order."""
    outcome, mask = torch.tensor([0.1]), torch.ones(1, 2)
    episode, step, weights = torch.tensor([[0.7, 1e-9]]), torch.tensor([[0.2, -3.3]]), {"episode": 0.1, "step": 0.3}
    got = combine(outcome, {"episode": episode, "step": step}, weights, mask)
    assert torch.equal(got, outcome[:, None] * mask + 0.1 * episode + 0.3 * step)
    assert torch.equal(combine(outcome, {"step": step, "episode": episode}, weights, mask), got)


values = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(values, values, st.booleans(), st.booleans()), min_size=1, max_size=20), values)
def test_no_nan_reaches_the_result_and_zero_weights_are_grpo(tokens, outcome):
    old = torch.tensor([[a if scored else NAN for a, _, scored, _ in tokens]])
    skill = torch.tensor([[b if scored else NAN for _, b, _, scored in tokens]])
    mask = ~old.isnan()
    shift = skill_advantage(skill, old, mask)
    outcome = torch.tensor([outcome])
    shifts = {"episode": shift, "step": shift}
    assert combine(outcome, shifts, {"episode": 0.3, "step": 0.1}, mask).isfinite().all()
    grpo = combine(outcome, {}, {"episode": 1.0, "step": 1.0}, mask)
    assert torch.equal(combine(outcome, shifts, {"episode": 0.0, "step": 0.0}, mask), grpo)
    assert torch.equal(grpo, torch.where(mask, outcome, torch.zeros(())))


def test_the_sum_knows_what_was_not_scored():
    """The last token is off the mask; of the others each level scored some, as one that knows neither."""
    mask = torch.tensor([[True, True, True, True, False]])
    logprobs = {
        "episode": torch.tensor([[-1.0, NAN, -1.0, NAN, NAN]]),
        "step": torch.tensor([[-1.0, -1.0, NAN, NAN, NAN]]),
    }
    shifts = {"episode": torch.tensor([[1.0, 0, 3, 0, 0]]), "step": torch.tensor([[2.0, 5, 0, 0, 0]])}
    got = sum_of_scored(shifts, logprobs, mask)
    assert got[0, :3].tolist() == [3, 5, 3]
    assert got[0, 3:].isnan().all()
    assert sum_of_scored({}, {}, mask).isnan().all()
