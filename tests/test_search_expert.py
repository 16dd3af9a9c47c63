"""The expert answers everything through the actual retriever; a novice of each kind does not."""

from random import Random

import pytest

from envs.search import SearchEnv, vocabulary
from envs.search.expert import FLAWS, SearchExpert
from envs.search.facts import SPLITS, generated_questions


def play(env, game, flaws=frozenset()):
    """-> (won, [(observation, action)])."""
    expert = SearchExpert(Random(0), flaws)
    observation, info = env.reset(options={"game": game})
    expert.reset(info["task"])
    turns, over = [], False
    while not over:
        turns.append((observation, expert.act(observation)))
        observation, _, terminated, truncated, info = env.step(turns[-1][1])
        over = terminated or truncated
    return info["won"], turns


@pytest.mark.parametrize("split", SPLITS)
def test_expert_answers_every_generated_question(split):
    env, known = SearchEnv(prompt="compact"), set(vocabulary())
    for game, question in zip(env.tasks(split), generated_questions()[split], strict=True):
        won, turns = play(env, game)
        assert won and len(turns) == len(question.hops) + 1, turns
        for text in (text for turn in turns for text in turn):
            assert set(text.split()) <= known, text


def test_expert_reads_the_official_style_as_well():
    env = SearchEnv()
    for game in env.tasks("valid_unseen")[:100]:
        assert play(env, game)[0]


def share(flaw, hops, sample=100):
    env = SearchEnv(prompt="compact")
    games = [
        game
        for game, question in zip(env.tasks("train"), generated_questions()["train"], strict=True)
        if len(question.hops) == hops
    ][:sample]
    return sum(play(env, game, {flaw})[0] for game in games) / len(games)


@pytest.mark.parametrize(
    ("flaw", "one_hop", "two_hop"),
    [  # at least that share of one-hop questions is still answered, at most that share of two-hop ones
        ("one_hop", 1.0, 0.0),
        ("whole_question", 0.95, 0.25),
        ("guess", 0.0, 0.25),
        ("distractor", 0.3, 0.75),
    ],
)
def test_novices_fail_in_their_way(flaw, one_hop, two_hop):
    assert share(flaw, 1) >= one_hop
    assert share(flaw, 2) <= two_hop
    assert flaw != "guess" or share(flaw, 1) < 0.3


def test_a_novice_is_caught_in_the_act():
    env = SearchEnv(prompt="compact")
    two_hop = next(i for i, q in enumerate(generated_questions()["train"]) if len(q.hops) == 2)
    question = generated_questions()["train"][two_hop]
    turns = {flaw: play(env, f"search/train/{two_hop}", {flaw})[1] for flaw in FLAWS}
    assert [action.split()[0] for _, action in turns["one_hop"]] == ["search", "answer"]
    assert [action.split()[0] for _, action in turns["guess"]] == ["answer"]
    assert turns["whole_question"][0][1] == f"search {turns['whole_question'][0][0]}"
    assert question.given.lower() in turns["one_hop"][0][1]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown flaws lazy; known: one_hop"):
        SearchExpert(Random(0), {"lazy"})
    with pytest.raises(ValueError, match="not a generated question"):
        SearchExpert(Random(0)).reset("who wrote hamlet")
