"""The tiny model's demonstrations: what they teach is right, general, and spelled as training will see it."""

import random

import pytest
import torch

import tiny.warmstart
from envs.alfworld import AlfworldEnv
from envs.alfworld.engine import load_game
from lm.answers import parse_skills
from tiny.alfworld import hindsight, hint, novice, reciter, watch
from tiny.demonstrations import demonstrations
from tiny.loading import load_config, load_model
from tiny.plays import EMPTY_WORDS, one_flaw, script
from tiny.supervised import DECISIVE, demonstration_loss, shuffled_batches, token_weights
from tiny.warmstart import (
    BATCH_TOKENS,
    OTHER_TOKENS,
    WEIGHTS,
    TinyDemonstrator,
    curriculum,
    key_of,
    made_of,
    skills_json,
    tiny_model,
    tiny_tokenizer,
    warm_start,
    warm_started,
    weights_of,
    without_comments,
)

ENVS = ("alfworld", "search", "webshop")
SHIPPED = (("alfworld", 3), ("alfworld", 2), ("search", 2), ("webshop", 2))  # of ALFWorld's the benches have the second


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
    assert sum(p.success for p in novices) < 0.2 * len(novices)  # one that slips may win


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
            skills = hindsight(play(game, seed, {"forget"}))
            for text in (skills.episode, *skills.steps.values()):
                assert not any(word.isdigit() for word in text.split()), text


def test_step_skills_say_what_a_good_player_would_do_there(games):
    for game in games:
        record = play(game, 1, {"forget"})
        for t, text in hindsight(record).steps.items():
            assert text == record.advice_in_words[t]
            assert record.critical[t]


def test_hint_words():
    assert hint("go to safe 1", "pen", held="") == "for pen look in safe"
    assert hint("go to safe 1", "pen", held="pen 1") == "for pen go to safe"
    assert hint("take pen 1 from safe 1", "pen", held="") == "for pen take pen"
    assert hint("heat egg 2 with microwave 1", "egg", held="egg 2") == "for egg heat egg with microwave"


def test_json_round_trip_in_the_tiny_tokenizer(tokenizer, games):
    skills = hindsight(play(games[0], 0, {"forget"}))
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
    sequences = [s for _ in range(2) for g in games[:2] for s in demonstrator.sequences(g)]
    losses, weights = [], []
    for _ in range(2):
        model = tiny_model(len(tokenizer), seed=1, width=48)
        losses.append((warm_start(model, sequences, 0, epochs=1), warm_start(model, sequences, 0, epochs=8)))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert losses[0][1] < 0.85 * losses[0][0]
    assert torch.equal(weights[0], weights[1])


# ---- what a skill says, not that one is there ------------------------------------------------------------------------


@pytest.mark.parametrize("env", ENVS)
def test_every_skill_says_what_it_is_about(env):
    told = script(env)
    for seed, game in enumerate(told.games(5)):
        play = told.play(game, random.Random(seed), set())
        topic = told.topic(play)
        for text in (told.workflow(play), *(told.avoidance(play, flaw) for flaw in told.FLAWS)):
            assert text.startswith(f"for {topic} "), text


@pytest.mark.parametrize("env", ENVS)
def test_a_misfit_is_about_something_else_or_empty_and_changes_nothing(env):
    demonstrator = TinyDemonstrator(tiny_tokenizer(env), 0, env)
    told, games = demonstrator.script, demonstrator.script.games(12)
    for game in games:
        demonstrator.sequences(game)
    foreign, plays = 0, [told.play(game, random.Random(1), set()) for game in games]
    for play in plays:
        for _ in range(10):
            skill = demonstrator.misfit(play)
            empty = set(skill.split()) <= set(EMPTY_WORDS)
            foreign += not empty
            about = [heard.topic for heard in demonstrator.heard if heard.episode == skill]
            assert empty or (about and told.topic(play) not in about)
    assert 0.5 < foreign / (10 * len(plays)) < 0.9
    before = [list(play.turns) for play in plays]
    hints = [text for play in plays for text in demonstrator.mislead(play).hints.values()]
    assert hints and [play.turns for play in plays] == before


