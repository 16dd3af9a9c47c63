"""WebShop as a text environment: buy what an instruction asks for (Yao et al. 2022, princeton-nlp/WebShop).

Pages, actions, search and reward are the official text environment's (pages.py, search.py,
rewards.py), the products official files or a generated catalogue in the same format (data.py,
catalogue.py). Neither Java nor a web server is needed.

Prompts. "official": the words of the authors' release (agent_system/environments: prompts/webshop.py, env_manager.py),
responses `<think>...</think><action>...</action>`. "compact": compact.py, responses are bare commands.
"""

from __future__ import annotations

import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from data import Prompt
from envs.prompts import COMPACT_ANALYSIS, EPISODE_SLOT, STEP_SLOT, compact_prompt, past_steps, tagged_action
from envs.webshop import compact
from envs.webshop.catalogue import generate_catalogue
from envs.webshop.data import ALIASES, FILES, SPLITS, Shop, find, load_shop, sizes
from envs.webshop.pages import SEPARATOR, Session
from envs.webshop.rewards import nouns, reward, tagger
from envs.webshop.search import Index, cached_index

log = logging.getLogger(__name__)

GENERATED = "cache/webshop"
LONGEST_PROMPT = 20_000  # characters; the authors show no history in a longer one

ROLE = "You are an expert autonomous agent operating in the WebShop e‑commerce environment."
YOUR_TURN = "Now it's your turn to take one action for the current step.\n"
REASON = (
    "You should first reason step-by-step about the current situation, then think carefully which admissible action "
    "best advances the shopping goal. This reasoning process MUST be enclosed within <think> </think> tags."
)
CHOOSE = (
    "Once you've finished your reasoning, you should choose an admissible action for current step and present it "
    "within <action> </action> tags.\n"
)


@lru_cache(maxsize=2)
def open_shop(data: str, goals: str) -> tuple[Shop, Index, list[str]]:
    """The catalogue of one folder (or the generated one), its search index, its asins in order: once a process."""
    shop = load_shop(generate_catalogue(GENERATED) if data == "generate" else data, goals)
    if data != "generate" and tagger() is None:
        log.warning(
            "spaCy's en_core_web_sm is not installed: the reward finds a title's nouns without it, and may differ from "
            "the official one"
        )
    return shop, cached_index(shop.products.values()), list(shop.products)


