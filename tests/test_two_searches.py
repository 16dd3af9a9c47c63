"""Where the two places are, by the words that stand before them, and what is said about probabilities, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs.search import SearchEnv
from envs.search.facts import generated_questions
from experiments import two_searches
from experiments.two_searches import parting, places, read, summary, table
from lm.encoder import Encoder
from lm.loading import save_policy
from tiny.warmstart import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny_tokenizer("search"), "chat")


def test_the_places_are_where_a_novice_goes_wrong(encoder):
    words, questions = encoder.tokenizer.decode, generated_questions()["valid_seen"][:12]
    games = SearchEnv(prompt="compact").tasks("valid_seen")[:12]
    found = places(games, encoder)
    asked = [question for question in questions if len(question.hops) == 2]
    assert 2 < len(found) == len(asked) < 12
    for ((before, first), (after, again)), question in zip(found, asked, strict=True):
        # as far as the whole question reads alike: "search country where ..." for "search what is ..."
        said = words(before).split("<assistant>")[1].split()
        assert said == ["search"] and words([first]) not in ("what", "which", "on", "in")
        assert words([again]) == "search" and words(after).endswith("<assistant>")
        # the first search was made, for what the question names, and its passages are there
        made = words(after).split("<assistant>")[1].split("<end>")[0]
        assert made.split()[:2] == ["search", words([first])] and question.given.lower() in made
        assert len(after) > len(before) + 20


def test_where_two_texts_part():
    assert parting([9, 9], [1, 2, 3], [1, 2, 4, 5]) == ([9, 9, 1, 2], 3)
    assert parting([9], [1], [2]) == ([9], 1)


def test_probabilities_are_read_at_the_last_position():
    given = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]).log()  # after token 0, after token 1

    def model(input_ids):
        return SimpleNamespace(logits=given[input_ids])

    right = read(model, [[([1, 0], 2), ([0, 1], 1)], [([0], 0), ([1], 0)]])
    assert right == pytest.approx(np.array([[0.1, 0.6], [0.7, 0.1]]))


def test_success_at_a_cold_temperature_needs_both():
    assert summary(np.array([[0.9, 0.6], [0.5, 0.2], [1.0, 0.4], [0.8, 0.8]])) == pytest.approx([0.8, 0.5, 0.5])
    text = table({"start": [[0.4, 0.03, 0.0]], "opid": [[0.9, 0.2, 0.5], [0.7, 0.6, 0.0]]})
    assert text.splitlines()[0] == "| policy | part first, % | search again, % | both likely, % |"
    assert text.splitlines()[2:] == [
        "| start | 40 (40) | 3 (3) | 0 (0) |",
        "| opid | 80 (90, 70) | 40 (20, 60) | 25 (50, 0) |",
    ]


def test_the_command_reads_every_policy_of_a_comparison(tmp_path, encoder, monkeypatch, capsys):
    tokenizer = encoder.tokenizer
    for seed, name in enumerate(("start", "opid-k0-seed0/policy", "opid-k0-seed1/policy")):
        save_policy(tiny_model(len(tokenizer), seed=seed, width=48), tokenizer, tmp_path / name)
    (tmp_path / "grpo-seed0").mkdir()  # a run that is not over
    monkeypatch.setattr(two_searches, "games_of", lambda config, split: SearchEnv(prompt="compact").tasks(split)[:6])
    two_searches.main(["--runs", str(tmp_path), "--results", str(tmp_path / "results")])
    stored = json.loads((tmp_path / "results" / "two_searches.json").read_text())["policies"]
    assert {arm: len(policies) for arm, policies in stored.items()} == {"start": 1, "opid-k0": 2}
    assert stored["opid-k0"][0] != stored["opid-k0"][1]
    assert "| opid-k0 |" in capsys.readouterr().out


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no folder `start`"):
        two_searches.main(["--runs", str(tmp_path)])
