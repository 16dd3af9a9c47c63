"""RLSD's rescaling in hand-computed numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.rlsd import Rlsd, rescale
from config import Config

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
    assert [Rlsd(Config(algo="rlsd")).mix(i) for i in (0, 25, 50, 60)] == [0.5, 0.25, 0, 0]
    assert Rlsd(Config(algo="rlsd", rlsd_iterations=0)).mix(1000) == 0.5
