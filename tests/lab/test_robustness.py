"""Changed observations by hand and in real games, and the robustness table of policies made by hand."""

import json
from random import Random

import pytest

from config import Config
from envs.alfworld import AlfworldEnv, words
from lab.experiments import robustness
from lab.experiments.perturb import OTHER_WORDS, Perturbed, reworded, shuffled
from lab.experiments.runs import arm_of
from lm.loading import save_policy
from tiny.alfworld import vocabulary
from tiny.warmstart import tiny_model


class Reversing(Random):
    def sample(self, items, count):
        return items[::-1]

    def random(self):
        return 0.0  # every wording is replaced


@pytest.mark.parametrize(
    "observation, changed",
    [
        ("On the desk 1, you see a pen 2, and a cd 1.", "On the desk 1, you see a cd 1, and a pen 2."),
        (
            "You open the safe 1. The safe 1 is open. In it, you see a cd 1, a pen 2, and a pen 1.",
            "You open the safe 1. The safe 1 is open. In it, you see a pen 1, a pen 2, and a cd 1.",
        ),
        (
            "Looking quickly around you, you see a bed 1, and a desk 2.\n\nYour task is to: put a pen in bed.",
            "Looking quickly around you, you see a desk 2, and a bed 1.\n\nYour task is to: put a pen in bed.",
        ),
        ("on desk 2 see pen 2 cd mug 3", "on desk 2 see mug 3 cd pen 2"),
        ("see bed desk 2", "see desk 2 bed"),
        ("on desk see nothing", "on desk see nothing"),
        ("On the desk 1, you see a pen 2.", "On the desk 1, you see a pen 2."),
        ("You are facing the desk 1, and bed 1.", "You are facing the desk 1, and bed 1."),
    ],
)
def test_lists_in_another_order_by_hand(observation, changed):
    assert shuffled(observation, Reversing()) == changed


@pytest.mark.parametrize(
    "observation, changed",
    [
        ("pick up pen 2 from desk", "take pen 2 from desk"),
        ("You pick up the pen 2 from the desk 1.", "You take the pen 2 from the desk 1."),
        ("drawer 2 is closed", "drawer 2 is not open"),
        ("open drawer 2 see pen", "open drawer 2 find pen"),
        ("Nothing happens.", "Nothing is done."),
        ("move apple to fridge", "put apple to fridge"),
        ("clean apple using sinkbasin", "clean apple with sinkbasin"),
        ("turn on desklamp", "use desklamp"),
    ],
)
def test_other_words_by_hand(observation, changed):
    assert reworded(observation, Reversing()) == changed


def test_other_words_are_known_to_the_tiny_model():
    assert {word for wording in OTHER_WORDS.values() for word in wording.split()} <= vocabulary()


def walk(env, game, seed):
    """Everything that a random player is told, and what it could do."""
    observation, info = env.reset(options={"game": game})
    rng, told = Random(seed), [(observation, info["admissible_actions"])]
    for _ in range(30):
        observation, _, terminated, truncated, info = env.step(rng.choice(info["admissible_actions"]))
        told.append((observation, info["admissible_actions"]))
        if terminated or truncated:
            break
    return told


@pytest.mark.parametrize("prompt", ["compact", "official"])
@pytest.mark.parametrize("change", [shuffled, reworded])
def test_a_perturbed_game_is_the_same_game(games, prompt, change):
    plain, changed = ([] for _ in range(2))
    for game in games:
        make = lambda: AlfworldEnv(prompt=prompt, max_steps=30)
        plain += walk(make(), game, 1)
        changed += walk(Perturbed(make(), change, 0), game, 1)
        assert walk(Perturbed(make(), change, 0), game, 1) == walk(Perturbed(make(), change, 0), game, 1)
    assert [told[1] for told in plain] == [told[1] for told in changed]
    differ = [(a, b) for (a, _), (b, _) in zip(plain, changed, strict=True) if a != b]
    assert len(differ) > len(plain) / 10
    for a, b in differ:
        assert (sorted(words(a).split()) == sorted(words(b).split())) == (change is shuffled)


def test_only_alfworld_can_be_perturbed():
    with pytest.raises(ValueError, match="not those of --env search"):
        robustness.conditions(Config(env="search"), [0.0])


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with the policy of an untrained model."""
    folder = tmp_path / "runs" / "opid-k0-seed3"
    save_policy(tiny_model(len(tokenizer), seed=0, width=48), tokenizer, folder / "policy")
    config = Config(prompt="compact", eval_games=2, max_steps=3, max_new_tokens=4)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def test_robustness_from_end_to_end(run, tokenizer, tmp_path):
    argv = ["--runs", str(run), "--results", str(tmp_path / "out.jsonl"), "--temperatures", "0", "0.7"]
    text = robustness.main(argv)
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert (result["name"], result["config"]["eval_games"]) == ("opid-k0-seed3", 2)
    assert list(result["success"]) == ["temperature 0", "temperature 0.7", "order of objects", "wording"]
    assert set(result["success"]["wording"]) == {"valid_seen", "valid_unseen"}
    assert text == (tmp_path / "out.md").read_text().strip()
    assert robustness.main(argv) == text  # read, not made again
    for more, what in ((["--eval-games", "3"], "eval_games"), (["--eval-temperature", "1"], "eval_temperature")):
        with pytest.raises(ValueError, match=f"other settings of {what}:"):
            robustness.main([*argv, *more])
    save_policy(tiny_model(len(tokenizer), seed=1, width=48), tokenizer, run / "policy")  # another run of that name
    with pytest.raises(ValueError, match="of other weights:"):
        robustness.main(argv)


def test_robustness_table_by_hand():
    success = [{"wording": {"valid_seen": a, "valid_unseen": b}} for a, b in ((0.2, 0.5), (0.4, 0.5))]
    results = [{"name": f"opid-seed{seed}", "success": s} for seed, s in enumerate(success)]
    rows = robustness.table(results).splitlines()
    assert rows[2:] == ["| opid | wording | 2 | 30.0 [-] | 50.0 [-] |"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no run folder"):
        robustness.main(["--runs", str(tmp_path / "nowhere"), "--results", str(tmp_path / "out.jsonl")])


def test_arms_from_folder_names():
    assert arm_of("opid-k0-seed12") == "opid-k0"
    assert arm_of("laptop") == "laptop"
