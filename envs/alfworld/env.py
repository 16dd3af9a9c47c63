"""ALFWorld as a text environment: game files, prompts, action parser. Two engines play it, see engine.py.

Games are the official files (`game.tw-pddl` under DATA/json_2.1.1/SPLIT/, as `alfworld-download` lays them out) or
generated ones in the same format (games.py), so nobody needs a download to start.

Prompts. "official": the words of the authors' release (agent_system/environments/prompts/alfworld.py), responses
`<think>...</think><action>...</action>`. "compact": the same observations less their filler words, responses are bare
commands; short enough for a model of a million parameters.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Literal

from data import Prompt
from envs.alfworld.engine import FastEngine, TextWorldEngine, load_game
from envs.alfworld.files import MOST_BYTES, named_type
from envs.alfworld.games import generate_games
from envs.guard import close_env
from envs.order import alternating
from envs.prompts import COMPACT_ANALYSIS, EPISODE_SLOT, STEP_SLOT, compact_prompt, past_steps, tagged_action

warn_once = lru_cache(logging.getLogger(__name__).warning)  # a folder is listed before every evaluation

SPLITS = ("train", "valid_seen", "valid_unseen")
GENERATE = "generate"
TAIL = 16384  # bytes at the end of a game file that hold its `solvable` and its walkthrough
GENERATED = {"train": 1000, "valid_seen": 200, "valid_unseen": 200}  # games, where no number is asked for

# The columns of the paper's table, in its order.
TASK_TYPES = {
    "pick_and_place_simple": "Pick",
    "look_at_obj_in_light": "Look",
    "pick_clean_then_place_in_recep": "Clean",
    "pick_heat_then_place_in_recep": "Heat",
    "pick_cool_then_place_in_recep": "Cool",
    "pick_two_obj_and_place": "Pick2",
}

ENGINES = {"fast": FastEngine, "textworld": TextWorldEngine}

ROLE = "You are an expert agent operating in the ALFRED Embodied Environment."
YOUR_TURN = "Now it's your turn to take an action.\n"
REASON = (
    "You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within "
    "<think> </think> tags."
)
CHOOSE = (
    "\nOnce you've finished your reasoning, you should choose an admissible action for current step and present it "
    "within <action> </action> tags.\n"
)

FILLER = {"a", "an", "the", "you", "and", "it", "in", "of", "are", "some"}


def list_games(folder: str | Path, split: str) -> list[str]:
    """The game files of one split, sorted. `folder` holds json_2.1.1/ (or is it).

    As the official loader does (alfworld's alfred_tw_env.py), games with movable receptacles or slicing are left out,
    and those that are not marked as solvable; a warning counts and names them. Raises FileNotFoundError or ValueError
    with what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown ALFWorld split {split!r}; known: {', '.join(SPLITS)}")
    folder = Path(os.path.expandvars(folder)).expanduser()
    root = folder / "json_2.1.1" if (folder / "json_2.1.1").is_dir() else folder
    games, left_out = [], defaultdict(list)
    for path in sorted(map(str, (root / split).glob("**/game.tw-pddl"))):
        if reason := why_left_out(Path(path), Path(path).relative_to(root / split)):
            left_out[reason].append(str(Path(path).relative_to(root / split).parent))
        else:
            games.append(path)
    counts = "; ".join(f"{len(names)} {reason} ({shortened(names)})" for reason, names in left_out.items())
    if counts and games:
        warn_once(f"{root / split}: left out {counts}")
    if not games:
        raise FileNotFoundError(
            f"no {'playable ' if counts else ''}game.tw-pddl under {root / split}"
            f"{f' (left out {counts})' if counts else ''}. Get the official games with `pip install alfworld && "
            f"alfworld-download` and pass --env-options data=$ALFWORLD_DATA, or leave `data` at 'generate'"
        )
    return games


def why_left_out(path: Path, below_split: Path) -> str:
    """Why the official loader skips a game file, or "". What stands above the split's folder is the user's own."""
    for word in ("movable", "Sliced"):
        if word in str(below_split.parent):
            return f"with {word!r} in their name"
    try:
        return "" if marked_solvable(path) else "not marked as solvable"
    except (OSError, ValueError, RecursionError):
        return "that cannot be read as JSON"


def marked_solvable(path: Path) -> bool:
    """A game file's `solvable`. alfworld writes it near the end, so that of hundreds of megabytes little is read: an
    unescaped "solvable" with a colon can be nothing but that key. Raises ValueError for what is no JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL))
        end = file.read().rstrip()
    found = re.search(rb'"solvable"\s*:\s*(true|false|null)\b', end)
    if found and end.endswith(b"}"):  # else it may be cut off, half downloaded
        return found[1] == b"true"
    if size > MOST_BYTES:
        raise ValueError("too large to be a game")
    game = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(game, dict) and bool(game.get("solvable"))


def shortened(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def split_of(game: str) -> str:
    """The split in whose folder a game lies: the last folder with such a name, as those above are the user's own."""
    return next((part for part in reversed(Path(game).parts) if part in SPLITS), "")


@lru_cache
def cached_games(size: str, split: str, count: int) -> list[str]:
    """Generated games under cache/, the same for every run: made (or found to be there) once a process."""
    return generate_games(f"cache/alfworld-{size}", split, count, 0, size=size)


def room_of(observation: str) -> str:
    """An episode's first observation less the banner and the task, which a compact prompt shows in their own place."""
    return observation.partition("\n\n")[2].partition("\n\nYour task is to:")[0]


@lru_cache(maxsize=65536)
def words(text: str) -> str:
    """An official observation, task or command in the compact style: lower case, no filler, no punctuation, and no
    number 1: "apple" is apple 1, since most things are the only ones of their kind."""
    text = re.sub(r"^you arrive at [^.]*\. |the [a-z]+ \d+ is open\. ", "", text.lower())
    text = text.removeprefix("you are in the middle of a room. looking quickly around ")
    text = " ".join(word for word in re.findall(r"[a-z]+|\d+", text) if word not in FILLER)
    return re.sub(r"(?<=[a-z]) 1\b", "", text)


class AlfworldEnv:
    """The environment of envs/__init__.py, on one engine.

    `games`: paths to play, in place of `data`, which is a folder of official games, or "generate" for generated ones,
    in rooms of that `size`. Raises ValueError for an unknown engine, prompt or size.
    """

    columns = TASK_TYPES

    def __init__(
        self,
        games: list[str] | None = None,
        engine: Literal["fast", "textworld"] = "fast",
        max_steps: int = 30,
        prompt: str = "official",
        history: int = 5,
        data: str = GENERATE,
        size: Literal["small", "full"] = "small",
    ):
        if engine not in ENGINES:
            raise ValueError(f"unknown ALFWorld engine {engine!r}; known: {', '.join(ENGINES)}")
        if prompt not in ("official", "compact"):
            raise ValueError(f"unknown ALFWorld prompt {prompt!r}; known: official, compact")
        self.games, self.engine_name, self.max_steps = games, engine, max_steps
        self.data, self.size, self.generated = data, size, data == GENERATE
        self.prompt, self.history = prompt, history
        self.engine: FastEngine | TextWorldEngine | None = None
        self.commands: dict[str, str] = {}  # what can be done now, in the prompt's style -> in the engine's own words

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Play `options["game"]` (a path), or the one of `games` that `seed` selects. Raises GameFileError (a bad
        file) or ValueError (no game to play)."""
        path = (options or {}).get("game")
        if path is None:
            if not self.games:
                raise ValueError('no game to play: pass games=[...] or reset(options={"game": path})')
            path = self.games[(seed or 0) % len(self.games)]
        if self.engine is None or self.engine.game.path != path:
            self.close()
            self.engine = ENGINES[self.engine_name](load_game(path))
        self.steps = 0
        observation = self.engine.reset()
        if self.prompt == "compact":
            observation = room_of(observation)
        return self._text(observation), {
            "task": self._text(self.engine.game.task),
            "task_type": self.engine.game.task_type,
            "game": path,
            "admissible_actions": self._admissible(self.engine),
            "won": False,
        }

    def close(self) -> None:
        """Free the engine. `reset` makes a new one."""
        engine, self.engine = self.engine, None
        close_env(engine)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Reward 1 when the task becomes solved, else 0. Raises RuntimeError before reset."""
        if self.engine is None:
            raise RuntimeError("call reset() before step()")
        observation = self.engine.step(self.commands.get(action, action))
        self.steps += 1
        won = self.engine.won
        info = {"admissible_actions": self._admissible(self.engine), "won": won}
        return self._text(observation), float(won), won, not won and self.steps >= self.max_steps, info

    def tasks(self, split: str, count: int | None = None) -> list[str]:
        """The games of `split`: given ones, official ones, or generated ones (written to cache/ on first use)."""
        if self.games is not None:
            return [game for game in self.games if split_of(game) == split][:count]
        if self.generated:
            return cached_games(self.size, split, count or GENERATED[split])
        games = list_games(self.data, split)
        return (games if split == "train" else alternating(games, named_type))[:count]

    def build_prompt(
        self, style: str, task: str, history: list[tuple[str, str]], observation: str, admissible: list[str]
    ) -> Prompt:
        """See envs/__init__.py. With its slots empty, the official "window" prompt is the authors', byte for byte:
        the last `self.history` steps, every admissible action but `help`."""
        if self.prompt == "compact":
            return compact_prompt(style, task, history, observation, self.history)
        actions = "\n ".join(f"'{action}'" for action in admissible if action != "help")
        actions = f"Your admissible actions of the current situation are: [{actions}].\n\n"
        if not history or (style == "window" and not self.history):  # the first observation names the task
            opening = f"\n{ROLE}\nYour current observation is: {observation}\n"
            return (opening, EPISODE_SLOT, actions, STEP_SLOT, f"{YOUR_TURN}{REASON} {CHOOSE}")
        if style == "chat":
            return (f"{observation}\n{actions}", STEP_SLOT, YOUR_TURN)
        past = f"{past_steps(history, self.history)}{observation}\n"
        opening = f"\n{ROLE} Your task is to: {task}\n"
        return (opening, EPISODE_SLOT, past + actions, STEP_SLOT, f"{YOUR_TURN}{REASON}{CHOOSE}")

    def parse_action(self, response: str, admissible: list[str]) -> tuple[str, bool]:
        """ "official": see `tagged_action`.
        "compact": the whole response, valid if it is admissible, in compact words or the engine's own."""
        if self.prompt == "compact":
            action = response.strip()
            return action, action in admissible or action in self.commands.values()
        return tagged_action(response, 30)

    def analysis_prompt(self) -> str | None:
        return COMPACT_ANALYSIS if self.prompt == "compact" else None

    def _admissible(self, engine: FastEngine | TextWorldEngine) -> list[str]:
        """What can be done now, in the prompt's style."""
        self.commands = {self._text(command): command for command in engine.admissible_commands()}
        return list(self.commands)

    def _text(self, text: str) -> str:
        return words(text) if self.prompt == "compact" else text
