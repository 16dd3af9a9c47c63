"""What is logged, by hand."""

import math

import pytest
import torch

from runlog.metrics import entropy, over_processes, silent_groups


def test_groups_whose_rollouts_are_equal_are_silent():
    assert silent_groups([0, 0, 1, 1], [10.0, 10.0, 0.0, 10.0]) == {0: True, 1: False}


class Process:
    """An accelerator: what it gathers is kept, and comes after what the other process gathered."""

    device = torch.device("cpu")

    def __init__(self, other=None):
        self.other, self.own = other, None

    def gather(self, tensor):
        self.own = tensor
        return tensor if self.other is None else torch.cat([self.other.own, tensor])


def test_means_over_processes_are_those_of_everything_together():
    """Three episodes here and one there, of which 2 and 0 have skills; 30 steps and 2; gradients are the same."""
    mine = {"episodes": 3, "skills/parse_rate": 2 / 3, "rollout/valid_actions": 0.5, "grad_norm": 2.0, "loss/kl": 0.25}
    mine["rollout/logprob_gap"] = 0.25
    theirs = {"episodes": 1, "skills/parse_rate": 0.0, "rollout/valid_actions": 1.0, "grad_norm": 2.0, "loss/kl": 0.25}
    theirs["rollout/logprob_gap"] = 0.5
    mine["tokens/sampled"], theirs["tokens/sampled"] = 100, 20
    other = Process()
    over_processes(theirs, {"episodes": 1, "steps": 2}, other)
    got = over_processes(mine, {"episodes": 3, "steps": 30}, Process(other))
    assert (got["episodes"], got["tokens/sampled"]) == (4, 120)
    assert got["skills/parse_rate"] == pytest.approx(2 / 4)
    assert got["rollout/valid_actions"] == pytest.approx((15 + 2) / 32)
    assert (got["grad_norm"], got["loss/kl"]) == (2.0, 0.25)
    assert got["rollout/logprob_gap"] == 0.5  # the largest


def test_a_process_without_a_share_counts_for_nothing_whatever_it_says():
    other = Process()
    over_processes(
        {"advantage/outcome_abs": float("nan"), "guided/step": float("nan")}, {"tokens": 0, "steps": 0}, other
    )
    got = over_processes({"advantage/outcome_abs": 0.5, "guided/step": 0.25}, {"tokens": 9, "steps": 3}, Process(other))
    assert got == {"advantage/outcome_abs": 0.5, "guided/step": 0.25}


def test_entropy_is_the_mean_surprise_over_response_tokens():
    """Two rows of two and one token, chances 1/2, 1/8 and 1/4: (1 + 3 + 2) / 3 = 2 bits. Over processes tokens count:
    three of 2 bits here, one of 6 there, make 3."""
    old_logprobs = torch.tensor([[0.5, 0.125], [0.25, float("nan")]]).log()  # (2, 2)
    mine = {"rollout/entropy": entropy(old_logprobs, ~old_logprobs.isnan())}
    assert mine["rollout/entropy"] == pytest.approx(2 * math.log(2))
    other = Process()
    over_processes({"rollout/entropy": 6 * math.log(2)}, {"tokens": 1.0}, other)
    assert over_processes(mine, {"tokens": 3.0}, Process(other))["rollout/entropy"] == pytest.approx(3 * math.log(2))
