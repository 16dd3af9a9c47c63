"""Demonstrations of the other environments: closed vocabulary, general skills, slips left out, recovery from them."""

import random

import pytest

from config import Config
from envs.search import SearchEnv
from envs.search.questions import GENERATE, load_questions
from envs.search.text import words
from envs.webshop import WebshopEnv
from envs.webshop.expert import read_goal
from lm.answers import parse_skills
from tests.settings import laptop
from tiny import search, webshop
from tiny.plays import Play, script
from tiny.warmstart import TinyDemonstrator, skills_json, tiny_tokenizer

SCRIPTS = {"search": search, "webshop": webshop}
REAL = {"search": search.played, "webshop": webshop.play}  # with the names of the corpus
N = 60


@pytest.fixture(scope="module", params=SCRIPTS)
def env(request):
    return request.param


@pytest.fixture(scope="module")
def words_of(env):
    return tiny_tokenizer(env)


def plays_of(env: str, flaws: set[str], **habits) -> list[Play]:
    rng = random.Random(0)
    return [REAL[env](game, rng, flaws, **habits) for game in script(env).games(N)]


def test_flawless_play_wins_and_every_flaw_costs(env):
    assert all(play.success for play in plays_of(env, set(), slip=0))
    flawless = sum(play.success for play in plays_of(env, set()))
    assert flawless >= 0.85 * N  # slips are recovered from
    for flaw in script(env).FLAWS:
        assert sum(play.success for play in plays_of(env, {flaw})) < flawless, flaw
        failed = [play for play in plays_of(env, {flaw}, slip=0) if not play.success]
        assert {script(env).flaw_of(play) for play in failed} == {flaw}, flaw


def test_plays_are_of_the_train_split_and_real(env):
    made = {"search": SearchEnv, "webshop": WebshopEnv}[env](prompt="compact", max_steps=script(env).MAX_STEPS)
    for game, play in zip(script(env).games(5), plays_of(env, set(script(env).FLAWS)), strict=False):
        assert game.startswith(f"{env}/train/")
        observation, info = made.reset(options={"game": game})
        assert play.task == info["task"]
        for seen, command, _ in play.turns:
            assert seen == observation
            observation, *_, info = made.step(command)
        assert info["won"] == play.success


def test_search_names_are_exchanged_for_others_and_nothing_else_is():
    names, used = set(search.name_words()), set()
    assert names.isdisjoint(words("What is the capital of the country where it lies near the postal state").split())
    for number, game in enumerate(search.games(N)):
        real, other = (f(game, random.Random(number), {"first doc"}) for f in (search.played, search.play))
        pairs = [(real.task, other.task), *zip(sum(real.turns, ()), sum(other.turns, ()), strict=True)]
        replaced = {pair for a, b in pairs for pair in zip(a.split(), b.split(), strict=True)}
        assert len(dict(replaced)) == len(replaced) == len({b for _, b in replaced})  # one to one in the whole play
        assert all(a == b or {a, b} <= names for a, b in replaced)
        assert search.hindsight(real) == search.hindsight(other)
        used |= {b for a, b in replaced if a != b}
    asked = {word for q in load_questions(GENERATE, "train") for word in words(q.question).split()}
    assert used - asked  # names that no training question holds


def test_vocabulary_is_closed_and_only_commands_that_were_meant_are_learnt(env, words_of):
    demonstrator = TinyDemonstrator(words_of, 0, env)
    slips = 0
    for game in demonstrator.script.games(N):
        for sequence in demonstrator.sequences(game):
            assert words_of.unk_token_id not in sequence.ids, words_of.decode(sequence.ids)
        play = demonstrator.play(game, set())
        [sequence] = demonstrator.acting(play)
        meant = [command for t, (_, command, _) in enumerate(play.turns) if t not in play.slips]
        learnt = [sequence.ids[start : start + size] for _, start, size in sequence.responses]
        assert [words_of.decode(ids) for ids in learnt] == [f"{command} <end>" for command in meant]
        slips += len(play.slips)
    assert slips > 5


def test_skills_parse_and_round_trip(env, words_of):
    for play in plays_of(env, set(script(env).FLAWS)) + plays_of(env, set()):
        skills = script(env).hindsight(play)
        ids = words_of(skills_json(skills))["input_ids"]
        assert words_of.unk_token_id not in ids
        assert parse_skills(words_of.decode(ids), len(play.turns), 5) == skills