class WebshopEnv:
    """The environment of envs/__init__.py. `games`: task ids that reset(seed=...) draws from; none: those of train.

    A task id is "webshop/SPLIT/NUMBER". `data` is "generate" or a folder with the official files, `goals`
    "human" or "synthetic" (as in the authors' runs), `page_size` the products a results page, None for 10 (official) or
    fewer (compact). `history` steps are shown in a "window" prompt.
    """

    new_words = ("data",)

    def __init__(
        self,
        games: list[str] | None = None,
        max_steps: int = 15,
        prompt: str = "official",
        history: int = 2,
        data: str = "generate",
        goals: Literal["human", "synthetic"] = "human",
        page_size: int | None = None,
    ):
        if prompt not in ("official", "compact"):
            raise ValueError(f"unknown WebShop prompt {prompt!r}; known: official, compact")
        if max_steps < 1 or history < 0 or (page_size is not None and page_size < 1):
            raise ValueError(f"max_steps {max_steps}, history {history} or page_size {page_size} is out of range")
        self.games, self.max_steps, self.prompt, self.history = games, max_steps, prompt, history
        self.data, self.goals, self.generated = str(data), goals, data == "generate"
        self.page_size = page_size or (compact.PAGE_SIZE if prompt == "compact" else 10)
        self.shop, self.index, self.asins = open_shop(self.data, goals)
        self.session: Session | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Play `options["game"]` (a task id), or the one of `games` that `seed` selects. `info["task"]` is the
        instruction, `info["task_type"]` the product's category. Raises ValueError for an id that is none."""
        task = (options or {}).get("game")
        if task is None:
            games = self.tasks("train") if self.games is None else self.games
            if not games:
                raise ValueError('no task to play: pass games=[...] or reset(options={"game": id})')
            task = games[(seed or 0) % len(games)]
        goal = self.goal(task)
        session = Session(self.shop, self.index, self.asins, goal, self.page_size)
        self.session, self.steps = session, 0
        instruction = goal["instruction_text"].strip()
        return self._observation(session), {
            "task": compact.task_words(instruction) if self.prompt == "compact" else instruction,
            "task_type": goal["category"],
            "game": task,
            "admissible_actions": self._admissible(session),
            "won": False,
        }

    def sources(self) -> dict[str, str]:
        """See envs/__init__.py."""
        folder = Path(os.path.expandvars(self.data)).expanduser()
        kinds = [kind for kind in FILES if kind != "instructions" or self.goals == "human"]
        if self.generated:
            return {}
        return {f"WebShop's {kind}": str(find(folder, kind)) for kind in kinds}

    def goal(self, task: str) -> dict:
        """The goal of a task id, as the official engine has it."""
        match = re.fullmatch(r"webshop/(\w+)/(\d+)", task) if isinstance(task, str) else None
        goals = self.shop.goals.get(ALIASES.get(match[1], match[1]), []) if match else []
        if match is None or int(match[2]) >= len(goals):
            sizes = ", ".join(f"{split} has {len(goals)}" for split, goals in self.shop.goals.items())
            raise ValueError(f"no WebShop task {task!r}; ids are webshop/SPLIT/NUMBER, from 0 ({sizes})")
        return goals[int(match[2])]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """The episode ends at buy now. `info["score"]` is the official reward, in [0, 1]; the step's reward is 1 for a
        full score, which is what counts as won, else 0. Raises RuntimeError before reset and after the end."""
        session = self.session
        if session is None or session.page == "done":
            raise RuntimeError("call reset() before step()")
        acted = session.act(compact.official(action, session) if self.prompt == "compact" else action)
        self.steps += 1
        done = session.page == "done"
        score = self._score(session) if done else 0.0
        info = {"admissible_actions": self._admissible(session), "won": score == 1.0, "score": score}
        observation = self._observation(session, score, acted)
        return observation, float(score == 1.0), done, not done and self.steps >= self.max_steps, info

    def tasks(self, split: str, count: int | None = None) -> list[str]:
        """The task ids of a split: train, valid_seen (officially: eval), valid_unseen (test). Raises ValueError for an
        unknown split, and where there is no goal to train on."""
        if (name := ALIASES.get(split, split)) not in self.shop.goals:
            raise ValueError(f"unknown WebShop split {split!r}; known: {', '.join((*SPLITS, *ALIASES))}")
        if name == "train" and not self.shop.goals[name]:
            raise ValueError(f"no WebShop goal to train on: {sizes(self.shop)}")
        return [f"webshop/{name}/{i}" for i in range(len(self.shop.goals[name]))][:count]

    def build_prompt(
        self, style: str, task: str, history: list[tuple[str, str]], observation: str, admissible: list[str]
    ) -> Prompt:
        """See envs/__init__.py. With its slots empty, the official "window" prompt is the authors', byte for byte."""
        if self.prompt == "compact":
            return compact_prompt(style, task, history, observation, self.history)
        observation = after_task(observation, task)
        listed = "\n".join(f"'{action}'," for action in admissible)
        if style == "chat" and history:
            actions = f"Your admissible actions of the current situation are:\n[\n{listed}\n].\n\n"
            return (f"Your current observation is: {observation}.\n{actions}", STEP_SLOT, YOUR_TURN)
        if history and self.history:
            prompt = self._later_prompt(task, history, observation, listed)
            if sum(len(piece) for piece in prompt if isinstance(piece, str)) <= LONGEST_PROMPT:
                return prompt
        opening = f"\n{ROLE} \nYour task is to: {task}.\n"
        actions = f"Your admissible actions of the current situation are: \n[\n{listed}\n].\n\n"
        now = f"Your current observation is: {observation}.\n{actions}"
        return (opening, EPISODE_SLOT, now, STEP_SLOT, f"{YOUR_TURN}{REASON} \n{CHOOSE}")

    def _later_prompt(self, task: str, history: list[tuple[str, str]], observation: str, listed: str) -> Prompt:
        history = [(after_task(seen, task), action) for seen, action in history]
        now = (
            f"{past_steps(history, self.history)}{observation}.\n"
            f"Your admissible actions of the current situation are:\n[\n{listed}\n].\n\n"
        )
        opening = f"\n{ROLE}\nYour task is to: {task}.\n"
        return (opening, EPISODE_SLOT, now, STEP_SLOT, f"{YOUR_TURN}{REASON}\n{CHOOSE}")

    def parse_action(self, response: str, admissible: list[str]) -> tuple[str, bool]:
        """ "official": see `tagged_action`.
        "compact": the whole response, valid if it is admissible or a search, which every page takes."""
        if self.prompt == "compact":
            action = response.strip()
            return action, compact.is_search(action) or (action in admissible and action != compact.SEARCH)
        return tagged_action(response, 20)

    def analysis_prompt(self) -> str | None:
        return COMPACT_ANALYSIS if self.prompt == "compact" else None

    def _score(self, session: Session) -> float:
        return reward(session.product, session.goal, self.shop.prices[session.asin], session.options, nouns)

    def _observation(self, session: Session, score: float | None = None, acted: bool = True) -> str:
        if self.prompt == "official":
            return session.observation(score)
        return compact.page_words(session) if acted else "nothing happens"

    def _admissible(self, session: Session) -> list[str]:
        if self.prompt == "compact":
            return compact.admissible(session)
        search = ["search[<your query>]"] if session.page == "search" else []
        return search + [f"click[{text}]" for text in session.clickables()]


def after_task(observation: str, task: str) -> str:
    """An observation as the authors show it: what follows the task in it, each text in quotes; all of it where the task
    is not in it."""
    parts = observation.split(SEPARATOR)
    if task not in parts:
        return observation
    return SEPARATOR.join(f"'{part}'" for part in parts[parts.index(task) + 1 :])
