"""TextArena's games through their adapter."""

import json
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import train as train_module
from config import Config, variant_of
from data import Slot
from envs import check_env, make_env
from envs.textarena import GAMES, TextArenaEnv
from router import fill
from runlog.start import start

pytest.importorskip("textarena", reason="pip install textarena")

ROOT = Path(__file__).parent.parent
IDS = [f"{name}-v0" for name in GAMES]
MOVES = {
    **{"2048": ["[Up]", "[Left]", "[Down]", "[Right]"], "Bandit": ["[red]", "[blue]"]},
    **{"Blackjack": ["[Hit]", "[Stand]"], "FrozenLake": ["[right]", "[down]"], "LightsOut": ["[0 0]", "[3 4]"]},
    **{"GuessTheNumber": ["[3]", "[17]", "[9]"], "Mastermind": ["[1 2 3 4]", "[2 3 4 5]"], "Set": ["[1, 2, 3]"]},
    **{"Minesweeper": ["[0 0]", "[7 7]"], "Secretary": ["[continue]", "[accept]"]},
}


def solution(env: TextArenaEnv) -> list[str]:
    """The moves that solve a game of Crosswords or Sudoku, by its own secrets."""
    state, first = env.env.state.game_state, env.game.startswith("Sudoku")
    solved = env.env.full_grid if first else state["solution"]
    cells = [(row, column) for row, line in enumerate(solved) for column in range(len(line))]
    left = [(row, column) for row, column in cells if state["board"][row][column] in (0, "_")]
    return [f"[{row + first} {column + first} {solved[row][column]}]" for row, column in left]  # Sudoku counts from 1


def played(game: str, number: int, turns: int = 10) -> list:
    """What the player sees, turn by turn, of moves that the seed draws."""
    env, moves = TextArenaEnv(game=game), random.Random(number)
    observation, info = env.reset(options={"game": number})
    seen = [info, observation]
    for _ in range(turns):
        action, valid = env.parse_action(moves.choice(MOVES.get(game.partition("-v0")[0]) or solution(env)), [])
        observation, reward, terminated, truncated, told = env.step(action)
        seen.append((action, valid, observation, reward, terminated, told["won"]))
        if terminated or truncated:
            break
    return seen


@pytest.mark.parametrize("game", IDS)
def test_a_game_plays_is_its_seed_and_leaves_no_trace(game, capfd):
    random.seed(5)
    before = random.getstate()
    first = played(game, 3)
    assert random.getstate() == before
    random.seed(6)
    assert first == played(game, 3) and len(first) > 2
    others = [[*played(game, number)[1:]] for number in range(4, 10)]
    assert any(other != first[1:] for other in others)
    assert any(valid for _, valid, *_ in first[2:])
    assert all(isinstance(reward, float) for *_, reward, _, _ in first[2:])
    check_env(TextArenaEnv(game=game, max_steps=6))
    assert capfd.readouterr() == ("", "")


