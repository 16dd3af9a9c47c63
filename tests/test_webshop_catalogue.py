"""The generated catalogue, and the shopper that can buy all that is asked for in it."""

import json
import statistics
from itertools import combinations

import pytest
from rapidfuzz import fuzz

from envs.webshop import VOCABULARY, WebshopEnv
from envs.webshop.catalogue import DEPARTMENTS, KINDS, generate_catalogue, held_out
from envs.webshop.compact import words
from envs.webshop.data import load_shop
from envs.webshop.expert import FLAWS, Goal, Shopper, read_goal
from envs.webshop.rewards import alike, plain_color


@pytest.fixture(scope="module")
def env():
    return WebshopEnv(prompt="compact")


def play(env, game, flaws=(), seen=None):
    """-> (score, steps, words of the episode)."""
    observation, info = env.reset(options={"game": game})
    shopper, steps, texts = Shopper(flaws), 0, [info["task"]]
    shopper.reset(info["task"])
    while True:
        command = shopper.act(observation)
        texts += [observation, command, *info["admissible_actions"]]
        observation, _, terminated, truncated, info = env.step(command)
        steps += 1
        if terminated or truncated:
            if seen is not None:
                seen.update(word for text in (*texts, observation) for word in text.split())
            length = sum(len(text.split()) for text in texts if text not in info["admissible_actions"])
            return info["score"], steps, length


def test_the_shopper_fulfils_every_goal_and_all_words_are_known(env):
    games = [game for split in env.shop.goals for game in env.tasks(split)]
    assert len(games) > 1200
    seen = set()
    played = [play(env, game, seen=seen) for game in games]
    assert {score for score, _, _ in played} == {1.0}
    assert 5.5 < statistics.mean(steps for _, steps, _ in played) < 8
    assert max(steps for _, steps, _ in played) > 10  # some goals take comparing
    assert seen - {"<words>"} <= set(VOCABULARY)


@pytest.mark.parametrize(
    ("flaws", "most"),
    [
        ({"first hit", "no compare", "no options"}, 0.0),
        ({"forgets option"}, 0.0),
        ({"no options"}, 0.0),
        ({"first hit", "no compare"}, 0.5),
        ({"first hit"}, 0.5),
        ({"no compare"}, 0.6),
        ({"ignores price"}, 0.95),
    ],
)
def test_novices_fail(env, flaws, most):
    scores = [play(env, game, flaws)[0] for game in env.tasks("valid_seen")]
    assert sum(score == 1.0 for score in scores) / len(scores) <= most
    assert sum(scores) / len(scores) < 0.995


def test_episodes_are_short_enough_for_a_small_model(env):
    lengths = []
    for game in env.tasks("valid_unseen"):
        observation, info = env.reset(options={"game": game})
        shopper = Shopper()
        shopper.reset(info["task"])
        length, ended = len(info["task"].split()) + 1, False
        while not ended:
            command = shopper.act(observation)
            length += len(observation.split()) + len(command.split()) + 3  # three for the marks around turns
            observation, _, terminated, truncated, _ = env.step(command)
            ended = terminated or truncated
        lengths.append(length)
    assert max(lengths) <= 400
    assert statistics.mean(lengths) < 160


def test_splits_share_no_wish_and_unseen_has_pairs_of_its_own(env):
    def asked(goal):
        return goal["query"], frozenset(goal["attributes"]), tuple(goal["goal_options"])

    parts = {split: [asked(goal) for goal in goals] for split, goals in env.shop.goals.items()}
    assert {split: len(set(part)) for split, part in parts.items()} == {s: len(part) for s, part in parts.items()}
    for first, second in combinations(parts.values(), 2):
        assert not set(first) & set(second)
    pairs = {split: {wish[:2] for wish in part} for split, part in parts.items()}
    assert not pairs["valid_unseen"] & (pairs["train"] | pairs["valid_seen"])
    assert {kind for kind, _ in pairs["valid_unseen"]} == {kind for kind, _ in pairs["train"]}


def test_three_of_fifteen_pairs_are_held_out():
    for category, kind in KINDS:
        attributes = DEPARTMENTS[category].attributes
        assert sum(held_out(kind, frozenset(pair), attributes) for pair in combinations(attributes, 2)) == 3


def test_no_attribute_or_option_passes_for_another():
    attributes = {attribute for department in DEPARTMENTS.values() for attribute in department.attributes}
    for first, second in combinations(sorted(attributes), 2):
        assert not alike(first, second)
        assert first not in second
        assert second not in first
    for department in DEPARTMENTS.values():
        for first, second in combinations([v for values in department.options.values() for v in values], 2):
            assert fuzz.token_set_ratio(plain_color(first), plain_color(second)) <= 85


def test_files_are_in_the_official_format_and_the_same_for_a_seed(tmp_path):
    first, second = (generate_catalogue(tmp_path / name, 80, 1) for name in "ab")
    names = ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json")
    assert [(first / n).read_bytes() for n in names] == [(second / n).read_bytes() for n in names]
    products = json.loads((first / names[0]).read_text())
    other = json.loads((generate_catalogue(tmp_path / "c", 80, 2) / names[0]).read_text())
    assert other != products
    assert json.loads((generate_catalogue(tmp_path / "d", 40, 1) / names[0]).read_text()) == products[:40]
    assert not load_shop(first).skipped
    for product in products:
        assert 4 <= len(product["name"].split()) <= 7
        assert len(product["asin"]) == 10


def test_a_file_that_is_there_is_left_alone(tmp_path):
    path = generate_catalogue(tmp_path, 40) / "items_shuffle.json"
    written = path.stat().st_mtime_ns
    generate_catalogue(tmp_path, 40)
    assert path.stat().st_mtime_ns == written
    path.write_text("[]")
    generate_catalogue(tmp_path, 40)
    assert len(json.loads(path.read_text())) == 40


def test_goals_are_read_from_the_task_alone(env):
    goal = read_goal("spicy black tea smoked flavor honey pack single under 50")
    assert goal == Goal("black tea", ["spicy", "smoked"], {"flavor": "honey", "pack": "single"}, 50.0)
    assert read_goal("padded sun hat striped color red").limit == float("inf")
    for goal in env.shop.goals["train"][:200]:
        env.reset(options={"game": "webshop/train/0"})
        read = read_goal(words(goal["instruction_text"].partition(", and price")[0]))
        assert (read.kind, set(read.attributes)) == (goal["query"], set(goal["attributes"]))
        assert list(read.options.values()) == goal["goal_options"]
    with pytest.raises(ValueError, match="no kind of product"):
        read_goal("a book")


def test_unknown_flaws_are_named():
    with pytest.raises(ValueError, match="first hit"):
        Shopper({"hurry"})
    assert len(FLAWS) == 5
