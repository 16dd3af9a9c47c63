"""Which skill each game is played under, and what is said about the outcomes, by hand."""

import json

import pytest

from config import parse_args
from evaluate import eval_splits, games_of
from lab.experiments import skill_effect
from lab.experiments.runs import on_the_laptop
from lab.experiments.skill_effect import kinds_of, table, told_by
from lm.loading import save_policy
from tiny.plays import Play
from tiny.warmstart import tiny_model


class Told:
    def __init__(self):
        self.FLAWS = {"hasty": 0.5}

    def workflow(self, play):
        return f"do {play.task}"

    def avoidance(self, play, flaw):
        return "look first" if flaw == "hasty" else ""


def test_right_skills_are_a_games_own_and_wrong_ones_another_types():
    types = {"a": "clean", "b": "clean", "c": "heat", "d": "clean"}
    plays = {"a": Play("pan"), "b": Play("cup"), "c": Play("egg"), "d": Play("pan")}
    kinds = kinds_of(list(types), types, plays, Told())
    assert kinds["none"] == {}
    assert kinds["workflow"] == {"a": "do pan", "b": "do cup", "c": "do egg", "d": "do pan"}
    assert kinds["avoid: hasty"] == dict.fromkeys(types, "look first")
    assert set(kinds["says nothing"].values()) == {"first one and then one"}
    other = kinds["other type: workflow"]
    assert (other["a"], other["b"], other["d"]) == ("do egg",) * 3 and other["c"] in ("do pan", "do cup")
    # of its own type, but not the same words; c is alone of its type
    assert kinds["other thing: workflow"] == {"a": "do cup", "b": "do pan", "d": "do cup"}
    assert "other type: avoid: hasty" not in kinds  # it reads alike for every task


def test_the_table_compares_the_same_games():
    won = {
        "none": {"0.4": "0100"},
        "workflow": {"0.4": "1110"},
        "other": {"0.4": "-0--"},  # less than none by all of it, in the one game that it has
    }
    lines = table(won).splitlines()
    assert lines[2].startswith("| none | 4 | 25.0 | - | - |")
    assert lines[3].startswith("| workflow | 4 | 75.0 | +50.0 | [")
    assert lines[4] == "| other | 1 | 0.0 | -100.0 | [-100.0, -100.0] |"


@pytest.mark.parametrize("env", ["alfworld", "webshop", "search"])
def test_every_environment_has_right_and_wrong_skills(env):
    config = parse_args(["--env", env, "--eval-games", "12"])
    games = [game for split in eval_splits(config) for game in games_of(config, split)]
    kinds = told_by(config, games)
    for kind, texts in kinds.items():
        assert kind == "none" or (len(texts) > len(games) / 2 and all(text.strip() for text in texts.values()))
    assert all(kinds["other type: workflow"][game] != kinds["workflow"][game] for game in games)
    assert len({*kinds["workflow"].values()}) > 2


def test_results_are_named_by_their_run():
    named = {
        "tiny": "tiny",
        "cold:smollm2": "cold-smollm2",
        "runs/opid-seed0/policy": "opid-seed0",
        "runs/cold": "cold",
    }
    assert {model: skill_effect.name_of(model) for model in named} == named


def test_the_command_plays_each_game_under_its_skill(tmp_path, monkeypatch, tokenizer, capsys):
    """A random model solves nothing; what counts is what it is shown."""
    save_policy(tiny_model(len(tokenizer), seed=0, width=48), tokenizer, tmp_path / "model")
    shown, play = [], skill_effect.play

    def watched(*args, **options):
        played = play(*args, **options)
        shown.append([tokenizer.decode(t.steps[0].context) for t in played])
        return played

    monkeypatch.setattr(skill_effect, "play", watched)
    flags = ["--model", str(tmp_path / "model"), "--prompt", "compact", "--eval-games", "2", "--max-steps", "2"]
    file = tmp_path / "effects.jsonl"
    skill_effect.main([*flags, "--results", str(file), "--name", "x", "--temperatures", "1"])
    result = json.loads(file.read_text())
    assert result["name"] == "x" and set("".join(won["1"] for won in result["won"].values())) <= {"0", "-"}
    assert "## x\n\n| episode skill shown |" in (tmp_path / "effects.md").read_text()
    assert len(shown) == len(result["won"]) >= 7
    config = parse_args(on_the_laptop(flags))
    games = [game for split in eval_splits(config) for game in games_of(config, split)]
    assert result["games"] == [str(game) for game in games]
    kinds = told_by(config, games)
    for contexts, (kind, texts) in zip(shown, kinds.items(), strict=True):
        for context, game in zip(contexts, texts or games, strict=True):
            assert ("skill" in context.split()) == (kind != "none")
            assert texts.get(game, "") in context
    assert "| says nothing | 4 |" in capsys.readouterr().out
