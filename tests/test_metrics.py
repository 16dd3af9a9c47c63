"""What is logged, by hand."""

import pytest
import torch

from runlog.metrics import learns_nothing, over_processes, silent_groups
from tests.settings import laptop


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
    other = Process()
    over_processes(theirs, {"episodes": 1, "steps": 2}, other)
    got = over_processes(mine, {"episodes": 3, "steps": 30}, Process(other))
    assert got["episodes"] == 4
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


NOTHING = {"rollout/valid_actions": 0.0, "train/success": 0.0, "skills/parse_rate": 0.0, "rollout/response_tokens": 5.0}


def test_a_run_that_learns_nothing_is_told_what_to_change():
    warning = learns_nothing(config := laptop(), NOTHING)
    assert warning.startswith("WARNING: this run is learning nothing: no action was valid, no episode succeeded, ")
    assert "no answer could be read as skills" in warning and "--max-new-tokens" not in warning
    assert "Does --prompt compact fit --model tiny?" in warning
    cut = learns_nothing(config, NOTHING | {"rollout/response_tokens": 11.9})  # of 12
    assert "responses fill their 12 tokens: raise --max-new-tokens" in cut
    grpo = learns_nothing(laptop(algo="grpo"), {k: v for k, v in NOTHING.items() if not k.startswith("skills/")})
    assert "learning nothing" in grpo and "skills" not in grpo


@pytest.mark.parametrize("name", ["rollout/valid_actions", "train/success", "skills/parse_rate"])
def test_a_little_of_anything_is_something(name):
    assert learns_nothing(laptop(), NOTHING | {name: 0.01}) == ""
