"""runlog/silence.py: which part of an iteration failed, in words."""

import pytest
import torch

from data import Advantages, Batch, Step, Trajectory
from runlog.silence import shares, silences
from tests.settings import laptop

FINE = {
    **{"episodes": 8, "rollout/cut_off": 0.1, "rollout/unknown_tokens": 0.0, "rollout/valid_actions": 0.5},
    **{"guided/tokens": 0.8, "advantage/outcome_abs": 0.3, "advantage/skill_abs": 0.1, "skills/parse_rate": 1.0},
}


def test_an_iteration_that_may_have_taught_something_is_quiet():
    assert silences(laptop(), FINE) == {}


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        ({"rollout/cut_off": 0.9}, ["cut off"], "90% of the responses are cut off at --max-new-tokens 12"),
        ({"rollout/unknown_tokens": 0.8}, ["unknown"], "80% of the prompts' tokens are unknown to --model tiny"),
        ({"rollout/valid_actions": 0.0}, ["actions"], "tools/coldstart.py"),
        ({"guided/tokens": 0.0, "skills/parse_rate": 0.0}, ["skills"], "--skill-prefill"),
        ({"guided/tokens": 0.0, "guided/episode_too_long": 32}, ["skills"], "do not fit into --context-limit 1024"),
        ({"guided/tokens": 0.0, "skills/parse_rate": 0.0, "skills/too_long": 8}, ["skills"], "--skill-context-limit"),
        ({"guided/tokens": 0.0}, ["skills"], "name no step that --routing critical-first"),
        ({"advantage/skill_abs": 0.0}, ["shift"], "change no log-prob"),
        (
            {"guided/step": 0.0, "skills/step_keys_dropped": 7},
            ["steps"],
            "(7 name no step), so --step-weight does noth",
        ),
        ({"rollout/context_full": 5}, ["full"], "5 of 8 episodes end because their context is full, at --context-limi"),
        ({"rollout/context_full": 1, "rollout/too_long": 8}, ["full"], "9 of 16 episodes end"),
        ({"advantage/skill_abs": 0.0, "advantage/outcome_abs": 0.0}, ["shift", "advantages"], "every advantage is 0"),
    ],
)
def test_what_failed_is_named_with_the_flag_that_helps(changes, kinds, words):
    found = silences(laptop(), FINE | changes)
    assert list(found) == kinds
    assert any(words in text for text in found.values())


def test_a_writer_elsewhere_is_not_told_of_flags_for_local_ones():
    config = laptop(skill_writer="json:loads")
    refused = FINE | {"guided/tokens": 0.0, "skills/parse_rate": 0.0, "skills/too_long": 8}
    assert silences(config, refused)["skills"].endswith(
        "--skill-writer json:loads gave no answer that could be read as skills (8 refusals)"
    )


def test_grpo_is_not_told_of_skills():
    assert silences(laptop(algo="grpo"), FINE | {"guided/tokens": 0.0, "advantage/skill_abs": 0.0}) == {}


def test_what_writes_no_skills_is_not_told_of_writers():
    found = silences(laptop(algo="sdpo"), FINE | {"guided/tokens": 0.0})
    assert found == {
        "skills": "no step is guided by a skill: --algo sdpo found none. More --rollouts, easier tasks, or a cold start"
    }


def test_shares_by_hand():
    """One step ends with 9, one is cut off; of five context tokens two are unknown (7); two of four are guided."""
    steps = [
        Step((), "", context, response, "", "", True) for context, response in (([7, 1, 2], [3, 9]), ([7, 1], [3, 3]))
    ]
    nan = float("nan")
    batch = Batch([Trajectory("", 0, steps, False)], [None], [[(), ()]], {}, torch.zeros(2, 2), None, {})
    batch.advantages = Advantages(torch.zeros(2, 2), torch.zeros(2), torch.tensor([[0.5, 0.0], [nan, nan]]))
    told = {"rollout/cut_off": 0.5, "rollout/unknown_tokens": 0.4, "rollout/valid_actions": 1.0, "guided/tokens": 0.5}
    assert shares(batch, {9}, 7) == told
    assert shares(batch, {9}, None)["rollout/unknown_tokens"] == 0.0
