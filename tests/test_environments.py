"""What every environment promises, and the worked example of docs/forking.md."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import envs
from data import Guidance, Slot
from envs import ENVIRONMENTS, make_env, read_options
from evaluate import HELD_OUT
from lm.encoder import Encoder
from router import fill
from tests.playing import play

DOCS = Path(__file__).parent.parent / "docs" / "forking.md"


@pytest.fixture
def guess(tmp_path, monkeypatch):
    """The class that the documentation shows."""
    added = re.search(r"\+\+\+ b/envs/guess.py\n@@.*@@\n((?:\+.*\n)*)", DOCS.read_text())[1]
    path = tmp_path / "guess.py"
    path.write_text("".join(line[1:] for line in added.splitlines(keepends=True)))
    spec = importlib.util.spec_from_file_location("guess", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "guess", module)
    spec.loader.exec_module(module)
    return module.GuessEnv


def test_the_example_can_be_won_and_lost(guess):
    env = guess()
    for game in env.tasks("train"):
        low, high, observation = 1, 32, env.reset(options={"game": game})[0]
        for _ in range(6):
            middle = (low + high) // 2
            observation, reward, terminated, truncated, info = env.step(str(middle))
            low, high = (middle + 1, high) if "higher" in observation else (low, middle - 1)
            if terminated or truncated:
                break
        assert info["won"] and reward == 1 and terminated and not truncated, game
    env.reset(options={"game": 32})
    assert [env.step("1")[2:4] for _ in range(6)] == [(False, False)] * 5 + [(False, True)]
    assert not set(env.tasks("train")) & set(env.tasks("valid_seen"))
    envs.check_env(guess())


@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_example_is_played(style, guess, llama, tokenizer):
    played, metrics = play(llama, Encoder(tokenizer, style), guess, [3, 5], 2, max_new_tokens=4, context_limit=512)
    assert [t.task for t in played] == ["find my number from 1 to 32"] * 4
    assert metrics["episodes"] == 4
    assert all(1 <= len(t.steps) <= 6 for t in played)


def test_make_env_knows_its_environments():
    with pytest.raises(ValueError, match=f"unknown environment 'chess'; known: {', '.join(sorted(ENVIRONMENTS))}"):
        make_env("chess")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_has_tasks_for_training_and_for_evaluation(name):
    env = make_env(name, max_steps=3)
    held_out = getattr(env, "held_out", HELD_OUT)
    assert len(env.tasks("train", 3)) == 3
    for split in held_out:
        assert not set(env.tasks(split, 20)) & set(env.tasks("train", 20))


def test_options_are_read_by_the_constructors_annotations():
    assert read_options("alfworld", {"engine": "textworld", "size": "full"}) == {"engine": "textworld", "size": "full"}
    assert read_options("webshop", {"page_size": "3", "data": "my folder"}) == {"page_size": 3, "data": "my folder"}
    assert read_options("search", {"retriever": "http://a:1"}) == {"retriever": "http://a:1"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alfworld", {"engin": "fast"}, "no option 'engin'; --env-options knows: engine, data, size"),
        ("alfworld", {"engine": "slow"}, r"engine must be \('fast', 'textworld'\), not 'slow'"),
        ("alfworld", {"max_steps": "3"}, "no option 'max_steps'"),  # it has a flag of its own
        ("alfworld", {"games": "a"}, "no option 'games'"),  # no text can say a list
        ("webshop", {"page_size": "few"}, "page_size must be int, not 'few'"),
    ],
)
def test_options_that_cannot_be_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        read_options(name, options)


def test_an_example_with_fewer_keywords_is_made_and_has_its_own_option(guess, monkeypatch):
    monkeypatch.setitem(sys.modules, "envs.guess", sys.modules[guess.__module__])
    monkeypatch.setitem(envs._REGISTRY, "guess", ("envs.guess", "GuessEnv"))
    env = make_env("guess", max_steps=4, prompt="official", history=2, **read_options("guess", {"highest": "8"}))
    assert (env.max_steps, env.tasks("train")) == (4, [1, 3, 5, 7])
    with pytest.raises(ValueError, match="no option 'lowest'; --env-options knows: highest"):
        read_options("guess", {"lowest": "1"})


@pytest.mark.parametrize("prompt", ["official", "compact"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_prompt_has_its_slots(name, prompt):
    """Both levels in an opening message, the step level in any; a skill that is not there changes nothing."""
    env = make_env(name, prompt=prompt)
    observation, info = env.reset(options={"game": env.tasks("train", 1)[0]})
    for style, history in (("chat", []), ("chat", [("seen", "done")]), ("window", []), ("window", [("seen", "done")])):
        pieces = env.build_prompt(style, info["task"], history, observation, info.get("admissible_actions", []))
        levels = [piece.level for piece in pieces if isinstance(piece, Slot)]
        assert levels == (["step"] if style == "chat" and history else ["episode", "step"]), (style, history)
        plain, guided = fill(pieces), fill(pieces, Guidance("step", "look twice"))
        assert "look twice" in guided and "look twice" not in plain
        shown = next(p for p in pieces if isinstance(p, Slot) and p.level == "step").template.replace(
            "{text}", "look twice"
        )
        assert guided.replace(shown, "", 1) == plain
