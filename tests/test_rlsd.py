"""RLSD's rescaling in hand-computed numbers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Batch, Step, Trajectory
from variants.rlsd import Settings, advantages, rescale

values = st.floats(-100, 100, width=32)


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


def test_rlsd_lets_go_of_the_skill_in_a_line():
    """A_ep 2 of a step that its skill praises beyond the bound: 2 (1 - mu + 1.2 mu), mu from 1/2 to 0."""
    played = [Trajectory("t", 0, [Step((), "", [1], [2], "", "", True)], True)]
    scored = {"episode": torch.zeros(1, 1)}
    batch = Batch(played, [None], [[()]], {}, torch.full((1, 1), -9.0), None, scored)

    def of(iteration, **changes) -> float:
        config = Settings(algo="rlsd", success_reward=2.0, rlsd_clip=0.2, **changes)
        return advantages(SimpleNamespace(config=config, iteration=iteration), batch).total.item()

    assert [of(i) for i in (0, 25, 50, 60)] == pytest.approx([2.2, 2.1, 2, 2], rel=1e-5)
    assert of(1000, rlsd_iterations=0) == pytest.approx(2.2, rel=1e-5)
