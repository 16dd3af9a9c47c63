"""What every environment promises, and the worked example of docs/environments.md."""

import importlib.util
import re
from pathlib import Path

import pytest

import envs
from data import Guidance, Slot
from envs import ENVIRONMENTS, make_env
from lm.encoder import Encoder
from router import fill
from tests.playing import play

DOCS = Path(__file__).parent.parent / "docs" / "environments.md"


@pytest.fixture
def guess(tmp_path, monkeypatch):
    """The class that the documentation shows."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    path = tmp_path / "guess.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("guess", path)
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_example_is_played(style, guess, llama, tokenizer):
    played, metrics = play(llama, Encoder(tokenizer, style), guess, [3, 5], 2, max_new_tokens=4, context_limit=512)
    assert [t.task for t in played] == ["find my number from 1 to 32"] * 4
    assert metrics["episodes"] == 4
    assert all(1 <= len(t.steps) <= 6 for t in played)


def test_make_env_knows_its_environments():
    with pytest.raises(ValueError, match="unknown environment 'chess'; known: alfworld, search, webshop"):
        make_env("chess")
    assert set(ENVIRONMENTS) == set(envs._REGISTRY)


@pytest.mark.parametrize("prompt", ["official", "compact"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_prompt_has_its_slots(name, prompt, games):
    """Both levels in an opening message, the step level in any; a skill that is not there changes nothing."""
    env = make_env(name, prompt=prompt, **({"games": games} if name == "alfworld" else {}))
    observation, info = env.reset(options={"game": env.tasks("train")[0]})
    for style, history in (("chat", []), ("chat", [("seen", "done")]), ("window", []), ("window", [("seen", "done")])):
        pieces = env.build_prompt(style, info["task"], history, observation, info["admissible_actions"])
        levels = [piece.level for piece in pieces if isinstance(piece, Slot)]
        assert levels == (["step"] if style == "chat" and history else ["episode", "step"]), (style, history)
        plain, guided = fill(pieces), fill(pieces, Guidance("step", "look twice"))
        assert "look twice" in guided and "look twice" not in plain
        shown = next(p for p in pieces if isinstance(p, Slot) and p.level == "step").template.format(text="look twice")
        assert guided.replace(shown, "", 1) == plain
