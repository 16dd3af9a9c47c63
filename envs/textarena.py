"""Single-player games of TextArena (pip install textarena) as a text environment. A game is a seed.

TextArena's rules are the task, its messages the observations. An action is the last square brackets of a response.
What TextArena refuses is an invalid action; a second one in a row ends the game, as it does there. Success is a final
reward of 1: a lower one, for a game that was solved in part, is a failure.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from data import Prompt
from envs.prompts import EPISODE_SLOT, STEP_SLOT, past_steps

# No download, no API, another game for each seed, the same in every process. Variants (Sudoku-v0-hard) do, too.
GAMES = ("2048", "Bandit", "Blackjack", "Crosswords", "FrozenLake", "GuessTheNumber")
GAMES += ("LightsOut", "Mastermind", "Minesweeper", "Secretary", "Set", "Sudoku")
SPLITS, EACH = ("train", "valid_seen", "valid_unseen"), 1_000_000  # seeds of a split
ASK = "Answer with your next move in square brackets. Only the last pair of brackets counts."


class TextArenaEnv:
    """The environment of envs/__init__.py."""

    def __init__(self, max_steps: int = 30, history: int = 5, game: str = "GuessTheNumber-v0"):
        try:
            from textarena.envs.registration import ENV_REGISTRY
        except ModuleNotFoundError as error:
            raise ImportError("--env textarena needs its package: pip install textarena==0.7.4") from error
        if game.partition("-v0")[0] not in GAMES or f"{game}-raw" not in ENV_REGISTRY:
            raise ValueError(f"--env textarena has no game={game}; it has {'-v0, '.join(GAMES)}-v0, and their variants")
        self.max_steps, self.history, self.game = max_steps, history, game
        self.env: Any = None  # until the first reset

    def tasks(self, split: str, count: int | None = None) -> list[int]:
        first = SPLITS.index(split) * EACH
        return list(range(first, first + min(EACH, 1000 if count is None else count)))

    def sources(self) -> dict[str, str]:
        return {"textarena": f"{version('textarena')}, {self.game}"}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        import textarena

        seed, self.steps = (options or {}).get("game", seed or 0), 0
        self.numbers = random.Random(seed).getstate()
        with self._own_numbers():
            self.env = textarena.make(f"{self.game}-raw")
            self.env.reset(num_players=1, seed=seed)
        rules, *messages = (message for _, message, _ in self.env.get_observation()[1])
        info = {"task": rules.strip(), "task_type": self.game, "game": f"{self.game} {seed}", "won": False}
        return "\n".join(messages) or "The game begins.", info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        self.steps += 1
        with self._own_numbers():
            done, _ = self.env.step(action)
        seen = [message for sender, message, _ in self.env.get_observation()[1] if sender != 0]  # 0: the player
        reward, reason = (self.env.state.rewards[0], self.env.state.game_info[0]["reason"]) if done else (0.0, "")
        truncated = not done and self.steps >= self.max_steps
        return "\n".join([*seen, reason]).strip(), float(reward), done, truncated, {"won": done and reward >= 1}

    def build_prompt(
        self, style: str, task: str, history: list[tuple[str, str]], observation: str, admissible: list[str]
    ) -> Prompt:
        if history and style == "chat":
            return (f"{observation}\n\n", STEP_SLOT, ASK)
        past = past_steps(history, self.history) if history and self.history else ""
        return (f"{task}\n", EPISODE_SLOT, f"\n{past}{observation}\n\n", STEP_SLOT, ASK)

    def parse_action(self, response: str, admissible: list[str]) -> tuple[str, bool]:
        """Valid if the game takes it, which a copy of the game is asked."""
        found = re.findall(r"\[[^\[\]]+\]", response)
        if not found or self.env is None:
            return response.strip()[-100:], False
        tried, numbers = copy.deepcopy(self.env), self.numbers
        with self._own_numbers():
            tried.step(found[-1])
        self.numbers = numbers
        return found[-1], not (tried.state.error_count or tried.state.game_info[0]["invalid_move"])

    def analysis_prompt(self) -> str | None:
        return None  # the general one of skills.py

    @contextmanager
    def _own_numbers(self) -> Generator[None]:
        """TextArena seeds and draws the process's random numbers: here they stay as they were."""
        outside = random.getstate()
        random.setstate(self.numbers)
        try:
            yield
        finally:
            self.numbers = random.getstate()
            random.setstate(outside)