@pytest.mark.parametrize("env", ENVS)
def test_judgements_ask_as_often_of_own_skills_as_of_others(env):
    tokenizer = tiny_tokenizer(env)
    demonstrator = TinyDemonstrator(tokenizer, 0, env)
    told = demonstrator.script
    for game in told.games(4):
        play = demonstrator.play(game, set())
        texts = [tokenizer.decode(s.ids) for s in demonstrator.judging(play)]
        own = [told.workflow(play), *(told.avoidance(play, flaw) for flaw in told.FLAWS)]
        for text in texts:
            assert ("<assistant> yes" in text) == any(f" skill {skill} fits" in text for skill in own), text
        assert sum("<assistant> yes" in text for text in texts) == len(texts) / 2 == 1 + len(told.FLAWS)


def test_one_flaw_is_drawn_by_its_chance():
    rng, chances = random.Random(0), {"a": 0.5, "b": 0.25}
    drawn = [one_flaw(chances, rng) for _ in range(4000)]
    assert all(len(flaws) <= 1 for flaws in drawn)
    assert sum(flaws == {"a"} for flaws in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert sum(flaws == {"b"} for flaws in drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_decisive_turns_are_those_at_which_the_flaw_would_show(games):
    for game in games:
        record = play(game, 5, {"forget"})
        for t, (_, command, advice) in enumerate(record.turns):
            if t not in record.slips and command != advice:
                assert t in record.decisive, (game, t, command, advice)


def test_decisive_responses_weigh_more_in_acting_under_a_skill(demonstrator, games):
    record = demonstrator.play(games[0], set(), skill="for one thing")
    [sequence] = demonstrator.acting(record)
    assert sequence.decisive == record.decisive
    heavy = [size for turn, _, size in sequence.responses if turn in record.decisive]
    light = [size for turn, _, size in sequence.responses if turn not in record.decisive]
    weights = token_weights(sequence, 0.25)
    assert len(weights) == len(sequence.ids) - 1
    assert sum(weights) == DECISIVE * sum(heavy) + sum(light) + 0.25 * (len(weights) - sum(heavy) - sum(light))
    assert sum(token_weights(sequence, 0.0)) == DECISIVE * sum(heavy) + sum(light)
    [alone] = demonstrator.acting(demonstrator.play(games[0], set()))
    assert not alone.decisive


def test_the_loss_is_the_weighted_mean_by_hand(demonstrator, tokenizer, games):
    model = tiny_model(len(tokenizer), seed=1, width=48)
    [sequence] = demonstrator.acting(demonstrator.play(games[0], set(), skill="for one thing"))
    logprobs = model(torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)  # (L - 1, V)
    told = logprobs.gather(1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]  # (L - 1,)
    for others in (0.0, 0.25):
        weights = torch.tensor(token_weights(sequence, 0.25))
        if not others:
            weights[weights == 0.25] = 0
        expected = -(told * weights).sum() / weights.sum()
        assert demonstration_loss(model, [sequence], others, autocast=False).item() == pytest.approx(
            expected.item(), abs=1e-5
        )


def test_the_curriculum_begins_with_judgements_and_loses_nothing(demonstrator, games):
    judged = [s for game in games for s in demonstrator.judging(demonstrator.play(game, set()))] * 20
    played = [s for game in games for s in demonstrator.sequences(game)]
    batches = curriculum(judged, played, 3, 1, 0)
    kinds = ["j" if all(s in judged for s in batch) else "p" for batch in batches]
    assert kinds[:3] == ["j"] * 3
    assert sorted(s.ids for batch in batches for s in batch) == sorted(s.ids for s in [*judged, *played])
    rest = kinds[3:]
    assert abs(rest[: len(rest) // 2].count("j") - rest.count("j") / 2) <= 1 + rest.count("j") / len(rest)
    assert len(batches) == sum(len(shuffled_batches(s, BATCH_TOKENS, 1, 0)) for s in (judged, played))


# ---- the weights that come with the code -----------------------------------------------------------------------------


@pytest.mark.parametrize("env, layers", SHIPPED)
def test_the_weights_are_those_that_the_code_would_make(env, layers):
    """Making them takes minutes; that they depend on nothing else is what test_coldstart.py shows of the key."""
    key = key_of(env, tiny_tokenizer(env), layers=layers)
    assert made_of(weights_of(env, layers))["key"] == key, f"python -m tiny.warmstart {env} makes them anew"


def test_every_file_of_weights_is_somebodys():
    assert {weights_of(env, layers) for env, layers in SHIPPED} == set(WEIGHTS.iterdir())


@pytest.mark.parametrize("env, layers", SHIPPED)
def test_the_weights_have_learnt_their_demonstrations(env, layers):
    """The loss on the first games is that of the end of training, or one that learning by heart explains."""
    model, tokenizer = warm_started(env, layers=layers)
    assert model.config.num_hidden_layers == layers
    demonstrator = TinyDemonstrator(tokenizer, 0, env)
    sequences = demonstrations(demonstrator, games=8, plays=1)
    with torch.no_grad():
        loss = demonstration_loss(model, sequences, OTHER_TOKENS).item()
    assert loss == pytest.approx(float(made_of(weights_of(env, layers))["loss"]), rel=0.4)


@pytest.mark.parametrize("env, layers", SHIPPED)
def test_the_model_tells_skills_of_its_task_from_others(env, layers):
    model, tokenizer = warm_started(env, layers=layers)
    demonstrator = TinyDemonstrator(tokenizer, 7, env)  # other novices, other words
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    right = []
    for game in demonstrator.script.games(40):
        for sequence in demonstrator.judging(demonstrator.play(game, set())):
            with torch.no_grad():
                logits = model(torch.tensor([sequence.ids[:-2]])).logits[0, -1]  # (V,)
            right.append((logits[yes] > logits[no]).item() == (sequence.ids[-2] == yes))
    assert sum(right) / len(right) > 0.9


def test_only_comments_and_empty_lines_are_left_out_of_the_key():
    source = 'def f(x):  # why\n    # because\n\n    """Doc # no comment."""\n    return "#", x  # so\n'
    assert without_comments(source) == 'def f(x):\n    """Doc # no comment."""\n    return "#", x'


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, int]]:
    """The file and the seed of each training, in whose place the shipped weights are copied."""
    made = []

    def make(env, file, tokenizer, key, seed, layers):
        made.append((file.name, seed))
        file.write_bytes(weights_of(env, layers).read_bytes())

    monkeypatch.setattr(tiny.warmstart, "make", make)
    return made


def test_three_layers_go_on_with_fresh_games(tmp_path, monkeypatch):
    learnt, games = [], script("alfworld").games
    keep = lambda model, played, seed, **k: learnt.append((played, seed)) or 0
    monkeypatch.setattr(tiny.warmstart, "warm_start", keep)
    monkeypatch.setattr("tiny.alfworld.GAMES", 2)
    monkeypatch.setattr("tiny.alfworld.FRESH", 3)
    monkeypatch.setattr(TinyDemonstrator, "sequences", lambda self, game: [game])
    for layers in (3, 2):
        tiny.warmstart.make("alfworld", tmp_path / "weights", tiny_tokenizer(), "key", 0, layers)
    assert learnt == [(games(2) * 3, 0), (games(5)[2:], 1), (games(2) * 3, 0)]


def test_after_a_change_the_weights_are_made_anew_once(tmp_path, monkeypatch, made):
    shipped, _ = warm_started("alfworld", tmp_path)
    assert not made
    monkeypatch.setattr(tiny.warmstart, "LEARNING_RATE", 1e-3)
    for _ in range(2):
        model, _ = warm_started("alfworld", tmp_path)
    assert len(made) == 1 and made[0][0].startswith("tiny-alfworld-") and made[0][1] == 0
    assert all(torch.equal(a, b) for a, b in zip(shipped.parameters(), model.parameters(), strict=True))


def test_a_model_is_as_deep_as_its_name_says():
    for name, layers in (("tiny", 3), ("tiny-2", 2)):
        assert load_model(name)[0].config.num_hidden_layers == load_config(name).num_hidden_layers == layers
    assert load_config("tiny", "search").num_hidden_layers == 2  # as the script says


def test_each_seed_has_weights_of_its_own(tmp_path, made):
    for seed in (2, 1, 2):
        warm_started("search", tmp_path, seed)
    assert [seed for _, seed in made] == [2, 1] and made[0][0] != made[1][0]
