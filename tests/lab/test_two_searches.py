"""Where the two places are, by the words that stand before them, and what is said about probabilities, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs.search import SearchEnv
from envs.search.facts import generated_questions
from lab.experiments import two_searches
from lab.experiments.two_searches import SKILLS, logprobs_at, parting, places, shifted, summary, table
from lm.loading import save_policy
from tiny.demonstrations import Demonstrator
from tiny.warmstart import tiny_model, tiny_tokenizer
from variants.opid_placebo import EPISODE as NOTHING


@pytest.fixture(scope="module")
def demonstrator():
    return Demonstrator(tiny_tokenizer("search"), seed=0, env="search")


def test_the_places_are_where_a_novice_goes_wrong(demonstrator):
    words, questions = demonstrator.tokenizer.decode, generated_questions()["valid_seen"][:12]
    games = SearchEnv(prompt="compact").tasks("valid_seen")[:12]
    found = places(games, demonstrator)
    asked = [question for question in questions if len(question.hops) == 2]
    assert 2 < len(found) == len(asked) < 12
    for ((before, first, whole), (after, again, answer)), question in zip(found, asked, strict=True):
        # as far as the whole question reads alike: "search country where ..." for "search what is ..."
        said = words(before).split("<assistant>")[1].split()
        assert said == ["search"] and words([whole]) in ("what", "which", "on", "in") and first != whole
        assert words([again, answer]) == "search answer" and words(after).endswith("<assistant>")
        # the first search was made, for what the question names, and its passages are there
        made = words(after).split("<assistant>")[1].split("<end>")[0]
        assert made.split()[:2] == ["search", words([first])] and question.given.lower() in made
        assert len(after) > len(before) + 20


def test_the_places_in_a_pretrained_models_tokens(smollm2):
    tokenizer = smollm2[1]
    found = places(SearchEnv(prompt="compact").tasks("valid_seen")[:6], Demonstrator(tokenizer, seed=0, env="search"))
    for (before, first, whole), (after, again, answer) in found:
        said = tokenizer.decode(before).rpartition("<|im_start|>assistant\n")[2]
        assert said.startswith("search") and first != whole
        assert tokenizer.decode([again]) == "search" and "answer".startswith(tokenizer.decode([answer]))
        turns = tokenizer.decode(after).split("<|im_start|>assistant\n")
        assert len(turns) == 3 and turns[2] == ""
        # the first search as a rollout would have left it: with its end
        made = turns[1].partition("<|im_end|>")[0]
        assert made.startswith(said + tokenizer.decode([first])) and made == made.strip() != turns[1]


def test_under_a_skill_only_the_skill_is_more(demonstrator):
    words, games = demonstrator.tokenizer.decode, SearchEnv(prompt="compact").tasks("valid_seen")[:6]
    told = {"avoid: whole question": "never search whole question first search each", "says nothing": NOTHING}
    for skill, said in told.items():
        guided = places(games, demonstrator, SKILLS[skill])
        for plain, own in zip(places(games, demonstrator), guided, strict=True):
            for (before, *right_and_careless), (under, *same) in zip(plain, own, strict=True):
                assert right_and_careless == same and len(under) > len(before)
                text = words(under)
                assert said in text.split("<assistant>")[0]
                start, end = text.index("skill"), text.index("<assistant>")
                assert (text[:start] + text[end:]).split() == words(before).split()


def test_where_two_texts_part():
    assert parting([9, 9], [1, 2, 3], [1, 2, 4, 5]) == ([9, 9, 1, 2], 3, 4)
    assert parting([9], [1], [2]) == ([9], 1, 2)


def test_probabilities_are_read_at_the_last_position():
    given = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]).log()  # after token 0, after token 1

    def model(input_ids):
        return SimpleNamespace(logits=given[input_ids])

    logprobs = logprobs_at(model, [[([1, 0], 2, 0), ([0, 1], 1, 2)], [([0], 0, 1), ([1], 0, 1)]])
    assert np.exp(logprobs) == pytest.approx(np.array([[[0.1, 0.7], [0.6, 0.3]], [[0.7, 0.2], [0.1, 0.6]]]))


def test_success_at_a_cold_temperature_needs_both():
    right = np.array([[0.9, 0.6], [0.5, 0.2], [1.0, 0.4], [0.8, 0.8]])
    assert summary(np.log(np.stack([right, np.full((4, 2), 0.1)], -1))) == pytest.approx([0.8, 0.5, 0.5])
    found = {"start": [[0.4, 0.03, 0.0]], "opid": [[0.9, 0.2, 0.5], [0.7, 0.6, 0.0]]}
    text = table(found, {"avoid: whole question": [[0.5, -1.5], [2.0, 0.25]]})
    assert text.splitlines()[0] == "| policy | part first, % | search again, % | both likely, % |"
    head = "part first: right word | part first: careless word | search again: right word | search again: careless word"
    assert f"| start under a skill, nats | {head} |" in text.splitlines()
    assert text.splitlines()[-1] == "| avoid: whole question | +0.50 | -1.50 | +2.00 | +0.25 |"
    assert text.splitlines()[2:4] == [
        "| start | 40 (40) | 3 (3) | 0 (0) |",
        "| opid | 80 (90, 70) | 40 (20, 60) | 25 (50, 0) |",
    ]


def test_what_a_skill_does_to_the_two_words(demonstrator):
    """A model that says the careless word the less, and all others the more, the longer the text is:
    the skill's words make it longer."""
    games = SearchEnv(prompt="compact").tasks("valid_seen")[:6]
    plain = places(games, demonstrator)
    careless = {word for question in plain for _, _, word in question}

    def model(input_ids):
        logits = torch.zeros(*input_ids.shape, len(demonstrator.tokenizer))
        logits[..., list(careless)] = -0.01 * input_ids.shape[1]
        return SimpleNamespace(logits=logits)

    found = shifted(model, games, demonstrator, logprobs_at(model, plain))
    assert found.keys() == {"avoid: first doc", "avoid: whole question", "says nothing"}
    others, theirs = len(demonstrator.tokenizer) - len(careless), len(careless)
    for skill, shifts in found.items():
        under = places(games, demonstrator, SKILLS[skill])

        def mean(of, at, under=under):
            return np.mean([of(len(a[at][0])) - of(len(b[at][0])) for a, b in zip(under, plain, strict=True)])

        def right(length):
            return -np.log(others + theirs * np.exp(-0.01 * length))

        for at in (0, 1):
            expected = [mean(right, at), mean(lambda length: right(length) - 0.01 * length, at)]
            assert shifts[at] == pytest.approx(expected, abs=1e-3) and shifts[at][1] < -0.03


