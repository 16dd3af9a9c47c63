"""The tiny model's demonstrations: what they teach is right, general, and spelled as training will see it."""

import random

import pytest
import torch

from envs.alfworld import AlfworldEnv
from envs.alfworld.engine import load_game
from skills import parse_skills
from tiny.alfworld import hindsight, hint, novice, reciter, watch
from tiny.warmstart import TinyDemonstrator, skills_json, tiny_model, warm_start


def play(game, seed: int, flaws: set[str], **habits):
    rng = random.Random(seed)
    return watch(load_game(game), rng, novice(rng, flaws, **habits))


@pytest.fixture(scope="module")
def demonstrator(tokenizer):
    return TinyDemonstrator(tokenizer, seed=0)


def test_flawless_play_wins_and_flaws_cost(games):
    plays = [play(g, i, set()) for i in range(5) for g in games]
    assert all(p.success for p in plays)
    novices = [play(g, i, {"forget"}) for i in range(5) for g in games]
    assert 0 < sum(p.success for p in novices) < 0.7 * len(novices)


def test_recorded_plays_are_real(games):
    record = play(games[0], 3, {"forget"})
    commands = [command for _, command, _ in record.turns]
    env = AlfworldEnv(prompt="compact")
    env.reset(options={"game": games[0]})
    for command in commands:
        won = env.step(command)[-1]["won"]
    assert won == record.success
    again = watch(load_game(games[0]), random.Random(3), reciter(commands), max_steps=len(commands))
    assert [(seen, done) for seen, done, _ in again.turns] == [(seen, done) for seen, done, _ in record.turns]


def test_skills_are_general(games):
    """No skill names a numbered place or thing: that is what only hindsight, or only this game, knows."""
    for seed in range(6):
        for game in games:
            skills = hindsight(play(game, seed, {"shut"}))
            for text in (skills.episode, *skills.steps.values()):
                assert not any(word.isdigit() for word in text.split()), text


def test_step_skills_say_what_a_good_player_would_do_there(games):
    for game in games:
        record = play(game, 1, {"forget", "shut"})
        for t, text in hindsight(record).steps.items():
            assert text == record.advice_in_words[t]
            assert record.critical[t]


def test_hint_words():
    assert hint("go to safe 1", held="") == "look in safe"
    assert hint("go to safe 1", held="pen 1") == "go to safe"
    assert hint("take pen 1 from safe 1", held="") == "take pen"
    assert hint("heat egg 2 with microwave 1", held="egg 2") == "heat egg with microwave"


def test_json_round_trip_in_the_tiny_tokenizer(tokenizer, games):
    skills = hindsight(play(games[0], 0, {"forget", "shut"}))
    ids = tokenizer(skills_json(skills))["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert parse_skills(tokenizer.decode(ids), 64, 5) == skills


def test_sequences_mark_just_the_responses(demonstrator, tokenizer, games):
    for game in games:
        for sequence in demonstrator.sequences(game):
            assert tokenizer.unk_token_id not in sequence.ids
            for _, start, size in sequence.responses:
                assert sequence.ids[start - 1] == tokenizer.convert_tokens_to_ids("<assistant>")
                assert sequence.ids[start + size - 1] == tokenizer.eos_token_id


def test_warm_start_learns_and_is_seeded(demonstrator, tokenizer, games):
    sequences = [s for _ in range(2) for g in games[:3] for s in demonstrator.sequences(g)]
    losses, weights = [], []
    for _ in range(2):
        model = tiny_model(len(tokenizer), seed=1, width=48)
        losses.append((warm_start(model, sequences, 0, epochs=1), warm_start(model, sequences, 0, epochs=12)))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert losses[0][1] < 0.85 * losses[0][0]
    assert torch.equal(weights[0], weights[1])