def test_games_are_the_same_in_another_process():
    """Whatever order its sets of words have."""
    call = "from tests.test_textarena import *; print(hash_of())"
    found = {
        subprocess.run(
            [sys.executable, "-c", call],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) > 2000


def hash_of() -> str:
    return json.dumps([played(game, 3) for game in IDS])


def test_two_games_at_once_do_not_disturb_each_other():
    """Blackjack draws its cards while it is played."""
    alone = played("Blackjack-v0", 1)
    env, other = TextArenaEnv(game="Blackjack-v0"), TextArenaEnv(game="Blackjack-v0")
    env.reset(options={"game": 1})
    other.reset(options={"game": 2})
    for action, _, observation, *_ in alone[2:]:
        other.step("[Stand]")
        env.parse_action("[Hit]", [])  # a move that is only asked about
        assert env.step(action)[0] == observation


def test_a_player_who_halves_wins_and_one_who_is_close_does_not():
    env = TextArenaEnv()
    _, info = env.reset(options={"game": 7})
    assert "number between 1 and 20" in info["task"] and info["game"] == "GuessTheNumber-v0 7"
    low, high, terminated = 1, 20, False
    while not terminated:
        guess = (low + high) // 2
        observation, reward, terminated, _, told = env.step(f"[{guess}]")
        low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
    assert (reward, told["won"]) == (1.0, True) and "Congratulations" in observation
    env.reset(options={"game": 7})
    near = [n for n in range(1, 21) if n != guess][:11]
    for number in near:  # all that it allows
        observation, reward, terminated, _, told = env.step(f"[{number}]")
    assert terminated and 0 < reward < 1 and told["won"] is False and "turn limit" in observation


@pytest.mark.parametrize("game", ["Crosswords-v0", "Sudoku-v0"])
def test_its_solution_is_a_success(game):
    env, terminated = TextArenaEnv(game=game), False
    env.reset(options={"game": 3})
    while not terminated:
        action, valid = env.parse_action(solution(env)[0], [])
        _, reward, terminated, truncated, told = env.step(action)
        assert valid and not truncated
    assert (reward, told["won"]) == (1.0, True)


def test_what_the_game_refuses_is_invalid_and_twice_is_the_end():
    env = TextArenaEnv()
    assert env.parse_action("[5]", []) == ("[5]", False)  # before a game
    env.reset(options={"game": 7})
    assert env.parse_action("not [3], rather [5]", []) == ("[5]", True)
    assert env.parse_action("seven", []) == ("seven", False)
    assert env.parse_action("[99]", []) == ("[99]", False)
    env.step("[5]")
    assert env.parse_action("[5]", []) == ("[5]", False)  # a guess again
    observation, _, terminated, *_ = env.step("[5]")
    assert "already guessed" in observation and not terminated
    observation, _, terminated, truncated, told = env.step("[99]")
    assert (terminated, truncated, told["won"]) == (True, False, False) and "outside the range" in observation


def test_a_game_ends_at_max_steps():
    env = TextArenaEnv(max_steps=2)
    env.reset(options={"game": 7})
    assert [env.step(guess)[2:4] for guess in ("[1]", "[2]")] == [(False, False), (False, True)]


def test_splits_are_disjoint_seeds_and_prompts_have_their_slots():
    env = make_env("textarena", history=1, prompt="compact", game="FrozenLake-v0-random")
    splits = [set(env.tasks(split, 50)) for split in ("train", "valid_seen", "valid_unseen")]
    assert [len(split) for split in splits] == [50] * 3 and len(set.union(*splits)) == 150
    history = [("a board", "[left]"), ("a wall", "[right]")]
    window = env.build_prompt("window", "the rules", history, "a hole", [])
    assert [piece.level for piece in window if isinstance(piece, Slot)] == ["episode", "step"]
    plain = fill(window)
    assert plain.startswith("the rules\n\nPrior to this step") and "a wall" in plain and "a board" not in plain
    chat = env.build_prompt("chat", "the rules", history, "a hole", [])
    assert [piece.level for piece in chat if isinstance(piece, Slot)] == ["step"] and fill(chat).startswith("a hole\n")
    assert env.sources() == {"textarena": f"{version('textarena')}, FrozenLake-v0-random"}


def test_the_version_that_messages_name_is_the_one_that_is_tested(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena.envs.registration", None)
    with pytest.raises(ImportError) as error:
        TextArenaEnv()
    assert str(error.value) == f"--env textarena needs its package: pip install textarena=={version('textarena')}"


@pytest.mark.parametrize("game", ["Chess-v0", "RushHour-v0", "Wordle-v0", "Sudoku-v9", "Sudoku-v0-train", "sudoku"])
def test_other_games_are_refused_by_name(game):
    with pytest.raises(ValueError, match=f"has no game={game}; it has 2048-v0, Bandit-v0, .*and their variants"):
        TextArenaEnv(game=game)


def test_a_run_plays_and_shows_it(random_tiny, tmp_path):
    config = Config.from_recipe(
        "laptop",
        **{"model": "smollm2", "env": "textarena", "iterations": 2, "tasks": 1, "rollouts": 2, "max_steps": 2},
        **{"max_new_tokens": 8, "skill_tokens": 24, "context_limit": 1024, "eval_every": 0, "eval_games": 1},
        **{"scorer": "old", "out": str(tmp_path / "run")},
    )
    train_module.train(start(config), variant_of("opid"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1] and "eval/valid_unseen/success" in lines[1]
    assert lines[0]["rollout/valid_actions"] == 0  # a random model has no brackets
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert sample["game"].startswith("GuessTheNumber-v0 ") and sample["task"].startswith("You are Player 0")
    assert [step["valid"] for step in sample["steps"]] == [False, False]