def told(env: str) -> list[tuple[Play, set[str]]]:
    """Plays with all that is said to the player: the episode skill, the step skills."""
    plays = [p for flaw in script(env).FLAWS for p in plays_of(env, {flaw})] + plays_of(env, set(), hinted=0.5)
    return [(p, {script(env).hindsight(p).episode, *p.advice_in_words, *p.hints.values()}) for p in plays]


def test_skills_name_nothing_that_only_hindsight_knows():
    golden = {words(q.question): q.golden_answers for q in load_questions(GENERATE, "train")}
    for play, texts in told("search"):
        for text in texts:
            assert not any(f" {words(answer)} " in f" {text} " for answer in golden[play.task]), text
    for play, texts in told("webshop"):
        goal = read_goal(play.task)
        named = {*goal.attributes, *goal.options.values()}
        for text in texts:
            assert named.isdisjoint(text.split()), text
            assert text.startswith(f"for {goal.kind} ")
            assert not any(word.isdigit() for word in text.split()), text


def test_a_hint_is_what_the_adviser_would_do(env):
    for play in plays_of(env, set(script(env).FLAWS), hinted=0.5):
        for t, text in play.hints.items():
            assert play.turns[t][1] == play.turns[t][2]
            assert play.advice_in_words[t] == text


def test_search_hint_words():
    adviser = search.Adviser(random.Random(0))
    adviser.reset("which currency is used in country where sikasso lies")
    assert adviser.advise(adviser.question) == "search country where sikasso lies"
    assert adviser.hint() == "search country where it lies"
    assert adviser.advise("doc 1 sikasso lies near koutiala in country mali") == "search currency of mali"
    assert adviser.careless({"first doc"}) == "answer mali"
    assert adviser.advise("no results") == "search currency of mali"
    assert adviser.advise("doc 1 currency of chad is naira") == "search currency of mali"
    assert adviser.careless({"first doc"}) == "answer naira"  # another name's
    assert adviser.advise("doc 1 currency of mali is franc") == "answer franc"
    assert adviser.careless({"first doc"}) == "answer franc"
    assert adviser.hint() == "for currency of it answer from doc with same name"


def test_the_tiny_model_refuses_words_that_it_does_not_know(env):
    assert laptop(env=env, model="tiny").prompt == "compact"
    with pytest.raises(ValueError, match="knows only the words of generated"):
        laptop(env=env, model="tiny", env_options={{"search": "questions", "webshop": "data"}[env]: "somewhere"})


@pytest.mark.parametrize("name", ["laptop-search", "laptop-webshop"])
def test_recipes_hold_the_longest_response_and_prompt(name):
    config = Config.from_recipe(name)
    told = script(config.env)
    assert config.max_steps == told.MAX_STEPS
    demonstrator = TinyDemonstrator(tiny_tokenizer(config.env), 0, config.env)
    for game in told.games(N):
        *acting, writing = demonstrator.sequences(game)
        sizes = [size for sequence in acting for _, _, size in sequence.responses]
        assert max(sizes) <= config.max_new_tokens
        assert max(len(sequence.ids) for sequence in acting) <= config.context_limit - config.max_new_tokens
        assert writing.responses[0][2] <= config.skill_tokens
        assert len(writing.ids) <= config.context_limit


def test_unknown_environment():
    with pytest.raises(ValueError, match="no demonstrations of chess"):
        script("chess")


def test_shopper_recovers_from_a_wrong_choice_and_price():
    adviser = webshop.Adviser()
    adviser.reset("desk lamp portable shockproof color black under 50")
    assert adviser.advise("search page") == "search portable shockproof desk lamp black"
    adviser.command = "search portable shockproof desk lamp black"
    page = "results page 1 1 pebble shockproof desk lamp price 90 2 delta shockproof desk lamp price 35"
    assert adviser.advise(page) == "open 2"
    assert adviser.careless({"first hit"}) == "open 1"
    adviser.command = "open 1"
    features = "features shockproof dimmable portable"
    assert adviser.advise(f"pebble shockproof desk lamp price 90 color pink black pack double {features}") == "back"
    assert adviser.careless({"first hit"}) == "choose black"
    assert adviser.careless({"first hit", "forgets option"}) == "buy"
    adviser.command = "back"
    assert adviser.advise(page) == "open 2"
    adviser.command = "open 2"
    assert (
        adviser.advise(f"delta shockproof desk lamp price 35 color pink black pack double {features}") == "choose black"
    )
    adviser.command = "choose pink"
    assert adviser.advise("chosen color pink") == "choose black"
    assert adviser.hint() == "for desk lamp choose color"
    adviser.command = "choose black"
    assert adviser.advise("chosen color black") == "buy"