def test_the_command_reads_every_policy_of_a_comparison(tmp_path, demonstrator, monkeypatch, capsys):
    tokenizer = demonstrator.tokenizer
    for seed, name in enumerate(("start", "opid-k0-seed0/policy", "opid-k0-seed1/policy")):
        save_policy(tiny_model(len(tokenizer), seed=seed, width=48), tokenizer, tmp_path / name)
    (tmp_path / "grpo-seed0").mkdir()  # a run that is not over
    monkeypatch.setattr(two_searches, "games_of", lambda config, split: SearchEnv(prompt="compact").tasks(split)[:6])
    two_searches.main(["--runs", str(tmp_path), "--results", str(tmp_path / "results.jsonl")])
    stored = json.loads((tmp_path / "results.jsonl").read_text())["policies"]
    assert {arm: len(policies) for arm, policies in stored.items()} == {"start": 1, "opid-k0": 2}
    assert stored["opid-k0"][0] != stored["opid-k0"][1]
    assert (shown := capsys.readouterr().out).count("| opid-k0 |") == 1
    page = (tmp_path / "results.md").read_text()
    assert page.startswith(f"## {tmp_path.name}\n\n| policy |") and shown.rpartition(" done\n")[2] in page


def test_starts_of_several_trainings_stand_side_by_side(tmp_path, demonstrator, monkeypatch):
    tokenizer = demonstrator.tokenizer
    for seed, name in enumerate(("start0", "start1", "opid-start0-seed0/policy", "opid-start1-seed0/policy")):
        save_policy(tiny_model(len(tokenizer), seed=seed, width=48), tokenizer, tmp_path / name)
    games = SearchEnv(prompt="compact").tasks("valid_seen")[:6]
    monkeypatch.setattr(two_searches, "games_of", lambda config, split: games)
    found, shifts = two_searches.measure(tmp_path, 4)
    assert {arm: len(policies) for arm, policies in found.items()} == {"start": 2, "opid": 2}
    assert found["start"][0] != found["start"][1]
    both = []
    for seed in (0, 1):
        model = tiny_model(len(tokenizer), seed=seed, width=48)
        twice = [*games[:4], *games[:4]]  # of either split
        plain = logprobs_at(model, places(twice, demonstrator))
        both.append(shifted(model, twice, demonstrator, plain)["says nothing"])
    assert shifts["says nothing"] == pytest.approx(np.mean(both, axis=0), abs=2e-4)


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no folder `start`"):
        two_searches.main(["--runs", str(tmp_path)])
