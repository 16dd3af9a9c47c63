"""Muon in float32 against torch's, and against what it is meant to be."""

import copy

import pytest
import torch
from torch.optim import _muon

from tiny.muon import ExactMuon, orthogonalised
from tiny.warmstart import optimizers, tiny_model

HOW = ((3.4445, -4.775, 2.0315), 5, 1e-7)  # torch's own coefficients, steps and eps


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    found = orthogonalised(gradient, *HOW)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape and values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    middle = u.T @ found @ v.T  # diagonal
    assert (middle - middle.diag().diag()).abs().max() < 1e-4


def test_a_singular_value_by_hand():
    """One value s, scaled to 1 first: s -> a s + b s^3 + c s^5, five times."""
    s, (a, b, c) = 1.0, HOW[0]
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert orthogonalised(torch.tensor([[7.0]]), *HOW).item() == pytest.approx(s, abs=1e-5)


def test_a_step_is_torchs_but_for_rounding_and_leaves_torchs_as_it_was():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(12, 20))
    theirs, before, torchs = copy.deepcopy(ours), ours.detach().clone(), _muon._zeropower_via_newtonschulz
    taken = []
    for parameter, kind in ((ours, ExactMuon), (theirs, torch.optim.Muon)):
        optimizer = kind([parameter], lr=0.1, weight_decay=0.01)
        torch.manual_seed(1)
        for _ in range(3):
            parameter.grad = torch.randn(12, 20)
            optimizer.step()
        taken.append(parameter.detach() - before)
    assert (taken[0] - taken[1]).norm() < 0.02 * taken[1].norm()
    assert not torch.equal(*taken)  # bfloat16 rounds
    assert _muon._zeropower_via_newtonschulz is torchs


@pytest.mark.parametrize("has, kind", [(True, torch.optim.Muon), (False, ExactMuon)])
def test_the_warm_start_multiplies_in_what_the_processor_has(has, kind, monkeypatch):
    monkeypatch.setattr("tiny.warmstart.multiplies_bfloat16", lambda device: has)
    assert type(optimizers(tiny_model(50, seed=0, width=48))[0]) is kind
